"""A (x) G equals the exact Fisher (GGN) block wherever a theorem says so, and only there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import Tensor, nn

from acktr.kfac import (
    BernoulliLoss,
    CategoricalLoss,
    Exact,
    GaussianLoss,
    LearntGaussianLoss,
    OutputLoss,
    SumLoss,
)
from acktr.kfac.config import Sharing
from acktr.kfac.losses.likelihoods import Reduction
from tests.tools.exact import Apply, assert_exact, close, gap, observed, stored
from tests.tools.kfac import build, randn
from tests.tools.losses import REDUCTIONS

every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)

ACTIVATIONS: list[nn.Module] = [
    nn.Tanh(),
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.GELU(),
    nn.Sigmoid(),
    nn.SiLU(),
    nn.Softplus(),
    nn.LeakyReLU(0.3),
    nn.Softmax(dim=-1),
]


def losses(reduction: Reduction) -> dict[str, OutputLoss[Any]]:
    """For outputs whose last dimension is 4."""
    return {
        "categorical": CategoricalLoss(reduction=reduction),
        "bernoulli": BernoulliLoss(reduction=reduction),
        "gaussian": GaussianLoss(std=0.6, reduction=reduction),
        "learnt": LearntGaussianLoss(reduction=reduction),
    }


LOSSES = tuple(losses("mean"))


# --- one datum ------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_one_datum_is_exact_with_any_activation(
    activation: nn.Module, kind: str, sharing: Sharing
) -> None:
    model = build(
        nn.Linear(3, 5),
        copy.deepcopy(activation),
        nn.Linear(5, 4, bias=False),
        copy.deepcopy(activation),
        nn.Linear(4, 4),
        seed=1,
    )
    assert_exact(model, randn(1, 3), losses("mean")[kind], ["0", "2", "4"], sharing)


@every_reduction
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("copies", [1, 3])
def test_every_loss_and_reduction_with_positions_in_the_output(
    kind: str, reduction: Reduction, copies: int
) -> None:
    """One datum, repeated or not, with three loss terms each: Z is 3 N, N or 1."""
    model = build(
        nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 12), Apply(lambda y: y.reshape(-1, 3, 4)), seed=2
    )
    inputs = randn(1, 3).repeat(copies, 1)
    seen = assert_exact(model, inputs, losses(reduction)[kind], ["0", "2"])
    per_term = observed(model, inputs, losses("sum")[kind])
    z = {"mean": 3 * copies, "batchmean": copies, "sum": 1}[reduction]
    for name in ("0", "2"):
        close(stored(seen.block(name)) * z, stored(per_term.block(name)))


class Heads(nn.Module):
    """A trunk and two heads with different numbers of loss terms."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 5)
        self.policy = nn.Linear(5, 8)
        self.value = nn.Linear(5, 2)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(inputs).tanh()
        return self.policy(hidden).reshape(-1, 2, 4), self.value(hidden)


@every_reduction
@pytest.mark.parametrize("weights", [None, (0.3, 2.5)])
def test_a_sum_of_losses_is_exact(
    reduction: Reduction, weights: tuple[float, float] | None
) -> None:
    model = build(Heads(), seed=3)[0]
    parts = (CategoricalLoss(reduction=reduction), GaussianLoss(std=0.4, reduction=reduction))
    inputs = randn(1, 3).repeat(3, 1)
    assert_exact(model, inputs, SumLoss(parts=parts, weights=weights), ["trunk", "policy", "value"])


