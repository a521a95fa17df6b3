"""What recording leaves alone in attention and recurrent modules, and what it leaves out."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from acktr.kfac import KFAC, CategoricalLoss, Preconditioner
from acktr.kfac.blocks.diagonal import DiagonalBlock
from acktr.kfac.statistics.capture import Capture
from tests.tools.kfac import plain_config, randn, same


class Tagger(nn.Module):
    def __init__(self, kind: Any = nn.LSTM) -> None:
        super().__init__()
        self.cells, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.cells(x)[0])
        return output


class Encoder(nn.Module):
    """torch's encoder with padding, in a layout and a mode that have a fast path."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        padding = (torch.arange(x.shape[1]) >= 3).expand(x.shape[:2])
        output: Tensor = self.head(self.encoder(x, src_key_padding_mask=padding))
        return output


def uses(captured: Capture) -> dict[str, int]:
    return {name: len(layer.calls) for name, layer in captured.layers.items()}


def test_nested_contexts_record_the_same_and_leave_nothing() -> None:
    model = Tagger().double()
    first, second = Preconditioner(model), Preconditioner(model)
    before = dict(vars(model.cells))
    with first.capture() as outer:
        with second.capture() as inner:
            model(randn(2, 5, 3))
        model(randn(2, 5, 3))
    expected = {"cells.ih_l0": 1, "cells.hh_l0": 1, "head": 1}
    assert uses(inner) == expected
    assert uses(outer) == {name: 2 * count for name, count in expected.items()}
    with pytest.raises(KeyError), first.capture():
        raise KeyError
    assert vars(model.cells) == before


def test_an_instances_own_forward_and_hooks_stay() -> None:
    model = Tagger().double()
    curvature = Preconditioner(model)
    seen = []
    inner = model.cells.forward
    model.cells.forward = lambda *args: (seen.append("forward"), inner(*args))[1]
    own = model.cells.forward
    model.cells.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.cells.register_forward_hook(lambda *_: seen.append("after"))
    with curvature.capture() as captured:
        model(randn(2, 5, 3))
    assert seen == ["before", "forward", "after"]
    assert model.cells.forward is own and uses(captured)["cells.hh_l0"] == 1


def test_without_gradients_the_pass_is_torchs_own() -> None:
    model, inputs = Encoder().double().eval(), randn(2, 5, 4)
    # A trust region with the exact Fisher has elementary operations in all of its passes.
    curvature = Preconditioner(model, plain_config(quadratic="kronecker"))
    with torch.no_grad():
        expected = model(inputs)
        with curvature.capture() as captured:
            found = model(inputs)
    assert same(found, expected) and not any(uses(captured).values())


def test_padding_in_evaluation_takes_no_fast_path() -> None:
    model, inputs = Encoder().double().eval(), randn(2, 5, 4)
    curvature = Preconditioner(model)
    expected = model(inputs)
    with curvature.capture() as captured:
        found = model(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert all(uses(captured).values())


def test_a_checkpoint_is_left_alone_with_a_warning() -> None:
    for model, inputs in ((Tagger(), randn(2, 5, 3)), (Encoder(), randn(2, 5, 4))):
        model = model.double()
        curvature, loss = Preconditioner(model), CategoricalLoss()
        with (
            curvature.capture() as captured,
            pytest.warns(UserWarning, match="inside of torch.utils.checkpoint is not recorded"),
        ):
            output = checkpoint(model, inputs, use_reentrant=False)
        curvature.observe(captured, output, loss)
        output.sum().backward()
        assert uses(captured)["head"] == 1
        assert all(parameter.grad is not None for parameter in model.parameters())


class Packed(nn.Module):
    """A recurrent network over packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)
        output: Tensor = self.head(pad_packed_sequence(self.cells(packed)[0], batch_first=True)[0])
        return output


@pytest.mark.parametrize("quadratic", ["corrected", "exact", "kronecker"])
@pytest.mark.parametrize("case", ["lstm", "gru", "attention"])
def test_the_diagonal_takes_what_is_inside_of_a_checkpoint(case: str, quadratic: Any) -> None:
    """As the warning advises, with ``skip``: all numbers are those without a checkpoint."""
    model, kind = {
        "lstm": (Tagger(), nn.LSTM),
        "gru": (Packed(), nn.GRU),
        "attention": (Encoder().eval(), nn.MultiheadAttention),
    }[case]
    model, found = model.double(), []
    inputs, steps = randn(2, 5, 4 if case == "attention" else 3), []
    start = copy.deepcopy(model.state_dict())
    for inside in (True, False):
        model.load_state_dict(start)
        optimizer = KFAC(model, plain_config(quadratic=quadratic), skip=[kind])
        for _ in range(2):
            with optimizer.capture() as captured, warnings.catch_warnings():
                warnings.simplefilter("error")
                output = checkpoint(model, inputs, use_reentrant=False) if inside else model(inputs)
            optimizer.observe(captured, output, CategoricalLoss())
            optimizer.zero_grad()
            output.square().sum().backward()
            optimizer.step()
        stats = optimizer.curvature.stats.values()
        found.append([block.averages[0].mean() for block in stats])
        steps.append([parameter.detach().clone() for parameter in model.parameters()])
        assert any(isinstance(block, DiagonalBlock) for block in stats)
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*steps)


def test_parametrised_weights_have_no_block_and_their_neighbours_have() -> None:
    model = Tagger().double()
    weight_norm(model.cells, "weight_hh_l0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        curvature = Preconditioner(model)
    assert {"cells.ih_l0", "cells.bias_hh_l0", "head"} <= set(curvature.stats)
    assert "cells.hh_l0" not in curvature.stats
    with curvature.capture() as captured:
        output = model(randn(2, 5, 3))
    curvature.observe(captured, output, CategoricalLoss())
    assert uses(captured)["cells.ih_l0"] == 1


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_results_under_autocast_have_torchs_types(kind: Any) -> None:
    model = Tagger(kind)
    curvature, inputs = Preconditioner(model), torch.randn(2, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        try:
            expected = model.cells(inputs)[0]
        except RuntimeError as error:  # processors without AVX-512
            pytest.skip(f"torch has no {kind.__name__} in bfloat16 here: {error}")
        with curvature.capture() as captured:
            output = model(inputs)
            found = model.cells(inputs)[0]
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    curvature.observe(captured, output, CategoricalLoss())


@pytest.mark.parametrize("structure", ["kfac", "kfac_factored", "cholesky", "ekfac"])
def test_a_resumed_run_is_the_same(structure: Any) -> None:
    def run(model: nn.Module, optimizer: KFAC, steps: int) -> None:
        loss = CategoricalLoss()
        for step in range(steps):
            inputs = randn(3, 5, 4, seed=step)
            with optimizer.capture() as captured:
                output = model(inputs)
            optimizer.observe(captured, output, loss)
            optimizer.zero_grad()
            loss(output, torch.ones(3, 5, dtype=torch.long)).backward()
            optimizer.step()

    torch.manual_seed(0)
    first = Encoder().double().eval()
    config = plain_config(structure=structure, refresh_interval=2)
    optimizer = KFAC(first, config)
    run(first, optimizer, 3)
    second = copy.deepcopy(first)
    resumed = KFAC(second, config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(first, optimizer, 3)
    run(second, resumed, 3)
    assert same(dict(first.named_parameters()), dict(second.named_parameters()))
