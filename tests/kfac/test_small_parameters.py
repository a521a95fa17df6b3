"""Blocks of small parameters: outputs that lead to one another, layers without a batching rule."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    Exact,
    GaussianLoss,
    Preconditioner,
    SumLoss,
    dense_fisher,
    dense_kfac,
    kfac_error,
)
from acktr.kfac.blocks.vectors import VectorBlock
from tests.tools.exact import close
from tests.tools.kfac import build, plain_config, randn, seeded
from tests.tools.product_cases import filled


class Both(NamedTuple):
    hidden: Tensor
    output: Tensor


class Features(nn.Module):
    """Hidden units, and what a head makes of them."""

    def __init__(self, returned: str) -> None:
        super().__init__()
        self.first = nn.Parameter(randn(3, 4, seed=1))
        self.head = nn.Parameter(randn(4, 2, seed=2))
        self.returned = returned

    def forward(self, x: Tensor) -> Any:
        hidden = (x @ self.first).tanh()
        output = hidden @ self.head
        if self.returned == "named":
            return Both(hidden, output)
        if self.returned == "view":
            return hidden.view(len(x), 2, 2), hidden
        return output if self.returned == "output" else (hidden, output)


def dense(model: nn.Module, **settings: Any) -> Preconditioner:
    config = plain_config(small_parameters="dense", stat_decay=0.0, **settings)
    return Preconditioner(model, config)


@pytest.mark.parametrize("returned", ["tuple", "named", "view"])
def test_an_output_that_leads_to_another_counts_once(returned: str) -> None:
    model = Features(returned)
    curvature = dense(model)
    with curvature.capture() as captured:
        output = model(randn(5, 3))
    assert isinstance(output, Both) == (returned == "named")
    parts = (GaussianLoss(reduction="batchmean"), GaussianLoss(std=0.5, reduction="batchmean"))
    curvature.observe(captured, output, SumLoss(parts=parts), source=Exact())
    assert kfac_error(curvature).whole < 1e-12


def test_a_loss_of_the_head_alone_has_the_curvature_of_a_net_that_returns_it_alone() -> None:
    found = []
    for returned in ("output", "tuple"):
        model = Features(returned)
        curvature = dense(model)
        with curvature.capture() as captured:
            output = model(randn(5, 3))
        logits = output if returned == "output" else output[1]
        curvature.observe(captured, logits, CategoricalLoss(), source=Exact())
        found.append(dense_kfac(curvature))
    assert float(found[0].norm()) > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)


def test_outputs_in_a_dict_are_refused() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": x * self.scale}

    curvature = dense(Named())
    with (
        pytest.raises(ValueError, match="returns a tensor or a tuple of tensors, got dict"),
        curvature.capture(),
    ):
        curvature.module(torch.ones(2, 3))


def test_calls_of_submodules_alone_are_refused() -> None:
    model = Features("output")
    curvature = dense(nn.Sequential(model, nn.Linear(2, 2).double()))
    for called in (False, True):
        with curvature.capture() as captured:
            output = curvature.module(randn(5, 3)) if called else curvature.module[1](randn(5, 2))
        if called:
            curvature.observe(captured, output, CategoricalLoss())
            continue
        with pytest.raises(ValueError, match="the module itself to be called inside capture"):
            curvature.observe(captured, output, CategoricalLoss())
    assert kfac_error(curvature).blocks["0.first"] < 1


class Recurrent(nn.Module):
    """Cells of a kind whose forward pass is a subclass's own, so that they have no blocks."""

    def __init__(self, kind: Any) -> None:
        super().__init__()

        class Own(kind):  # type: ignore[misc]
            def forward(self, x: Tensor) -> Any:
                return super().forward(x)

        self.cells = Own(3, 2, batch_first=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.cells(x)[0][:, -1])
        return output


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_of_ones_own_have_their_exact_block(kind: type[nn.RNNBase]) -> None:
    model = filled(Recurrent(kind))
    curvature, inputs = dense(model), randn(4, 3, 3)
    with curvature.capture() as captured:
        output = model(inputs)
    curvature.observe(captured, output, CategoricalLoss(), source=Exact())
    names = curvature.stats["small_parameters"].names
    assert {name.split(".")[0] for name in names} == {"cells"}
    truth = dense_fisher(model, (inputs,), CategoricalLoss(), names)
    block = curvature.stats["small_parameters"]
    assert isinstance(block, VectorBlock)
    assert kfac_error(curvature).blocks[names[0]] < 1e-10
    close(block.moment.mean(), truth)


def test_a_decay_also_damps_matrices_outside_of_layers() -> None:
    """Where nothing else has curvature, (lambda + eta) U = eta w."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.eye(3).double())
            self.shift = nn.Parameter(torch.ones(3).double())

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrix + 0 * self.shift

    for setting in ("dense", "diagonal"):
        model = Own()
        config = plain_config(
            small_parameters=setting,  # type: ignore[arg-type]
            damping=0.01,
            weight_decay=1.0,
            kl_clip=None,
            lr=1.0,
            momentum=0.0,
        )
        optimizer = KFAC(model, config)
        inputs = torch.zeros(4, 3).double()
        with optimizer.capture() as captured:
            output = model(inputs)
        optimizer.observe(captured, output, GaussianLoss())
        GaussianLoss()(output, inputs).backward()
        optimizer.step()
        expected = torch.eye(3).double() * (1 - 1 / 1.01)
        torch.testing.assert_close(model.matrix.detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", ["trust_region", "quadratic_model"])
@pytest.mark.parametrize("setting", ["dense", "gradient"])
@pytest.mark.filterwarnings("ignore::acktr.kfac.UnsupportedParameterWarning")
def test_parameters_of_several_types_keep_them(rule: Any, setting: Any) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2).double()
            self.temperature = nn.Parameter(torch.tensor(0.5))
            self.shift = nn.Parameter(torch.zeros(2).double())

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.layer(x) * self.temperature + self.shift
            return output

    model = Mixed()
    optimizer = KFAC(model, plain_config(small_parameters=setting), step_rule=rule)
    generator = seeded(0)
    for _ in range(3):
        inputs = torch.randn(6, 3, generator=generator, dtype=torch.float64)
        with optimizer.capture() as captured:
            output = model(inputs)
        optimizer.observe(captured, output, GaussianLoss())
        optimizer.zero_grad()
        GaussianLoss()(output, torch.ones_like(output)).backward()
        before = float(model.temperature.detach())
        optimizer.step()
        assert float(model.temperature.detach()) != before
    for name, parameter in model.named_parameters():
        assert optimizer.state[parameter]["momentum"].dtype == parameter.dtype, name
    optimizer.load_state_dict(optimizer.state_dict())


class Fixed(nn.Module):
    """Takes batches of one size alone."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(randn(4, 3, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        return x.view(6, 2, 2).flatten(1) @ self.matrix


def exported() -> nn.Module:
    """A module of torch.export, which checks the shape that it was made for."""
    return torch.export.export(build(nn.Linear(4, 3), nn.Tanh()), (randn(6, 4),)).module()


@pytest.mark.parametrize("make", [Fixed, exported])
def test_modules_that_take_no_single_sample_are_refused_in_one_line(make: Any) -> None:
    model = make()
    curvature = dense(model)
    with curvature.capture() as captured:
        output = model(randn(6, 4))
    with pytest.raises(ValueError, match="called for one sample alone it raises") as found:
        curvature.observe(captured, output, GaussianLoss())
    assert "\n" not in str(found.value) and 'small_parameters="diagonal"' in str(found.value)
