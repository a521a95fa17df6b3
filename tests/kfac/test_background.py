"""Refreshes in a background thread."""

from __future__ import annotations

import copy
import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import KFAC, FactorError, GaussianLoss
from acktr.kfac.blocks import refresh
from acktr.kfac.blocks.kronecker import Corrected
from acktr.kfac.blocks.vectors import VectorBlock
from tests.tools.kfac import (
    block,
    build,
    mlp,
    observe,
    parameters,
    plain_config,
    randn,
    same,
    set_gradients,
    snapshot,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "kfac": {},
    "ekfac": {"structure": "ekfac"},
    "cholesky": {"structure": "cholesky"},
    "tridiagonal": {"structure": "tridiagonal"},
}


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kfac-refresh"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    assert not threads()
    yield
    limit = time.monotonic() + 20
    while threads() and time.monotonic() < limit:
        time.sleep(0.005)
    assert not threads()


class Gate:
    """Holds every decomposition, and counts them, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.entered = threading.Event()
        self.error: BaseException | None = None
        self.count = 0
        real = refresh.decompose

        def decompose(requests: Any) -> Any:
            self.count += 1
            self.entered.set()
            assert self.opened.wait(20)
            if self.error is not None:
                raise self.error
            return real(requests)

        monkeypatch.setattr(refresh, "decompose", decompose)


def net(seed: int = 0) -> nn.Sequential:
    return build(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3), seed=seed)


def advance(optimizer: KFAC, model: nn.Module, index: int) -> None:
    inputs = randn(6, 4, seed=index)
    with optimizer.capture() as captured:
        output = model(inputs)
    optimizer.observe(captured, output, GaussianLoss())
    optimizer.zero_grad()
    GaussianLoss()(output, randn(6, 3, seed=50 + index)).backward()
    optimizer.step()


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_delay_zero_is_the_inline_refresh_bit_for_bit(settings: dict[str, Any]) -> None:
    results = []
    for delay in (None, 0):
        model = net()
        config = plain_config(refresh_interval=2, refresh_delay=delay, **settings)
        optimizer = KFAC(model, config)
        for index in range(9):
            advance(optimizer, model, index)
            assert not threads()
        results.append((parameters(model), snapshot(optimizer)))
    assert same(results[0], results[1])


def inverses(optimizer: KFAC) -> dict[str, Any]:
    """Copies of the installed decompositions."""
    return {
        name: copy.deepcopy(layer.spectrum if isinstance(layer, VectorBlock) else layer.inverse)
        for name, layer in optimizer.curvature.stats.items()
    }


def install(optimizer: KFAC, found: dict[str, Any]) -> None:
    for name, layer in optimizer.curvature.stats.items():
        if isinstance(found[name], Corrected):  # the scales are the optimizer's own
            layer.install([tuple(found[name].basis.a), tuple(found[name].basis.g)])
            continue
        setattr(layer, "spectrum" if isinstance(layer, VectorBlock) else "inverse", found[name])


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize(("delay", "interval"), [(1, 3), (2, 3), (3, 3), (1, 1)])
def test_results_are_installed_that_many_steps_later(
    settings: dict[str, Any], delay: int, interval: int
) -> None:
    """The reference refreshes a copy inline and takes its results over ``delay`` steps later."""
    settings = {**settings, "quadratic": "kronecker"}  # measurements know when refreshes are due
    model, other = net(), net()
    late = KFAC(model, plain_config(refresh_interval=interval, refresh_delay=delay, **settings))
    config = plain_config(refresh_interval=1000, **settings)
    reference, shadow = KFAC(other, config), KFAC(net(), config)
    waiting: tuple[int, dict[str, Any]] | None = None
    for index in range(11):
        for optimizer, network in ((late, model), (reference, other)):
            inputs = randn(6, 4, seed=index)
            with optimizer.capture() as captured:
                output = network(inputs)
            optimizer.observe(captured, output, GaussianLoss())
            optimizer.zero_grad()
            GaussianLoss()(output, randn(6, 3, seed=50 + index)).backward()
        due = index > 0 and index % interval == 0
        if waiting is not None and (index >= waiting[0] or due):  # a new one waits for the old
            install(reference, waiting[1])
            waiting = None
        if due:
            shadow.load_state_dict(snapshot(reference))
            shadow.refresh()
            waiting = (index + delay, inverses(shadow))
        late.step()
        reference.step()
        assert same(parameters(model), parameters(other)), index
    late.close()


def test_the_step_does_not_wait_for_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = KFAC(model, plain_config(refresh_interval=4, refresh_delay=3))
    for index in range(4):
        advance(optimizer, model, index)
    gate = Gate(monkeypatch)
    kept = block(optimizer, "0").inverse.a
    for index in range(4, 7):
        before = parameters(model)
        advance(optimizer, model, index)  # returns although the job cannot
        assert gate.entered.wait(20)
        assert len(threads()) == 1
        assert block(optimizer, "0").inverse.a is kept
        assert not same(parameters(model), before)
    gate.opened.set()
    advance(optimizer, model, 7)
    assert gate.count == 1
    assert block(optimizer, "0").inverse.a is not kept
    assert not threads()


def test_the_first_refresh_is_waited_for() -> None:
    model = mlp()
    optimizer = KFAC(model, plain_config(refresh_delay=5))
    observe(optimizer, model, randn(6, 4))
    set_gradients(model)
    optimizer.step()
    assert block(optimizer, "0").history.ready
    assert not threads()


def test_an_error_of_the_job_surfaces_at_the_due_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = KFAC(model, plain_config(refresh_interval=4, refresh_delay=2))
    for index in range(4):
        advance(optimizer, model, index)
    with monkeypatch.context() as patch:
        gate = Gate(patch)
        gate.error = MemoryError("no room for the factor")
        gate.opened.set()
        advance(optimizer, model, 4)
        advance(optimizer, model, 5)
        before, kept = parameters(model), block(optimizer, "0").inverse.a
        with pytest.raises(
            FactorError, match="background refresh failed: MemoryError: no room"
        ) as e:
            advance(optimizer, model, 6)
    assert e.value.__cause__ is gate.error
    assert "\n" not in str(e.value)
    assert not threads()
    assert same(parameters(model), before)
    assert block(optimizer, "0").inverse.a is kept
    for index in range(6, 12):
        advance(optimizer, model, index)
    assert block(optimizer, "0").inverse.a is not kept
    optimizer.close()


def test_an_explicit_refresh_takes_a_running_one_in_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = KFAC(model, plain_config(refresh_interval=4, refresh_delay=3))
    for index in range(4):
        advance(optimizer, model, index)
    gate = Gate(monkeypatch)
    gate.opened.set()
    advance(optimizer, model, 4)
    advance(optimizer, model, 5)
    optimizer.refresh()
    newest = block(optimizer, "0").inverse.a
    assert gate.count == 2
    assert not threads()
    for index in (6, 7):
        advance(optimizer, model, index)
        assert block(optimizer, "0").inverse.a is newest  # the older result never comes after


@pytest.mark.parametrize("how", ["close", "load", "delete"])
def test_no_thread_outlives_its_work(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = KFAC(model, plain_config(refresh_interval=4, refresh_delay=3))
    for index in range(4):
        advance(optimizer, model, index)
    state = snapshot(optimizer)
    gate = Gate(monkeypatch)
    advance(optimizer, model, 4)
    assert gate.entered.wait(20)
    kept = block(optimizer, "0").inverse.a
    if how == "delete":
        del optimizer
        gc.collect()
        assert len(threads()) == 1  # nothing waits for it
        gate.opened.set()
        return
    threading.Timer(0.05, gate.opened.set).start()
    if how == "close":
        optimizer.close()
        optimizer.close()
        assert not threads()
        advance(optimizer, model, 5)
        advance(optimizer, model, 6)
        advance(optimizer, model, 7)
        assert block(optimizer, "0").inverse.a is kept  # the result was dropped
        advance(optimizer, model, 8)
        optimizer.close()
    else:
        optimizer.load_state_dict(state)
    assert not threads()


class Failure:
    """eigh that fails while ``on``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on = False
        real = torch.linalg.eigh

        def eigh(matrix: Tensor) -> Any:
            if self.on:
                raise torch.linalg.LinAlgError("injected")
            return real(matrix)

        monkeypatch.setattr(torch.linalg, "eigh", eigh)


