"""Sampled and empirical curvature against the exact one and against explicit gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    BernoulliLoss,
    CategoricalLoss,
    Empirical,
    Exact,
    GaussianLoss,
    LearntGaussianLoss,
    OutputLoss,
    Sampled,
    SumLoss,
)
from tests.tools.exact import (
    Apply,
    close,
    gap,
    observed,
    stored,
    within_four_standard_errors,
)
from tests.tools.kfac import build, randn, same, seeded
from tests.tools.losses import MAKERS, REDUCTIONS, made_target

every_kind = pytest.mark.parametrize("kind", MAKERS)


def small() -> nn.Sequential:
    return build(nn.Linear(3, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 4), seed=4)


# --- sampled targets ------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("shape", [(5,), (3, 2)])
def test_sampled_factors_are_within_four_standard_errors_of_the_exact(
    kind: str, samples: int, shape: tuple[int, ...]
) -> None:
    model, loss = small(), MAKERS[kind]("batchmean")
    inputs = randn(*shape, 3)
    exact = observed(model, inputs, loss)
    drawn: dict[str, list[Tensor]] = {"0": [], "2": [], "3": []}
    seen = observed(model, inputs, loss, Sampled(samples), seed=1, stat_decay=0.0)
    for _ in range(600 // samples):
        seen.again(Sampled(samples))
        drawn["0"].append(seen.layer("0").g.mean())
        drawn["2"].append(seen.vector("2").moment.mean())
        drawn["3"].append(seen.layer("3").g.mean())
    truths = {
        "0": exact.layer("0").g.mean(),
        "2": exact.vector("2").moment.mean(),
        "3": exact.layer("3").g.mean(),
    }
    for name, draws in drawn.items():
        within_four_standard_errors(torch.stack(draws), truths[name])
    for name in ("0", "3"):
        close(seen.layer(name).a.mean(), exact.layer(name).a.mean())


def test_sampled_targets_of_two_heads_are_within_four_standard_errors() -> None:
    split = Apply(lambda y: (y[:, :3], y[:, 3:]))  # type: ignore[arg-type,return-value]
    model = build(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 5), split)
    loss = SumLoss(parts=(CategoricalLoss(), GaussianLoss(std=0.8)), weights=(0.5, 2.0))
    inputs = randn(6, 3)
    exact = observed(model, inputs, loss)
    seen = observed(model, inputs, loss, Sampled(), stat_decay=0.0)
    draws = []
    for _ in range(600):
        seen.again(Sampled())
        draws.append(seen.layer("2").g.mean())
    within_four_standard_errors(torch.stack(draws), exact.layer("2").g.mean())


def test_n_samples_divide_the_variance_by_n() -> None:
    model, inputs, loss = small(), randn(3, 3), CategoricalLoss()
    variance = {}
    for samples in (1, 8):
        seen = observed(model, inputs, loss, Sampled(samples), stat_decay=0.0)
        draws = []
        for _ in range(400):
            seen.again(Sampled(samples))
            draws.append(seen.layer("3").g.mean())
        variance[samples] = float(torch.stack(draws).var(0).sum())
    assert variance[1] / variance[8] == pytest.approx(8, rel=0.35)


@every_kind
def test_the_seed_decides_the_factors_and_the_global_stream_goes_on(kind: str) -> None:
    model, inputs, loss = small(), randn(5, 3), MAKERS[kind]("mean")
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = observed(model, inputs, loss, Sampled(2), seed=11)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    again = observed(model, inputs, loss, Sampled(2), seed=11)
    other = observed(model, inputs, loss, Sampled(2), seed=12)
    assert same(first.curvature.state_dict(), again.curvature.state_dict())
    assert gap(other.layer("3").g.mean(), first.layer("3").g.mean()) > 1e-3
    kept = first.layer("3").g.mean()
    first.again(Sampled(2))  # the stream goes on: the next draw is another one
    again.again(Sampled(2))
    assert gap(first.layer("3").g.mean(), kept) > 1e-6
    assert same(first.curvature.state_dict(), again.curvature.state_dict())


def test_the_exact_source_draws_nothing_and_one_sample_is_the_default() -> None:
    model, inputs, loss = small(), randn(5, 3), CategoricalLoss()
    seen = observed(model, inputs, loss, Exact(), seed=5)
    assert torch.equal(seen.curvature.generator.get_state(), seeded(5).get_state())
    reference = observed(model, inputs, loss, Sampled(1), seed=5)
    default = observed(model, inputs, loss, Exact(), seed=5, stat_decay=0.0)
    with default.curvature.capture() as captured:
        output = model(inputs)
    default.curvature.observe(captured, output, loss)
    close(default.layer("3").g.mean(), reference.layer("3").g.mean())


@pytest.mark.parametrize("samples", [0, -1, True, 2.0])
def test_a_number_of_samples_that_is_none(samples: Any) -> None:
    with pytest.raises(ValueError, match=r"samples must be an integer >= 1, got"):
        Sampled(samples)


# --- empirical Fisher -----------------------------------------------------------------------------


def explicit(
    model: nn.Module, inputs: Tensor, loss: OutputLoss[Any], target: Tensor
) -> dict[str, Tensor]:
    """Weight gradients (N, ...) of every sample's sum of terms, one backward pass each."""
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for n in range(len(inputs)):
        total = loss(model(inputs[n : n + 1]), target[n : n + 1])
        found = torch.autograd.grad(total, list(model.parameters()))
        for name, gradient in zip(rows, found, strict=True):
            rows[name].append(gradient)
    return {name: torch.stack(found) for name, found in rows.items()}