def test_several_data_in_a_nonlinear_net_are_not_exact() -> None:
    model = build(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    seen = observed(model, randn(6, 3), CategoricalLoss())
    for name in ("0", "2"):
        assert gap(stored(seen.block(name)), seen.truth(name)) > 0.01


# --- deep linear networks -------------------------------------------------------------------------


@every_reduction
@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_deep_linear_net_with_gaussian_loss_is_exact_for_any_batch(
    count: int, reduction: Reduction, sharing: Sharing
) -> None:
    model = build(nn.Linear(4, 5), nn.Linear(5, 3, bias=False), nn.Linear(3, 2))
    loss = GaussianLoss(std=0.6, reduction=reduction)
    assert_exact(model, randn(count, 4), loss, ["0", "1", "2"], sharing)


@every_reduction
@pytest.mark.parametrize("shape", [(6, 5), (3, 2, 4)])
def test_expand_is_exact_over_positions_that_nothing_mixes(
    shape: tuple[int, ...], reduction: Reduction
) -> None:
    model = build(nn.Linear(3, 4), nn.Linear(4, 5, bias=False), nn.Linear(5, 2))
    loss = GaussianLoss(std=0.6, reduction=reduction)
    seen = assert_exact(model, randn(*shape, 3), loss, ["0", "1", "2"])
    other = observed(model, seen.inputs, loss, linear_sharing="reduce")
    for name in ("0", "1", "2"):  # the other setting has no such theorem
        assert gap(stored(other.block(name)), other.truth(name)) > 0.05


@every_reduction
@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("count", [1, 6])
def test_reduce_is_exact_before_a_pooling_over_positions(
    count: int, pooling: str, reduction: Reduction
) -> None:
    """And "expand" differs from the Fisher there, before the pooling but not after it."""
    pool = Apply(lambda y: y.sum(1) if pooling == "sum" else y.mean(1))
    model = build(nn.Linear(3, 4), nn.Linear(4, 5, bias=False), pool, nn.Linear(5, 2))
    loss = GaussianLoss(std=0.6, reduction=reduction)
    seen = assert_exact(model, randn(count, 7, 3), loss, ["0", "1", "3"], "reduce")
    other = observed(model, seen.inputs, loss, linear_sharing="expand")
    for name in ("0", "1"):
        assert gap(stored(other.block(name)), other.truth(name)) > 0.05
    close(stored(other.block("3")), other.truth("3"))


def test_reduce_is_exact_for_one_datum_with_a_nonlinear_net_after_the_pooling() -> None:
    pool = Apply(lambda y: y.mean((1, 2)))
    model = build(nn.Linear(3, 4), pool, nn.Tanh(), nn.Linear(4, 4))
    assert_exact(model, randn(1, 5, 2, 3), CategoricalLoss(), ["0", "3"], "reduce")


# --- convolutions ---------------------------------------------------------------------------------


def spatial(how: str) -> Apply:
    return Apply(lambda y: y.flatten(2).sum(2) if how == "sum" else y.flatten(2).mean(2))


CONVOLUTIONS: list[tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = [
    (nn.Conv1d, {"kernel_size": 3, "padding": 1}, (7,)),
    (nn.Conv2d, {"kernel_size": (2, 3), "padding": 1, "bias": False}, (5, 4)),
    (nn.Conv2d, {"kernel_size": 2, "stride": 2, "dilation": 2, "padding": (1, 0)}, (6, 7)),
    (nn.Conv2d, {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"}, (5, 4)),
    (nn.Conv3d, {"kernel_size": 2, "stride": (1, 2, 1)}, (3, 4, 3)),
]


@every_reduction
@pytest.mark.parametrize("how", ["sum", "mean"])
@pytest.mark.parametrize(("layer", "settings", "size"), CONVOLUTIONS)
def test_conv_reduce_is_exact_before_a_spatial_pooling(
    layer: Any, settings: dict[str, Any], size: tuple[int, ...], how: str, reduction: Reduction
) -> None:
    model = build(layer(2, 3, **settings), spatial(how), nn.Linear(3, 2))
    loss = GaussianLoss(std=0.6, reduction=reduction)
    seen = assert_exact(model, randn(4, 2, *size), loss, ["0", "2"], "reduce")
    other = observed(model, seen.inputs, loss)
    assert gap(stored(other.block("0")), other.truth("0")) > 0.05


@pytest.mark.parametrize("kind", LOSSES)
def test_conv_reduce_ends_in_the_spatial_sum_itself(kind: str) -> None:
    model = build(nn.Conv2d(2, 4, (2, 3), padding=1), spatial("sum"))
    inputs = randn(1, 2, 5, 4).repeat(3, 1, 1, 1)
    assert_exact(model, inputs, losses("batchmean")[kind], ["0"], "reduce")


def test_conv_reduce_is_exact_in_every_layer_of_a_circular_linear_net() -> None:
    """With circular padding and stride 1 the gradient is the same at every position."""
    settings: dict[str, Any] = {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}
    model = build(
        nn.Conv2d(2, 3, **settings), nn.Conv2d(3, 4, bias=False, **settings), spatial("sum")
    )
    seen = assert_exact(model, randn(5, 2, 4, 5), GaussianLoss(), ["0", "1"], "reduce")
    other = observed(model, seen.inputs, GaussianLoss())
    for name in ("0", "1"):
        assert gap(stored(other.block(name)), other.truth(name)) > 0.05


@every_reduction
def test_conv_expand_is_exact_where_every_position_is_a_term_of_its_own(
    reduction: Reduction,
) -> None:
    model = build(
        nn.Conv2d(2, 3, (2, 3)),
        nn.Conv2d(3, 2, 1),
        Apply(lambda y: y.flatten(2).mT),  # (N, positions, channels)
    )
    loss = GaussianLoss(std=0.6, reduction=reduction)
    seen = assert_exact(model, randn(4, 2, 4, 5), loss, ["0", "1"])
    other = observed(model, seen.inputs, loss, conv_sharing="reduce")
    assert gap(stored(other.block("0")), other.truth("0")) > 0.05


# --- accumulation ---------------------------------------------------------------------------------


@every_reduction
def test_parts_of_a_batch_join_to_the_exact_block_of_the_whole(reduction: Reduction) -> None:
    model = build(nn.Linear(3, 4), nn.Linear(4, 2))
    inputs, loss = randn(7, 2, 3), GaussianLoss(std=0.6, reduction=reduction)
    seen = observed(model, inputs[:1], loss, stat_decay=0.0)
    for part, last in ((inputs[:2], False), (inputs[2:5], False), (inputs[5:], True)):
        with seen.curvature.capture() as captured:
            output = model(part)
        seen.curvature.observe(captured, output, loss, source=Exact(), last=last)
    seen.inputs = inputs
    for name in ("0", "1"):
        close(stored(seen.block(name)), seen.truth(name))
