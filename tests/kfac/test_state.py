"""Saving and restoring the optimizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from acktr.kfac import KFAC, KFACConfig, LMConfig
from tests.tools.kfac import block, build, observe, parameters, plain_config, randn, same, snapshot

SETTINGS = plain_config(refresh_interval=4, cold_steps=2, stat_decay=0.9, weight_decay=0.01)


def network(hidden: int = 5, seed: int = 0) -> nn.Sequential:
    model = build(
        nn.Conv2d(2, 3, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, hidden),
        nn.Linear(hidden, 2),
        seed=seed,
    )
    model.register_parameter("extra", nn.Parameter(torch.ones(2).double()))
    return model


def made(model: nn.Module, config: KFACConfig = SETTINGS) -> KFAC:
    return KFAC(model, config, known_fisher={"extra": 2.0})


def train(optimizer: KFAC, model: nn.Module, steps: range) -> None:
    for index in steps:
        optimizer.lr = 0.25 / (1 + index)
        output = observe(optimizer, model, randn(6, 2, 3, 3, seed=index), seed=index)
        optimizer.zero_grad()
        (output + model.extra).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("saved_at", [0, 1, 2, 4, 6, 7])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(saved_at: int) -> None:
    model = network()
    optimizer = made(model)
    train(optimizer, model, range(saved_at))
    state, weights = snapshot(optimizer), copy.deepcopy(model.state_dict())
    train(optimizer, model, range(saved_at, 12))

    resumed_model = network(seed=5)
    resumed_model.load_state_dict(weights)
    resumed = made(resumed_model)
    resumed.load_state_dict(state)
    assert same(snapshot(resumed), state)
    assert resumed.lr == state["groups"][0]["lr"]
    train(resumed, resumed_model, range(saved_at, 12))
    assert same(parameters(resumed_model), parameters(model))
    assert same(snapshot(resumed), snapshot(optimizer))


def test_the_stale_basis_matters_to_the_resumed_run() -> None:
    """The test above has power: a basis renewed at the wrong moment changes the run."""
    model = network()
    optimizer = made(model)
    train(optimizer, model, range(5))
    state, weights = snapshot(optimizer), copy.deepcopy(model.state_dict())
    train(optimizer, model, range(5, 6))
    resumed_model = network()
    resumed_model.load_state_dict(weights)
    resumed = made(resumed_model)
    resumed.load_state_dict(state)
    observe(resumed, resumed_model, randn(6, 2, 3, 3, seed=90))
    resumed.refresh()
    resumed.load_state_dict({**resumed.state_by_name(), "momentum": state["momentum"]})
    train(resumed, resumed_model, range(5, 6))
    assert not same(parameters(resumed_model), parameters(model))


def test_the_state_is_a_snapshot() -> None:
    """Training on must not change a state taken before, without a copy by the caller."""
    model = network()
    optimizer = made(model)
    train(optimizer, model, range(4))
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    train(optimizer, model, range(4, 6))
    assert same(state, kept)


def test_a_loaded_state_is_not_changed_by_training() -> None:
    model = network()
    optimizer = made(model)
    train(optimizer, model, range(4))
    state = snapshot(optimizer)
    kept = copy.deepcopy(state)
    optimizer.load_state_dict(state)
    train(optimizer, model, range(4, 6))
    assert same(state, kept)


def refused(optimizer: KFAC, state: dict[str, Any], match: str | None = None) -> None:
    """The state raises ValueError and leaves the optimizer exactly as it was."""
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state)
    assert same(snapshot(optimizer), before)


def trained(steps: int = 4) -> tuple[KFAC, dict[str, Any]]:
    model = network()
    optimizer = made(model)
    train(optimizer, model, range(steps))
    other_model = network(seed=3)
    other = made(other_model)
    train(other, other_model, range(steps + 1))
    return optimizer, snapshot(other)


def test_a_state_of_another_version_is_refused_in_one_line() -> None:
    optimizer, state = trained()
    refused(optimizer, changed(state, None, "curvature", "chain"), "lacks nothing and has chain")
    refused(optimizer, without(state, "curvature", "trust", "reach"), r"trust .*lacks reach")


def test_a_damping_beyond_the_limits_of_its_adaptation_is_refused() -> None:
    _, state = trained()
    optimizer = KFAC(
        network(), SETTINGS, known_fisher={"extra": 2.0}, adaptive=LMConfig(maximum=5.0)
    )
    refused(optimizer, changed(state, 7.0, "curvature", "damping"), "damping must be .*5")


def test_a_state_with_other_layers_is_refused() -> None:
    optimizer, _ = trained()
    other = build(nn.Linear(3, 2))
    refused(
        optimizer,
        snapshot(KFAC(other)),
        "layers does not fit: it lacks 3, 4 and has nothing",
    )


def test_a_state_with_other_sizes_and_no_momentum_is_refused_as_a_whole() -> None:
    """The first layer fits, the second does not: the first must not have been replaced."""
    optimizer, _ = trained()
    model = network(hidden=7)
    other = made(model)
    observe(other, model, randn(6, 2, 3, 3))
    refused(optimizer, snapshot(other), "does not fit")


def without(state: dict[str, Any], *path: str) -> dict[str, Any]:
    damaged = copy.deepcopy(state)
    place = damaged
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return damaged


def changed(state: dict[str, Any], value: Any, *path: str) -> dict[str, Any]:
    damaged = copy.deepcopy(state)
    place = damaged
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return damaged


@pytest.mark.parametrize(
    "path",
    [
        ("groups",),
        ("curvature",),
        ("curvature", "turn"),
        ("curvature", "layers", "4"),
        ("curvature", "layers", "4", "g_weight"),
    ],
    ids=".".join,
)
def test_a_state_with_a_missing_entry_is_refused_as_a_whole(path: tuple[str, ...]) -> None:
    optimizer, state = trained()
    refused(optimizer, without(state, *path))


def eye(size: int) -> torch.Tensor:
    return torch.eye(size).double()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("groups",), "fast"),
        (("groups",), []),
        (("groups",), [{"lr": "fast", "momentum": 0.9, "weight_decay": 0.0}]),
        (("groups",), [{"lr": 0.1, "momentum": 1.0, "weight_decay": 0.0}]),
        (("groups",), [{"lr": 0.1}]),
        (("steps",), "many"),
        (("momentum",), "fast"),
        (("curvature", "damping"), 0.0),
        (("curvature", "generator"), torch.zeros(3, dtype=torch.uint8)),
        (("curvature", "pending"), {"due": 3, "names": [], "places": [], "matrices": []}),
        (
            ("curvature", "layers", "4", "basis"),
            [torch.ones(3), eye(3), torch.ones(2), eye(2)],
        ),
        (("curvature", "layers", "4", "basis"), [torch.ones(6).double(), eye(6)]),
        (("curvature", "layers", "4", "a"), "matrix"),
        (("curvature", "layers", "4", "a_weight"), torch.ones(3).double()),
        (("curvature", "layers", "4", "failures"), "none"),
        (("momentum", "extra"), None),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else type(value).__name__,
)
def test_a_state_with_a_bad_entry_is_refused_as_a_whole(path: tuple[str, ...], value: Any) -> None:
    optimizer, state = trained()
    refused(optimizer, changed(state, value, *path))


def test_a_fresh_state_clears_a_trained_optimizer() -> None:
    optimizer, _ = trained()
    empty = snapshot(made(network()))
    optimizer.load_state_dict(empty)
    assert optimizer.steps == 0
    assert not block(optimizer, "4").history.ready
    assert same(snapshot(optimizer), empty)


def test_reading_the_state_changes_nothing() -> None:
    model = network()
    optimizer = made(model)
    train(optimizer, model, range(3))
    before = snapshot(optimizer)
    optimizer.state_dict()
    assert same(snapshot(optimizer), before)


def test_a_state_of_a_gpu_is_loaded_with_ones_own_generator() -> None:
    """That of CUDA has 16 bytes."""
    optimizer, state = trained()
    fresh = made(network(seed=3))
    own = snapshot(fresh)["curvature"]["generator"]
    foreign = changed(state, torch.zeros(16, dtype=torch.uint8), "curvature", "generator")
    fresh.load_state_dict(foreign)
    found = snapshot(fresh)
    assert torch.equal(found["curvature"]["generator"], own)
    assert same(
        changed(found, 0, "curvature", "generator"), changed(state, 0, "curvature", "generator")
    )
    refused(optimizer, changed(state, torch.zeros(17, dtype=torch.uint8), "curvature", "generator"))
