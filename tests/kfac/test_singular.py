"""Singular, repeated and damaged factors, for every structure and inverse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import KFAC, FactorError
from acktr.kfac.blocks.tridiagonal import chain_matrix
from acktr.kfac.linalg import trace_ratio
from tests.tools.kfac import (
    block,
    build,
    chain,
    factors,
    flat,
    kfac,
    layers,
    mlp,
    moved,
    parameters,
    plain_config,
    randn,
    same,
    set_gradients,
)

METHODS: dict[str, dict[str, Any]] = {
    "kfac": {},
    "factored": {"structure": "kfac_factored"},
    "cholesky": {"structure": "cholesky"},
    "ekfac": {"structure": "ekfac"},
    "tridiagonal": {"structure": "tridiagonal"},
}
METHOD = pytest.mark.parametrize("method", METHODS)
DAMPING = 0.01


def learn(optimizer: KFAC, model: nn.Module, inputs: Tensor, noise: Tensor) -> None:
    with optimizer.capture() as captured:
        output = model(inputs)
    optimizer.update_curvature(captured, (noise * output).sum())


DEGENERATE: dict[str, tuple[Tensor, Tensor]] = {
    "one sample": (randn(1, 4), randn(1, 3, seed=1)),
    "one sample many times": (randn(1, 4).expand(6, 4), randn(1, 3, seed=1).expand(6, 3)),
    "no input": (torch.zeros(6, 4).double(), randn(6, 3, seed=1)),
    "no gradient": (randn(6, 4), torch.zeros(6, 3).double()),
    "nothing": (torch.zeros(6, 4).double(), torch.zeros(6, 3).double()),
    "equal columns": (randn(6, 1).expand(6, 4), randn(6, 1, seed=1).expand(6, 3)),
    "a dead column": (randn(6, 4) * torch.tensor([1.0, 0, 1, 0]).double(), randn(6, 3, seed=1)),
    "repeated eigenvalues": (
        torch.cat([torch.eye(4), -torch.eye(4)]).double(),
        math.sqrt(3) * torch.eye(3).repeat(3, 1)[:8].double(),
    ),
    "scales apart": (
        randn(6, 4) * torch.tensor([1e-6, 1.0, 1e6, 1e-3]).double(),
        randn(6, 3, seed=1),
    ),
    "tiny": (1e-170 * randn(6, 4), 1e-170 * randn(6, 3, seed=1)),
}


def shifted(matrix: Tensor, amount: Tensor | float) -> Tensor:
    return matrix + amount * torch.eye(len(matrix)).double()


def damped_factors(optimizer: KFAC, name: str) -> tuple[Tensor, Tensor]:
    a, g = factors(optimizer, name)
    pi, root = trace_ratio(a.diagonal(), g.diagonal()), DAMPING**0.5
    return shifted(a, pi * root), shifted(g, root / pi)


def solved(optimizer: KFAC, gradients: dict[str, Tensor], method: str) -> Tensor:
    """The direction over both layers, by one dense solve in float64."""
    found_layers = layers(optimizer)
    vector = torch.cat([flat(gradients, layer) for layer in found_layers])
    if method == "tridiagonal":
        own = [damped_factors(optimizer, layer.name) for layer in found_layers]
        found = chain(optimizer)
        cross = [[c[0].mean()] for c in (found.a_cross, found.g_cross)]
        matrix = chain_matrix([o[0] for o in own], [o[1] for o in own], *cross)
        return torch.linalg.solve(matrix, vector)
    parts = []
    for layer in found_layers:
        if method in ("kfac", "ekfac"):  # right after a refresh the scales are the eigenvalues
            matrix = torch.kron(layer.g.mean(), layer.a.mean())
            matrix = shifted(matrix, DAMPING)
        else:
            a, g = damped_factors(optimizer, layer.name)
            matrix = torch.kron(g, a)
        parts.append(torch.linalg.solve(matrix, flat(gradients, layer)))
    return torch.cat(parts)


@METHOD
@pytest.mark.parametrize("case", DEGENERATE)
def test_the_step_is_the_damped_solve_of_a_degenerate_factor(case: str, method: str) -> None:
    model = mlp()
    optimizer = KFAC(model, plain_config(damping=DAMPING, kl_clip=None, **METHODS[method]))
    learn(optimizer, model, *DEGENERATE[case])
    gradients = set_gradients(model)
    optimizer.refresh()
    step = optimizer.direction()
    expected = solved(optimizer, gradients, method)
    found = torch.cat([flat(step, layer) for layer in layers(optimizer)])
    error = float((found - expected).norm() / expected.norm())
    assert error < (1e-4 if case == "scales apart" else 1e-8)
    assert optimizer.failures == 0
    optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@METHOD
def test_many_steps_on_one_degenerate_batch_stay_finite(method: str) -> None:
    for inputs, noise in DEGENERATE.values():
        model = mlp()
        optimizer = kfac(model, refresh_interval=2, damping=DAMPING, **METHODS[method])
        for index in range(6):
            learn(optimizer, model, inputs, noise)
            set_gradients(model, seed=index)
            optimizer.step()
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
        assert all(bool(torch.isfinite(p).all()) for p in optimizer.direction().values())


@METHOD
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200], ids=str)
@pytest.mark.parametrize("where", ["inputs", "gradients"])
def test_a_damaged_batch_is_left_out(method: str, bad: float, where: str) -> None:
    """The third batch must not count: the run is that of the first two."""
    model, clean_model = mlp(), mlp()
    settings = {"refresh_interval": 1, "damping": DAMPING, "momentum": 0.0, **METHODS[method]}
    optimizer, clean = kfac(model, **settings), kfac(clean_model, **settings)
    for index in range(2):
        for opt, net in ((optimizer, model), (clean, clean_model)):
            learn(opt, net, randn(6, 4, seed=index), randn(6, 3, seed=9 + index))
    inputs, noise = randn(6, 4, seed=5), randn(6, 3, seed=6)
    (inputs if where == "inputs" else noise)[2, 1] = bad
    learn(optimizer, model, inputs, noise)
    assert all(
        int(layer.history.rejected) == (where == "gradients" or index == 0 or math.isnan(bad))
        for index, layer in enumerate(optimizer.curvature.stats.values())
    )
    for opt, net in ((optimizer, model), (clean, clean_model)):
        set_gradients(net)
        opt.step()
    assert same(factors(optimizer, "0"), factors(clean, "0"))
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    if where == "gradients" or method == "tridiagonal":
        assert same(parameters(model), parameters(clean_model))


@METHOD
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["a", "g"])
def test_a_damaged_factor_keeps_the_former_inverse(method: str, bad: float, side: str) -> None:
    model = mlp()
    optimizer = kfac(
        model, refresh_interval=1, max_failures=3, damping=DAMPING, momentum=0.0, **METHODS[method]
    )
    learn(optimizer, model, randn(6, 4), randn(6, 3, seed=1))
    set_gradients(model)
    optimizer.step()
    step = optimizer.direction()
    average = getattr(layers(optimizer)[0], side)
    average.value = average.value.clone()
    average.value[1, 1] = bad
    for failures in (1, 2):
        before = parameters(model)
        optimizer.step()
        assert optimizer.failures == failures
        assert optimizer.last_step is not None
        rate = optimizer.lr * float(optimizer.last_step.scale)
        for name, change in moved(before, model).items():
            torch.testing.assert_close(change, rate * step[name], rtol=1e-9, atol=1e-14)
    before = parameters(model)
    with pytest.raises(FactorError, match="3 refreshes failed in a row") as caught:
        optimizer.step()
    assert "\n" not in str(caught.value)
    assert same(parameters(model), before)


@METHOD
def test_before_any_good_batch_the_step_is_the_gradient(method: str) -> None:
    model = mlp()
    optimizer = kfac(model, max_failures=2, momentum=0.0, refresh_interval=1, **METHODS[method])
    learn(optimizer, model, randn(6, 4) * math.nan, randn(6, 3, seed=1))
    gradients = set_gradients(model)
    before = parameters(model)
    optimizer.step()
    assert optimizer.failures == (1 if method == "tridiagonal" else 2)  # one for every block
    assert optimizer.last_step is not None
    rate = optimizer.lr * float(optimizer.last_step.scale)
    for name, change in moved(before, model).items():
        torch.testing.assert_close(change, rate * gradients[name], rtol=1e-9, atol=1e-14)
    learn(optimizer, model, randn(6, 4) * math.nan, randn(6, 3, seed=1))
    with pytest.raises(FactorError, match="statistics of 2 batches in a row were NaN or Inf"):
        optimizer.step()


@METHOD
def test_a_good_batch_ends_the_count_of_bad_ones(method: str) -> None:
    model = mlp()
    optimizer = kfac(model, max_failures=2, refresh_interval=1, **METHODS[method])
    learn(optimizer, model, randn(6, 4), randn(6, 3, seed=1))
    for index in range(5):
        inputs = randn(6, 4, seed=index) * (math.nan if index % 2 else 1.0)
        learn(optimizer, model, inputs, randn(6, 3, seed=index))
        set_gradients(model)
        optimizer.step()
    assert optimizer.failures == 0
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("method", ["factored", "cholesky", "tridiagonal"])
@pytest.mark.parametrize(("inputs", "noise"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_a_factor_of_zeros_leaves_the_damping(method: str, inputs: float, noise: float) -> None:
    """pi would be 0, infinite or 0 / 0."""
    model = build(nn.Linear(4, 3, bias=False))
    optimizer = kfac(model, damping=0.2, **METHODS[method])
    learn(optimizer, model, inputs * randn(6, 4), noise * randn(6, 3, seed=1))
    gradients = set_gradients(model)
    optimizer.refresh()
    expected = gradients["0.weight"] / 0.2
    torch.testing.assert_close(optimizer.direction()["0.weight"], expected, rtol=1e-6, atol=0)


# --- other blocks ---------------------------------------------------------------------------------


class WithExtra(nn.Module):
    """A net with one parameter outside of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = build(
            nn.Conv2d(2, 4, 2, groups=2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3)
        )
        self.extra = nn.Parameter(torch.ones(3).double())

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.body(inputs) * self.extra
        return output


