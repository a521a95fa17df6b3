"""Running averages, preconditioning and failure handling of the blocks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import FactorError, KFACConfig, KroneckerBlock, sample_rows
from acktr.kfac.blocks.layouts import LayerFactors
from acktr.kfac.statistics.averages import RunningAverage
from tests.tools.kfac import (
    EXACT,
    block,
    build,
    dense_fisher,
    factors,
    flat,
    kfac,
    kronecker,
    observe,
    observe_gaussian,
    plain_config,
    randn,
    refresh_alone,
    set_gradients,
)


def with_factors(
    a: Tensor, g: Tensor, config: KFACConfig | None = None, bias: bool = False
) -> KroneckerBlock:
    """A linear layer's block whose running factors are exactly a and g."""
    layer = nn.Linear(len(a) - bias, len(g), bias=bias).to(a.dtype)
    config = config or plain_config()
    layer_factors = LayerFactors("0", layer, "weight", "bias" if bias else None, config)
    made = KroneckerBlock(layer_factors, config)
    made.history.started = True
    for average, value in ((made.a, a), (made.g, g)):
        average.value, average.weight = value.clone(), value.new_ones(())
    return made


def precondition(made: KroneckerBlock, gradient: Tensor, config: KFACConfig) -> Tensor:
    given = {"weight": gradient}
    return made.precondition(given, config.damping)["weight"]


ZERO = torch.zeros(3, 3, dtype=torch.float64)


def random_psd(size: int, rank: int | None = None, seed: int = 0) -> Tensor:
    rows = randn(rank or 2 * size, size, seed=seed)
    return rows.mT @ rows / len(rows)


