"""Embeddings, layers of several uses, and weights that several layers share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    CategoricalLoss,
    GaussianLoss,
    KroneckerBlock,
    Preconditioner,
    UnsupportedParameterWarning,
)
from acktr.kfac.blocks.constant import PlainBlock
from acktr.kfac.blocks.layouts import EmbeddingLayout
from acktr.kfac.config import Sharing
from acktr.kfac.statistics import factors
from acktr.kfac.statistics.inputs import Inputs
from acktr.kfac.statistics.uses import Use
from tests.tools.exact import Apply, assert_exact, close, gap, observed, stored
from tests.tools.kfac import OpRecorder, build, plain_config, randn, seeded
from tests.tools.losses import REDUCTIONS
from tests.tools.product_cases import filled


def tokens(*shape: int, size: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(size, shape, generator=seeded(seed))


# --- embeddings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("padding", [None, 2, -1])
@pytest.mark.parametrize("shape", [(9,), (7, 4)])
def test_an_embedding_is_exact_over_positions_that_nothing_mixes(
    shape: tuple[int, ...], padding: int | None, reduction: Any
) -> None:
    model = build(nn.Embedding(6, 3, padding_idx=padding), nn.Linear(3, 2))
    inputs = tokens(*shape)
    seen = assert_exact(model, inputs, GaussianLoss(std=0.6, reduction=reduction), ["0", "1"])
    a = seen.layer("0").a.mean()
    hot = nn.functional.one_hot(inputs.flatten(), 6).double()
    if padding is not None:
        assert bool((inputs == padding % 6).any())
        hot[:, padding] = 0
    second = hot.mT @ hot / inputs.numel()
    assert torch.equal(second, second.diagonal().diag())
    assert a.shape == (6,)
    close(a, second.diagonal())


@pytest.mark.parametrize("token", range(3))
def test_one_token_is_exact_with_any_net_behind(token: int) -> None:
    model = build(nn.Embedding(6, 3, padding_idx=1), nn.Tanh(), nn.Linear(3, 4))
    seen = observed(model, torch.tensor([token]), CategoricalLoss())
    if token == 1:  # the row of zeros that no gradient reaches
        assert float(stored(seen.block("0")).abs().max()) == 0
        assert float(seen.truth("0").abs().max()) == 0
    else:
        close(stored(seen.block("0")), seen.truth("0"))


@pytest.mark.parametrize("chunk", [1, 40, 2**24])
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("shape", [(9,), (9, 1), (7, 4), (3, 2, 5)])
def test_the_scales_of_an_embedding_are_those_of_one_hot_inputs(
    shape: tuple[int, ...], padding: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factors, "_CHUNK_ELEMENTS", chunk)
    inputs, gradients = tokens(*shape, size=4), randn(*shape, 3, seed=1)
    hot = nn.functional.one_hot(inputs, 4).double()
    if padding is not None:
        hot[..., padding] = 0
    vectors = torch.linalg.qr(randn(3, 3, seed=2))[0]
    layer = nn.Embedding(4, 3, padding_idx=padding)
    call = Inputs.of((inputs,))
    use = Use(layer, call, (gradients,), None, None)
    found = EmbeddingLayout(layer).squares([use, use], 0, None, vectors, apart=True)
    rows = zip(hot.reshape(shape[0], -1, 4), gradients.reshape(shape[0], -1, 3), strict=True)
    expected = torch.stack([(vectors.mT @ (2 * g.mT @ a)).square() for a, g in rows]).sum(0)
    close(found, expected)


def test_embeddings_need_neither_one_hot_inputs_nor_counts_on_the_host() -> None:
    model = build(nn.Embedding(5000, 3), nn.Linear(3, 2))
    seen = observed(model, tokens(8, 3), GaussianLoss(), structure="ekfac")
    seen.curvature.refresh()
    with OpRecorder() as recorder:
        seen.again()
    assert not recorder.of(torch.ops.aten.bincount.default)
    sizes = [found.numel() for *_, found in recorder.calls if isinstance(found, Tensor)]
    assert max(sizes) == 3 * 5000


def test_the_padding_row_does_not_move() -> None:
    model = build(nn.Embedding(6, 3, padding_idx=2), nn.Linear(3, 2))
    inputs = tokens(7, 4)
    seen = observed(model, inputs, GaussianLoss())
    model(inputs).square().sum().backward()
    seen.curvature.refresh()
    step = seen.curvature.direction(seen.curvature.gradients())
    assert float(step["0.weight"][2].abs().max()) == 0
    assert float(step["0.weight"][3].abs().max()) > 0


@pytest.mark.parametrize(
    "setting", [{"sparse": True}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}], ids=str
)
def test_an_embedding_with_another_gradient_has_no_block(setting: dict[str, Any]) -> None:
    with pytest.warns(UnsupportedParameterWarning, match=r"no curvature block for 0\.weight"):
        model = build(nn.Embedding(6, 3, **setting), nn.Linear(3, 2))
        curvature = Preconditioner(model, plain_config(small_parameters="gradient"))
    assert [b.names for b in curvature.blocks if isinstance(b, PlainBlock)] == [("0.weight",)]


def test_a_gradient_scaled_by_frequency_has_no_fisher() -> None:
    model = build(nn.Embedding(6, 3, scale_grad_by_freq=True), nn.Linear(3, 2))
    for setting in ("diagonal", "dense"):
        with pytest.warns(UnsupportedParameterWarning, match=r"no curvature block for 0\.weight"):
            curvature = Preconditioner(model, plain_config(small_parameters=setting))  # type: ignore[arg-type]
        assert sorted(curvature.stats) == ["1"]


# --- several uses of one layer --------------------------------------------------------------------


class Branches(nn.Module):
    """One layer on several parts of the input, the results joined in some way."""

    def __init__(self, layer: nn.Module, join: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.shared = layer
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join([self.shared(part) for part in x.unbind(1)])


def summed(outputs: list[Tensor]) -> Tensor:
    total = torch.stack(outputs).sum(0)
    return total if total.dim() == 2 else total.flatten(2).sum(2)


def as_terms(outputs: list[Tensor]) -> Tensor:
    flat = [y if y.dim() == 2 else y.flatten(2).mT for y in outputs]
    return torch.stack(flat, 1)


SHARED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 2), (3,)),
    "linear without bias": (lambda: nn.Linear(3, 2, bias=False), (3,)),
    "conv": (lambda: nn.Conv2d(2, 4, 2, padding=1), (2, 3, 3)),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_several_uses_are_exact_in_the_setting_that_fits(
    kind: str, sharing: Sharing, reduction: Any
) -> None:
    """Reduce for W x1 + W x2 + W x3; expand where every use has a loss term of its own."""
    make, shape = SHARED[kind]
    model = filled(Branches(make(), summed if sharing == "reduce" else as_terms))
    inputs, loss = randn(5, 3, *shape), GaussianLoss(std=0.6, reduction=reduction)
    seen = assert_exact(model, inputs, loss, ["shared"], sharing)
    other: Sharing = "expand" if sharing == "reduce" else "reduce"
    wrong = observed(model, inputs, loss, linear_sharing=other, conv_sharing=other)
    assert gap(stored(wrong.block("shared")), seen.truth("shared")) > 0.05


def test_uses_with_different_numbers_of_positions_are_exact_before_a_common_sum() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.shared(x[:, :4]).sum(1) + self.shared(x[:, 4])
            return output

    assert_exact(filled(Uneven()), randn(6, 5, 3), GaussianLoss(), ["shared"], "reduce")


def test_an_embedding_used_twice_is_exact_where_uses_are_terms() -> None:
    model = filled(Branches(nn.Embedding(6, 3, padding_idx=1), as_terms))
    assert_exact(model, tokens(8, 2), GaussianLoss(std=0.6), ["shared"])


# --- shared weights -------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers with one weight, and with one bias, two, or a bias on one side only."""

    def __init__(self, make: Callable[[bool], Any], biases: str, how: str) -> None:
        super().__init__()
        self.first = make(biases != "none")
        self.second = make(biases in ("same", "different"))
        self.second.weight = self.first.weight
        if biases == "same":
            self.second.bias = self.first.bias
        self.join = summed if how == "sum" else as_terms

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.unbind(1)
        return self.join([self.first(one), self.second(two)])


