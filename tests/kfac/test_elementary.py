"""Attention and recurrence from elementary operations are torch's own: results and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

from acktr.kfac.statistics.capture import capture
from acktr.kfac.statistics.projections import Projection, projections
from tests.tools.kfac import randn

SEQUENCES = (nn.LSTM, nn.GRU, nn.RNN)
CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)


def tensors(result: Any) -> list[Tensor]:
    """The floating-point tensors of a result, packed ones included."""
    leaves = tree_leaves(tuple(result) if isinstance(result, PackedSequence) else result)
    flat = [tuple(x) if isinstance(x, PackedSequence) else (x,) for x in leaves]
    parts = [x for leaf in flat for x in leaf]
    return [x for x in parts if isinstance(x, Tensor) and x.is_floating_point()]


def results(module: nn.Module, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of parameters and inputs for fixed cotangents."""
    torch.manual_seed(3)
    found = tensors(module(*args, **kwargs))
    total = sum((x * randn(*x.shape, seed=i)).sum() for i, x in enumerate(found))
    wanted = [*module.parameters(), *(x for x in tree_leaves(args) if x.requires_grad)]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    return found, [g for g in gradients if g is not None]


def recorded(module: nn.Module) -> dict[str, Projection]:
    return {part.key: part for part in projections(module)}


def assert_equal(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """A recorded pass is torch's own to rounding, and every projection is seen."""
    before = dict(vars(module))
    own = results(module, args, kwargs)
    with capture(recorded(module)) as captured:
        mine = results(module, args, kwargs)
    assert vars(module).keys() == before.keys()
    assert [x.stride() for x in own[0]] == [x.stride() for x in mine[0]]
    for first, second in zip((*own[0], *own[1]), (*mine[0], *mine[1]), strict=True):
        torch.testing.assert_close(second, first, rtol=1e-12, atol=1e-13)
    for key, layer in captured.layers.items():
        assert layer.calls, key


def doubled(module: nn.Module) -> nn.Module:
    module = module.double()
    with torch.no_grad():
        for place, parameter in enumerate(module.parameters()):
            parameter.copy_(0.5 * randn(*parameter.shape, seed=place))
    return module


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed).requires_grad_()


# --- recurrence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": False, "batch_first": True},
        {"num_layers": 2, "bidirectional": True},
        {"num_layers": 3, "dropout": 0.4},
    ],
    ids=str,
)
def test_sequences(kind: type[nn.RNNBase], settings: dict[str, Any]) -> None:
    module = doubled(kind(3, 4, **settings))
    assert_equal(module, leaf(5, 2, 3))
    assert_equal(module.eval(), leaf(5, 2, 3))
    states = module.num_layers * (1 + module.bidirectional)
    batch = 5 if module.batch_first else 2
    start: Any = leaf(states, batch, 4, seed=1)
    if kind is nn.LSTM:
        start = (start, leaf(states, batch, 4, seed=2))
    assert_equal(module, leaf(5, 2, 3), start)


def test_relu_and_projected_states() -> None:
    assert_equal(doubled(nn.RNN(3, 4, nonlinearity="relu")), leaf(5, 2, 3))
    lstm = doubled(nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2))
    assert_equal(lstm, leaf(5, 2, 3))
    assert_equal(lstm, leaf(5, 2, 3), (leaf(4, 2, 2), leaf(4, 2, 4)))


@pytest.mark.parametrize("kind", SEQUENCES)
def test_a_single_sequence(kind: type[nn.RNNBase]) -> None:
    module = doubled(kind(3, 4))
    assert_equal(module, leaf(5, 3))
    start: Any = (leaf(1, 4), leaf(1, 4)) if kind is nn.LSTM else leaf(1, 4)
    assert_equal(module, leaf(5, 3), start)


@pytest.mark.parametrize("kind", SEQUENCES)
def test_packed_sequences(kind: type[nn.RNNBase]) -> None:
    module = doubled(kind(3, 4, num_layers=2, bidirectional=True))
    for lengths in ([5, 3, 1], [2, 5, 4]):
        packed = pack_padded_sequence(randn(5, 3, 3), torch.tensor(lengths), enforce_sorted=False)
        assert_equal(module, packed)
        start: Any = randn(4, 3, 4)
        assert_equal(module, packed, (start, -start) if kind is nn.LSTM else start)


@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind: type[nn.RNNCellBase]) -> None:
    for bias in (True, False):
        module = doubled(kind(3, 4, bias=bias))
        for shape in ((2,), ()):
            state: Any = leaf(*shape, 4, seed=1)
            if kind is nn.LSTMCell:
                state = (state, leaf(*shape, 4, seed=2))
            assert_equal(module, leaf(*shape, 3), state)
            assert_equal(module, leaf(*shape, 3))
    assert_equal(doubled(nn.RNNCell(3, 4, nonlinearity="relu")), leaf(2, 3))


# --- attention ------------------------------------------------------------------------------------

LENGTHS = {"self": (4, 4), "cross": (4, 5), "apart": (4, 5)}
MASKS: dict[str, Any] = {
    "none": {},
    "bool": {"attn_mask": torch.ones(4, 5).triu(2).bool()},
    "float": {"attn_mask": randn(4, 5)},
    "per head": {"attn_mask": randn(6, 4, 5)},
    "padding": {"key_padding_mask": torch.arange(5) >= torch.tensor([5, 2, 3])[:, None]},
    "padding added": {"key_padding_mask": randn(3, 5)},
    "both": {
        "attn_mask": torch.ones(4, 5).triu(2).bool(),
        "key_padding_mask": torch.arange(5) >= torch.tensor([5, 2, 3])[:, None],
    },
}
MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "dropout": {"dropout": 0.3, "batch_first": True},
    "added keys": {"add_bias_kv": True, "add_zero_attn": True},
    "widths": {"kdim": 3, "vdim": 7},
}


@pytest.mark.parametrize("settings", MODULES)
@pytest.mark.parametrize("masks", MASKS)
def test_attention(settings: str, masks: str) -> None:
    module = doubled(nn.MultiheadAttention(6, 2, **MODULES[settings]))
    first = module.batch_first

    def given(length: int, width: int, seed: int) -> Tensor:
        return leaf(*((3, length) if first else (length, 3)), width, seed=seed)

    query, key = given(4, 6, 0), given(5, module.kdim, 1)
    value = key if module.kdim == module.vdim else given(5, module.vdim, 2)
    for weights in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        assert_equal(module, query, key, value, **MASKS[masks], **weights)
    assert_equal(module, query, key, value + 1, **MASKS[masks])


@pytest.mark.parametrize("settings", ["plain", "dropout", "added keys"])
def test_self_attention(settings: str) -> None:
    module = doubled(nn.MultiheadAttention(6, 2, **MODULES[settings]))
    inputs, mask = leaf(4, 4, 6), nn.Transformer.generate_square_subsequent_mask(4).double()
    for options in ({}, {"need_weights": False}):
        assert_equal(module, inputs, inputs, inputs, **options)
        if settings != "added keys":
            assert_equal(module, inputs, inputs, inputs, attn_mask=mask, is_causal=True, **options)


def test_attention_within_one_sample() -> None:
    module = doubled(nn.MultiheadAttention(6, 2))
    query, key = leaf(4, 6), leaf(5, 6, seed=1)
    assert_equal(module, query, query, query)
    assert_equal(module, query, key, key, attn_mask=randn(4, 5), key_padding_mask=randn(5))
    assert_equal(module, query, key, key, attn_mask=randn(2, 4, 5), need_weights=False)