@every_kind
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(5,), (4, 3)])
def test_the_empirical_fisher_is_that_of_explicit_sample_gradients(
    kind: str, reduction: Any, shape: tuple[int, ...]
) -> None:
    """G and the moments come from gradients at the targets, with no weight gradient formed."""
    model = build(nn.Linear(3, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 4, bias=False), seed=4)
    inputs, loss = randn(*shape, 3), MAKERS[kind](reduction)
    width = 2 if kind == "learnt" else 4
    target = made_target(kind, (*shape, width))
    # linear_sharing="reduce": G is then of bias gradients, sum_t g, which torch gives as well.
    seen = observed(model, inputs, loss, Empirical(target), linear_sharing="reduce")
    rows = explicit(model, inputs, MAKERS[kind]("sum"), target)
    z = {"mean": inputs[..., 0].numel(), "batchmean": len(inputs), "sum": 1}[reduction]
    bias = rows["0.bias"]
    close(seen.layer("0").g.mean(), bias.mT @ bias / z)
    norm = torch.cat([rows["2.weight"], rows["2.bias"]], 1)
    close(stored(seen.block("2")), norm.mT @ norm / z)


@every_kind
def test_the_empirical_block_of_one_datum_is_the_outer_product_of_its_gradient(kind: str) -> None:
    model, inputs = build(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 4)), randn(1, 3)
    target = made_target(kind, (1, 2 if kind == "learnt" else 4))
    seen = observed(model, inputs, MAKERS[kind]("mean"), Empirical(target))
    rows = explicit(model, inputs, MAKERS[kind]("sum"), target)
    for name in ("0", "2"):
        gradient = torch.cat([rows[f"{name}.weight"][0], rows[f"{name}.bias"][0][:, None]], 1)
        close(stored(seen.block(name)), torch.outer(gradient.flatten(), gradient.flatten()))


def test_the_empirical_fisher_depends_on_the_target_and_is_not_the_fisher() -> None:
    model, inputs, loss = small(), randn(5, 3), GaussianLoss()
    near = observed(model, inputs, loss, Empirical(model(inputs).detach() + 0.1))
    far = observed(model, inputs, loss, Empirical(model(inputs).detach() + 0.2))
    close(far.layer("0").g.mean(), 4 * near.layer("0").g.mean())
    assert gap(far.layer("0").g.mean(), observed(model, inputs, loss).layer("0").g.mean()) > 0.1


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (CategoricalLoss(), torch.zeros(4, dtype=torch.int64)),
        (BernoulliLoss(), torch.zeros(5, 3)),
        (LearntGaussianLoss(), torch.zeros(5, 4)),
    ],
    ids=["length", "width", "double width"],
)
def test_a_target_that_does_not_fit_changes_nothing(loss: OutputLoss[Any], target: Tensor) -> None:
    model, inputs = small(), randn(5, 3)
    seen = observed(model, inputs, loss)
    kept = seen.curvature.state_dict()
    with pytest.raises(ValueError, match="target must be"):
        seen.again(Empirical(target))
    assert same(seen.curvature.state_dict(), kept)