TIED: dict[str, tuple[Callable[[bool], Any], tuple[int, ...]]] = {
    "linear": (lambda bias: nn.Linear(3, 2, bias=bias), (3,)),
    "conv": (lambda bias: nn.Conv2d(2, 4, 2, padding=1, bias=bias), (2, 3, 3)),
    "conv1d": (lambda bias: nn.Conv1d(2, 4, 2, dilation=2, bias=bias), (2, 5)),
}


@pytest.mark.parametrize("how", ["sum", "terms"])
@pytest.mark.parametrize("biases", ["same", "different", "one", "none"])
@pytest.mark.parametrize("kind", TIED)
def test_tied_weights_have_one_exact_block(kind: str, biases: str, how: str) -> None:
    make, shape = TIED[kind]
    model = filled(Tied(make, biases, how))
    names = {
        "same": ["first"],
        "none": ["first"],
        "different": ["first", "first.bias", "second.bias"],
        "one": ["first", "first.bias"],
    }[biases]
    sharing: Sharing = "reduce" if how == "sum" else "expand"
    loss = GaussianLoss(std=0.6)
    seen = assert_exact(model, randn(5, 2, *shape), loss, names, sharing)
    assert seen.layer("first").paths == ("first", "second")
    both = ("first.weight", "first.bias") if biases == "same" else ("first.weight",)
    assert seen.block("first").names == both