# --- running averages -----------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 0.99])
def test_the_average_is_the_normalised_exponential_weighting(decay: float) -> None:
    average = RunningAverage(ZERO)
    batches = [randn(3, 3, seed=i) for i in range(7)]
    for count in range(1, 8):
        average.update(batches[count - 1], decay)
        weights = [decay ** (count - 1 - i) if decay or i == count - 1 else 0 for i in range(count)]
        expected = sum(w * b for w, b in zip(weights, batches, strict=False)) / sum(weights)
        torch.testing.assert_close(average.mean(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_is_as_if_it_had_not_been(bad: float) -> None:
    clean, dirty = RunningAverage(ZERO), RunningAverage(ZERO)
    poisoned = randn(3, 3)
    poisoned[1, 2] = bad
    dirty.update(poisoned, 0.9)
    assert torch.isnan(dirty.mean()).all()
    for index in range(3):
        for average in (clean, dirty):
            average.update(randn(3, 3, seed=index), 0.9)
        dirty.update(poisoned, 0.9)
    torch.testing.assert_close(dirty.mean(), clean.mean(), rtol=1e-14, atol=1e-15)


def test_update_does_not_change_its_argument_or_an_earlier_value() -> None:
    average = RunningAverage(torch.zeros(2, 2).double())
    first = randn(2, 2)
    kept = first.clone()
    average.update(first, 0.9)
    value = average.value
    assert value is not None
    earlier = value.clone()
    average.update(randn(2, 2, seed=1), 0.9)
    assert torch.equal(first, kept)
    assert torch.equal(value, earlier)


def test_layer_factors_are_averaged_over_batches() -> None:
    model = build(nn.Linear(3, 2))
    running = kfac(model, stat_decay=0.8)
    parts = []
    for index in range(3):
        inputs = randn(4 + index, 3, seed=index)
        observe(running, model, inputs, seed=index)
        single = kfac(model)
        observe(single, model, inputs, seed=index)
        parts.append(factors(single, "0"))
    weights = (0.64, 0.8, 1.0)
    for which in (0, 1):
        expected = sum(w * p[which] for w, p in zip(weights, parts, strict=True)) / sum(weights)
        torch.testing.assert_close(factors(running, "0")[which], expected, **EXACT)


@pytest.mark.parametrize(("count", "fraction"), [(7, 1 / 3), (3, 0.01), (8, 0.5), (5, 0.3)])
def test_sampled_rows_are_every_kth_one_and_come_round(count: int, fraction: float) -> None:
    every = min(round(1 / fraction), count)
    turns = [sample_rows(count, fraction, turn) for turn in range(every)]
    rows = [list(range(count))[rows] for rows in turns if rows is not None]
    assert sorted(row for each in rows for row in each) == list(range(count))
    assert all(rows)
    assert sample_rows(count, fraction, every) == turns[0]
    assert sample_rows(count, 0.9, 0) is None


# --- preconditioning against dense inverses -------------------------------------------------------


def dense_damped(optimizer: Any, name: str, config: KFACConfig) -> Tensor:
    a, g = factors(optimizer, name)
    damping = config.damping + config.weight_decay
    if config.structure == "kfac":
        product = torch.kron(g, a)
        return product + damping * torch.eye(len(product)).double()
    pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
    root = math.sqrt(damping)
    return torch.kron(
        g + root / pi * torch.eye(len(g)).double(), a + root * pi * torch.eye(len(a)).double()
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("damping", [1e-3, 1.0])
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("kind", ["linear", "linear-no-bias", "conv", "conv-no-bias"])
def test_the_direction_solves_the_dense_damped_system(
    kind: str, factored: bool, damping: float, weight_decay: float
) -> None:
    bias = not kind.endswith("no-bias")
    if kind.startswith("conv"):
        model, inputs = build(nn.Conv2d(2, 3, (2, 3), bias=bias)), randn(5, 2, 4, 5)
    else:
        model, inputs = build(nn.Linear(4, 3, bias=bias)), randn(9, 4)
    optimizer = kfac(
        model,
        damping=damping,
        structure="kfac_factored" if factored else "kfac",
        weight_decay=weight_decay,
    )
    observe(optimizer, model, inputs)
    optimizer.refresh()
    gradients = set_gradients(model)
    gradients["0.weight"] += weight_decay * model[0].weight.detach()

    layer = block(optimizer, "0")
    system = dense_damped(optimizer, "0", optimizer.config)
    expected = torch.linalg.solve(system, flat(gradients, layer))
    torch.testing.assert_close(flat(optimizer.direction(), layer), expected, rtol=1e-9, atol=1e-10)


def test_the_direction_is_the_natural_gradient_where_the_block_is_exact() -> None:
    model = build(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = kfac(model, damping=1e-2)
    inputs = randn(8, 4)
    observe_gaussian(optimizer, model, inputs)
    optimizer.refresh()
    gradients = set_gradients(model)
    direction = optimizer.direction()
    for name in ("0", "1"):
        layer = block(optimizer, name)
        system = dense_fisher(model, layer, inputs)
        system = system + 1e-2 * torch.eye(len(system)).double()
        expected = torch.linalg.solve(system, flat(gradients, layer))
        torch.testing.assert_close(flat(direction, layer), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("factored", [False, True])
def test_large_damping_gives_the_scaled_gradient(factored: bool) -> None:
    model = build(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 2))
    optimizer = kfac(model, damping=1e14, structure="kfac_factored" if factored else "kfac")
    observe(optimizer, model, randn(6, 2, 3, 3))
    optimizer.refresh()
    gradients = set_gradients(model)
    for name, step in optimizer.direction().items():
        torch.testing.assert_close(step * 1e14, gradients[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("factored", [False, True])
def test_identity_factors_without_damping_give_the_gradient(factored: bool) -> None:
    config = plain_config(damping=1e-24, structure="kfac_factored" if factored else "kfac")
    made = with_factors(torch.eye(5).double(), torch.eye(3).double(), config, bias=True)
    refresh_alone(made, config.damping)
    gradients = {"weight": randn(3, 4), "bias": randn(3, seed=1)}
    step = made.precondition(gradients, config.damping)
    for name, gradient in gradients.items():
        torch.testing.assert_close(step[name], gradient, rtol=1e-11, atol=1e-12)


def test_null_directions_step_by_the_gradient_over_the_damping() -> None:
    made = with_factors(random_psd(4, rank=1), random_psd(3))
    config = plain_config(damping=0.01)
    refresh_alone(made, config.damping)
    null = torch.linalg.svd(made.a.mean())[2][1:]
    gradient = randn(3, 3) @ null
    step = precondition(made, gradient, config)
    torch.testing.assert_close(step, gradient / 0.01, rtol=1e-9, atol=1e-9)


def test_before_any_refresh_the_direction_is_the_gradient() -> None:
    model = build(nn.Linear(4, 3))
    optimizer = kfac(model)
    observe(optimizer, model, randn(6, 4))
    gradients = set_gradients(model)
    for name, step in optimizer.direction().items():
        assert torch.equal(step, gradients[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("kind", ["zero", "rank-one", "repeated", "full"])
def test_extreme_factors_give_finite_directions(
    kind: str, factored: bool, dtype: torch.dtype
) -> None:
    shapes = {
        "zero": lambda n: torch.zeros(n, n).double(),
        "rank-one": lambda n: random_psd(n, rank=1),
        "repeated": lambda n: torch.eye(n).double(),
        "full": random_psd,
    }
    config = plain_config(structure="kfac_factored" if factored else "kfac")
    for a_scale in (1e-30, 1e-15, 1.0, 1e15, 1e30):
        for g_scale in (1e-30, 1e-15, 1.0, 1e15, 1e30):
            a = (a_scale * shapes[kind](4)).to(dtype)
            g = (g_scale * shapes[kind](3)).to(dtype)
            made = with_factors(a, g, config)
            refresh_alone(made, config.damping)
            assert made.history.failures == 0
            gradient = randn(3, 4).to(dtype)
            step = precondition(made, gradient, config)
            assert torch.isfinite(step).all(), (a_scale, g_scale)
            # (F + lambda)^-1 is positive and never larger than 1 / lambda.
            assert (step * gradient).sum() >= 0, (a_scale, g_scale)
            assert step.norm() <= gradient.norm() / 0.01 * 1.001, (a_scale, g_scale)


def test_a_missing_gradient_counts_as_zero_and_stays_missing() -> None:
    model = build(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = kfac(model)
    observe(optimizer, model, randn(6, 4))
    optimizer.refresh()
    gradients = set_gradients(model)
    model[0].bias.grad = torch.zeros_like(model[0].bias)
    expected = optimizer.direction()["0.weight"]
    model[0].bias.grad = None
    for parameter in model[1].parameters():
        parameter.grad = None
    step = optimizer.direction()
    assert set(step) == {"0.weight"}
    assert torch.equal(step["0.weight"], expected)
    assert not torch.allclose(step["0.weight"], gradients["0.weight"])


def test_extreme_eigenvalues_are_those_of_the_products() -> None:
    model = build(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = kfac(model)
    assert all(math.isnan(v) for v in optimizer.extreme_eigenvalues())
    observe(optimizer, model, randn(20, 4))
    optimizer.refresh()
    values = torch.cat([torch.linalg.eigvalsh(kronecker(optimizer, name)) for name in ("0", "1")])
    low, high = optimizer.extreme_eigenvalues()
    assert low == pytest.approx(float(values.min()), rel=1e-6)
    assert high == pytest.approx(float(values.max()), rel=1e-9)


def test_a_block_for_another_module_is_refused() -> None:
    with pytest.raises(TypeError, match="no Kronecker block for BatchNorm1d"):
        LayerFactors("x", nn.BatchNorm1d(2), "weight", "bias", plain_config())


def test_a_run_of_bad_batches_ends_in_the_documented_error() -> None:
    """NaN statistics leave the factors alone; max_failures of them in a row are an error."""
    model = build(nn.Linear(4, 3))
    optimizer = kfac(model, max_failures=2)
    observe(optimizer, model, randn(8, 4))
    optimizer.refresh()
    good = [tensor.clone() for tensor in factors(optimizer, "0")]
    bad = torch.full((8, 4), float("nan"), dtype=torch.float64)
    observe(optimizer, model, bad)
    optimizer.refresh()
    observe(optimizer, model, bad)
    with pytest.raises(FactorError, match="statistics of 2 batches in a row were NaN or Inf"):
        optimizer.refresh()
    assert all(map(torch.equal, factors(optimizer, "0"), good))
    observe(optimizer, model, randn(8, 4))
    optimizer.refresh()


@pytest.mark.parametrize("fisher", [-1.0, float("nan"), float("inf")])
def test_known_fisher_must_be_a_curvature(fisher: float) -> None:
    with pytest.raises(ValueError, match=r"known_fisher of 0\.bias must be finite and >= 0"):
        kfac(build(nn.Linear(4, 3)), known_fisher={"0.bias": fisher})