@pytest.mark.parametrize("delay", [None, 0, 1])
def test_failures_are_counted_as_inline(delay: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    config = plain_config(refresh_interval=2, refresh_delay=delay, max_failures=3)
    optimizer = KFAC(model, config)
    failure = Failure(monkeypatch)
    late = delay or 0

    def steps(count: int) -> None:
        for index in range(count):
            advance(optimizer, model, index)

    steps(2)
    kept = block(optimizer, "0").inverse.a
    failure.on = True
    steps(4)
    assert optimizer.failures == 4  # two layers, two refreshes
    assert block(optimizer, "0").history.failures == 2
    assert block(optimizer, "0").inverse.a is kept
    failure.on = False
    steps(2)
    assert block(optimizer, "0").history.failures == 0
    failure.on = True
    steps(4 + late)
    with pytest.raises(FactorError, match="3 refreshes failed in a row"):
        steps(1)
    assert optimizer.failures == 9  # the error of the first layer comes first
    optimizer.close()


@pytest.mark.parametrize("delay", [1, 4])
def test_stale_decompositions_still_descend(delay: int) -> None:
    inputs = randn(40, 4)
    targets = (inputs @ randn(4, 3, seed=5)).tanh()
    reached = []
    for chosen in (None, delay):
        model = mlp()
        config = plain_config(
            lr=1.0,
            kl_clip=0.05,
            damping=1e-2,
            refresh_interval=5,
            refresh_delay=chosen,
            quadratic="kronecker",
        )
        optimizer = KFAC(model, config)
        for _ in range(40):
            with optimizer.capture() as captured:
                output = model(inputs)
            optimizer.observe(captured, output, GaussianLoss())
            optimizer.zero_grad()
            loss = GaussianLoss()(output, targets)
            loss.backward()
            optimizer.step()
        optimizer.close()
        reached.append(float(GaussianLoss()(model(inputs), targets)))
    inline, late = reached
    assert inline < 0.05 * float(GaussianLoss()(mlp()(inputs), targets))
    assert late != inline
    assert late < 1.5 * inline