def test_tied_embeddings_have_one_exact_block() -> None:
    def make(bias: bool) -> nn.Embedding:
        return nn.Embedding(6, 3, padding_idx=2)

    model = filled(Tied(make, "none", "terms"))
    seen = assert_exact(model, tokens(9, 2), GaussianLoss(std=0.6), ["first"])
    assert seen.layer("first").paths == ("first", "second")


def test_one_bias_under_two_weights_has_an_exact_block_of_its_own() -> None:
    class SharedBias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)
            self.second.bias = self.first.bias

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.second(self.first(x).tanh())
            return output

    model = filled(SharedBias())
    seen = observed(model, randn(6, 3), CategoricalLoss())
    assert sorted(seen.curvature.stats) == ["first", "first.bias", "second"]
    close(stored(seen.block("first.bias")), seen.truth("first.bias"))
    one = observed(model, randn(1, 3), CategoricalLoss())
    for name in ("first", "second", "first.bias"):
        close(stored(one.block(name)), one.truth(name))


class TwoTables(nn.Module):
    """Two embeddings with one table, one of which has a word without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3, padding_idx=1)
        self.other = nn.Embedding(6, 3)
        self.middle = nn.Linear(3, 3)
        self.other.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.middle(self.table(x).tanh() + self.other(x))
        return output


def test_a_weight_of_unlike_layers_has_no_kronecker_block_and_is_named() -> None:
    with pytest.warns(UnsupportedParameterWarning, match=r"no curvature block for table\.weight:"):
        curvature = Preconditioner(filled(TwoTables()), plain_config(small_parameters="gradient"))
    assert [b.name for b in curvature.blocks if isinstance(b, KroneckerBlock)] == ["middle"]
    assert sorted(curvature.stats) == ["middle"]


def test_a_weight_of_unlike_layers_can_have_the_exact_block_of_small_parameters() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnsupportedParameterWarning)
        seen = observed(
            filled(TwoTables()), tokens(7, 2), CategoricalLoss(), small_parameters="dense"
        )
    assert seen.vector("small_parameters").names == ("table.weight",)
    close(stored(seen.block("small_parameters")), seen.truth("small_parameters"))


@pytest.mark.parametrize("setting", ["stride", "padding", "dilation", "padding_mode"])
def test_convolutions_of_unlike_settings_share_no_block(setting: str) -> None:
    class Unlike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv1d(2, 3, 2, padding=1)
            value: Any = "circular" if setting == "padding_mode" else 2
            self.second = nn.Conv1d(2, 3, 2, **{"padding": 1, setting: value})
            self.second.weight, self.second.bias = self.first.weight, self.first.bias

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.first(x).flatten(1).sum(1, True) + self.second(x).sum((1, 2))
            return output

    with pytest.warns(UnsupportedParameterWarning, match=r"first\.weight"):
        curvature = Preconditioner(filled(Unlike()), plain_config(small_parameters="gradient"))
    assert not any(isinstance(b, KroneckerBlock) for b in curvature.blocks)


def test_a_bare_layer_is_a_whole_module() -> None:
    layer = filled(nn.Linear(3, 2))
    assert_exact(layer, randn(5, 3), GaussianLoss(), [""])
    nested = nn.Sequential(nn.Sequential(layer), Apply(torch.tanh))
    one = randn(1, 3)
    assert_exact(nested, one, GaussianLoss(), ["0.0"])
