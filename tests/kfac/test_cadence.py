"""Refreshes, host synchronisation and the cold start."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from acktr.kfac import GaussianLoss
from tests.tools.kfac import (
    HostSyncError,
    NoHostSync,
    block,
    build,
    counted_eigh,
    factors,
    kfac,
    mlp,
    moved,
    observe,
    parameters,
    randn,
    set_gradients,
)

# --- refreshes ------------------------------------------------------------------------------------


def test_refresh_cadence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = kfac(model, refresh_interval=3, cold_steps=3)
    calls = []
    for index in range(9):
        observe(optimizer, model, randn(6, 4, seed=index))
        set_gradients(model, seed=index)
        due = optimizer.needs_refresh
        with counted_eigh(monkeypatch) as sizes:
            optimizer.step()
        calls.append(len(sizes))
        assert due == bool(sizes)
        if sizes:
            assert sorted(sizes) == [3, 5, 5, 6]
    assert calls == [0, 0, 0, 4, 0, 0, 4, 0, 0]
    assert optimizer.steps == 9


def test_factors_are_renewed_at_an_interval_and_at_every_cold_step() -> None:
    model = mlp()
    optimizer = kfac(model, refresh_interval=5, cold_steps=3, stat_interval=3)
    folded = []
    for index in range(10):
        kept = [] if index == 0 else factors(optimizer, "0")
        due = optimizer.observing
        observe(optimizer, model, randn(6, 4, seed=index))
        same = all(map(torch.equal, kept, factors(optimizer, "0")))
        assert same != due or index == 0
        folded += [index] * due
        assert optimizer.curvature.batches == len(folded)
        set_gradients(model, seed=index)
        optimizer.step()
    assert folded == [0, 1, 2, 3, 6, 9]


def test_a_batch_that_is_passed_over_still_gives_the_exact_fisher_of_the_step() -> None:
    model = mlp()
    optimizer = kfac(model, stat_interval=3, quadratic="exact")
    for index in range(3):
        inputs = randn(6, 4, seed=index)
        with optimizer.capture() as captured:
            output = model(inputs)
        optimizer.observe(captured, output, GaussianLoss())
        seen = optimizer.curvature.observed
        assert seen is not None and torch.equal(seen.inputs.args[0], inputs)
        set_gradients(model, seed=index)
        optimizer.step()


def test_between_refreshes_the_old_basis_is_used() -> None:
    model = mlp()
    optimizer = kfac(model, refresh_interval=5)
    observe(optimizer, model, randn(6, 4))
    set_gradients(model)
    optimizer.step()
    kept = block(optimizer, "0").inverse.a
    observe(optimizer, model, 10 * randn(6, 4, seed=1))
    optimizer.step()
    assert block(optimizer, "0").inverse.a is kept
    optimizer.refresh()
    assert block(optimizer, "0").inverse.a is not kept


@pytest.mark.parametrize("structure", ["kfac", "kfac_factored", "cholesky", "ekfac"])
def test_no_host_synchronisation_between_refreshes(structure: str) -> None:
    model = build(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 3)
    )
    model.register_parameter("extra", nn.Parameter(torch.ones(3).double()))
    optimizer = kfac(
        model,
        structure=structure,
        refresh_interval=100,
        cold_steps=1,
        weight_decay=0.1,
        known_fisher={"extra": 2.0},
    )

    def update() -> None:
        with optimizer.capture() as captured:
            output = model(randn(6, 2, 4, 4)) + model.extra
        optimizer.update_curvature(captured, (randn(6, 3, seed=1) * output).sum())
        optimizer.zero_grad()
        output.square().mean().backward()
        optimizer.step()

    with NoHostSync():
        update()  # cold
    with pytest.raises(HostSyncError), NoHostSync():
        update()  # refresh: the guard sees the checks of the eigendecomposition
    update()
    with NoHostSync():
        update()
    assert optimizer.steps == 3


# --- cold start -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_cold_steps_are_clipped_sgd_with_momentum(scale: float) -> None:
    model = mlp()
    optimizer = kfac(model, cold_steps=4, cold_lr=0.02, cold_max_grad_norm=0.3, momentum=0.8)
    expected = parameters(model)
    velocity = {name: torch.zeros_like(p) for name, p in expected.items()}
    for index in range(4):
        observe(optimizer, model, randn(6, 4, seed=index))
        gradients = set_gradients(model, seed=index, scale=scale)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        clip = min(1.0, 0.3 / (norm + 1e-6))
        assert (clip < 1) == (scale > 1)
        for name, gradient in gradients.items():
            velocity[name] = 0.8 * velocity[name] + clip * gradient
            expected[name] = expected[name] - 0.02 * velocity[name]
        optimizer.step()
        for name, parameter in parameters(model).items():
            torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-12)
        assert not block(optimizer, "0").history.ready
    weight = block(optimizer, "0").a.weight
    assert weight is not None
    assert float(weight) == pytest.approx(1 - 0.99**4)


def test_momentum_is_cleared_after_the_cold_steps() -> None:
    model = mlp()
    optimizer = kfac(model, cold_steps=2, cold_lr=1.0, momentum=0.9)
    for index in range(2):
        observe(optimizer, model, randn(6, 4, seed=index))
        set_gradients(model, seed=index)
        optimizer.step()
    optimizer.refresh()
    set_gradients(model, seed=2)
    step = optimizer.direction()
    before = parameters(model)
    optimizer.step()
    assert optimizer.last_step is not None
    rate = optimizer.lr * (1 - 0.9) * float(optimizer.last_step.scale)
    for name, change in moved(before, model).items():
        torch.testing.assert_close(change, rate * step[name], rtol=1e-9, atol=1e-14)


def test_a_cold_step_with_a_gradient_that_is_not_finite_moves_nothing() -> None:
    model = mlp()
    optimizer = kfac(model, cold_steps=2)
    set_gradients(model)
    model[0].weight.grad[1, 2] = math.nan
    before = parameters(model)
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in parameters(model).items())


def test_an_eager_start_folds_and_decomposes_often_at_first() -> None:
    model = build(nn.Linear(3, 2))
    settings = {"stat_interval": 4, "refresh_interval": 6, "stat_decay": 0.5}
    seen = {}
    for eager in (True, False):
        optimizer = kfac(model, eager_start=eager, **settings)
        turns = []
        for _ in range(13):
            turns.append((optimizer.observing, optimizer.needs_refresh))
            observe(optimizer, model, randn(4, 3))
            set_gradients(model, seed=len(turns))
            optimizer.step()
        seen[eager] = [[turn for turn, pair in enumerate(turns) if pair[i]] for i in (0, 1)]
    assert seen[False] == [[0, 4, 8, 12], [0, 6, 12]]
    assert seen[True] == [[0, 1, 2, 3, 4, 5, 8, 12], [0, 1, 2, 4, 6, 12]]