LIMITS = pytest.mark.parametrize("limit", [1024, 4], ids=["dense", "diagonal norm"])


@LIMITS
@pytest.mark.parametrize("method", ["kfac", "cholesky", "ekfac"])
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_vector_blocks_of_low_rank(limit: int, method: str, scale: float) -> None:
    model = WithExtra()
    settings = {"small_parameters": "dense", "dense_limit": limit, "damping": 0.3}
    optimizer = kfac(model, **settings, **METHODS[method])
    learn(optimizer, model, randn(2, 2, 3, 3), scale * randn(2, 3, seed=1))
    gradients = set_gradients(model)
    optimizer.refresh()
    step = optimizer.direction()
    for name in ("body.1", "small_parameters"):
        layer = optimizer.curvature.stats[name]
        moment = layer.moment.mean()  # type: ignore[union-attr]
        matrix = moment if moment.dim() == 2 else moment.diag()
        assert (moment.dim() == 1) == (limit == 4 and name == "body.1")
        vector = torch.cat([gradients[n].flatten() for n in layer.names])
        expected = torch.linalg.solve(shifted(matrix, 0.3), vector)
        found = torch.cat([step[n].flatten() for n in layer.names])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@LIMITS
@pytest.mark.parametrize("name", ["body.1", "small_parameters"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_damaged_vector_block_keeps_the_former_basis(limit: int, name: str, bad: float) -> None:
    model = WithExtra()
    settings = {"small_parameters": "dense", "dense_limit": limit}
    optimizer = kfac(model, **settings, refresh_interval=1, max_failures=2)
    learn(optimizer, model, randn(4, 2, 3, 3), randn(4, 3, seed=1))
    set_gradients(model)
    optimizer.step()
    step = optimizer.direction()
    layer = optimizer.curvature.stats[name]
    moment = layer.moment  # type: ignore[union-attr]
    assert moment.value is not None
    moment.value = torch.full_like(moment.value, bad)
    optimizer.step()
    assert same(optimizer.direction(), step)
    assert optimizer.failures == 1
    with pytest.raises(FactorError, match=f"'{name}'.*2 refreshes failed in a row"):
        optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_bad_batches_of_a_vector_block_are_counted() -> None:
    model = build(nn.LayerNorm(3))
    optimizer = kfac(model, refresh_interval=1, max_failures=2)
    for index in range(2):
        learn(optimizer, model, randn(6, 3), randn(6, 3, seed=1))
        learn(optimizer, model, randn(6, 3) * math.nan, randn(6, 3, seed=1))
        set_gradients(model, seed=index)
        optimizer.step()
    kept = parameters(model)
    learn(optimizer, model, randn(6, 3) * math.nan, randn(6, 3, seed=1))
    with pytest.raises(FactorError, match="statistics of 2 batches in a row were NaN or Inf"):
        optimizer.step()
    assert same(parameters(model), kept)


def test_groups_of_a_convolution_are_decomposed_together() -> None:
    """One group without any signal beside one with: both get their damped solve."""
    model = build(nn.Conv2d(2, 4, 1, groups=2, bias=False), nn.Flatten())
    optimizer = kfac(model, damping=0.1)
    inputs = randn(5, 2, 1, 1)
    inputs[:, 0] = 0
    learn(optimizer, model, inputs, randn(5, 4, seed=1))
    gradient = set_gradients(model)["0.weight"]
    optimizer.refresh()
    layer = block(optimizer, "0")
    step = optimizer.direction()["0.weight"]
    torch.testing.assert_close(step[:2], gradient[:2] / 0.1, rtol=1e-12, atol=1e-14)
    matrix = shifted(torch.kron(layer.g.mean()[1], layer.a.mean()[1]), 0.1)
    expected = torch.linalg.solve(matrix, gradient[2:].flatten())
    torch.testing.assert_close(step[2:].flatten(), expected, rtol=1e-9, atol=1e-12)
