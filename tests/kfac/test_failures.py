"""Failed eigendecompositions and statistics that are not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import KFAC, FactorError, GaussianLoss
from tests.tools.kfac import (
    EXACT,
    block,
    build,
    kfac,
    mlp,
    moved,
    observe,
    parameters,
    plain_config,
    randn,
    set_gradients,
)


class Failure:
    """Replaces eigh by one that fails while ``on``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
        self.on = False
        real = torch.linalg.eigh

        def eigh(matrix: Tensor) -> Any:
            if self.on and mode == "raise":
                raise torch.linalg.LinAlgError("injected")
            values, vectors = real(matrix)
            return (values, vectors * math.nan) if self.on else (values, vectors)

        monkeypatch.setattr(torch.linalg, "eigh", eigh)


@pytest.mark.parametrize("mode", ["raise", "nan"])
def test_a_failed_refresh_keeps_the_basis_and_the_step_proceeds(
    monkeypatch: pytest.MonkeyPatch, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = mlp()
    optimizer = kfac(model, refresh_interval=1, momentum=0.0, max_failures=3)
    failure = Failure(monkeypatch, mode)
    observe(optimizer, model, randn(6, 4))
    set_gradients(model)
    optimizer.step()
    basis = block(optimizer, "0").inverse.a
    assert optimizer.failures == 0

    failure.on = True
    observe(optimizer, model, 5 * randn(6, 4, seed=1))
    set_gradients(model, seed=1)
    step = optimizer.direction()  # with the old basis
    before = parameters(model)
    optimizer.step()
    assert block(optimizer, "0").inverse.a is basis
    assert optimizer.failures == 2  # one per layer
    assert "'0'" in caplog.text
    assert "former decomposition" in caplog.text
    assert optimizer.last_step is not None
    rate = optimizer.lr * float(optimizer.last_step.scale)
    for name, change in moved(before, model).items():
        assert step[name].abs().max() > 0
        torch.testing.assert_close(change, rate * step[name], rtol=1e-9, atol=1e-14)


def test_failures_in_a_row_raise_and_a_success_starts_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = mlp()
    optimizer = kfac(model, refresh_interval=1, max_failures=3)
    failure = Failure(monkeypatch, "raise")

    def step() -> None:
        observe(optimizer, model, randn(6, 4))
        set_gradients(model)
        optimizer.step()

    step()
    for _ in range(2):
        failure.on = True
        step()
        step()
        failure.on = False
        step()
    assert optimizer.failures == 8
    failure.on = True
    step()
    step()
    before = parameters(model)
    with pytest.raises(FactorError, match=r"layer '0'.*3 refreshes failed in a row"):
        step()
    assert all(torch.equal(p, before[n]) for n, p in parameters(model).items())


def test_one_batch_of_nan_statistics_is_ignored() -> None:
    model, clean_model = mlp(), mlp()
    optimizer, clean = kfac(model, refresh_interval=1), kfac(clean_model, refresh_interval=1)
    for index in range(3):
        for opt, net in ((optimizer, model), (clean, clean_model)):
            observe(opt, net, randn(6, 4, seed=index))
        with optimizer.capture() as captured:
            output = model(randn(6, 4) * math.nan)
        optimizer.update_curvature(captured, output.sum())
        for opt, net in ((optimizer, model), (clean, clean_model)):
            set_gradients(net, seed=index)
            opt.step()
    for name, parameter in parameters(model).items():
        torch.testing.assert_close(parameter, parameters(clean_model)[name], **EXACT)
    assert optimizer.failures == 0


@pytest.mark.parametrize("quadratic", ["corrected", "kronecker", "exact"])
def test_gradients_that_stay_nan_are_an_error(quadratic: Any) -> None:
    """Steps are skipped, which nobody sees: the statistics of sampled targets are finite."""
    module = build(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = KFAC(module, plain_config(quadratic=quadratic, refresh_interval=5, max_failures=4))
    loss, inputs, target = GaussianLoss(), randn(6, 3), randn(6, 2)

    def step(label: Tensor) -> None:
        with optimizer.capture() as captured:
            output = module(inputs)
        optimizer.observe(captured, output, loss)
        optimizer.zero_grad()
        loss(output, label).backward()
        optimizer.step()

    for number in range(11):
        step(target * math.nan if number % 4 else target)
    for _ in range(4):
        step(target * math.nan)
    before = parameters(module)
    with pytest.raises(FactorError, match="steps in a row were skipped"):
        step(target)
    assert all(bool((change == 0).all()) for change in moved(before, module).values())
