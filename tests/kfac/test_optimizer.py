"""The optimizer: trust region, momentum, schedules and weight decay."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from acktr.kfac import GaussianLoss
from tests.tools.kfac import (
    build,
    kfac,
    mlp,
    moved,
    observe,
    observe_gaussian,
    observe_softmax,
    parameters,
    randn,
    set_gradients,
)


def fisher_quadratic(
    model: nn.Module, inputs: Tensor, output_fisher: Callable[[Tensor], Tensor]
) -> Callable[[dict[str, Tensor]], Tensor]:
    """U -> 1/N sum_n (J_n U)^T H_n (J_n U)."""

    def quadratic(step: dict[str, Tensor]) -> Tensor:
        here = parameters(model)
        tangents = {name: step.get(name, torch.zeros_like(p)) for name, p in here.items()}
        output, change = jvp(lambda p: functional_call(model, p, (inputs,)), (here,), (tangents,))
        return torch.einsum("nd,nde,ne->", change, output_fisher(output), change) / len(inputs)

    return quadratic


def identity_fisher(output: Tensor) -> Tensor:
    return torch.eye(output.shape[-1]).double().expand(len(output), -1, -1)


# --- trust region on real steps -------------------------------------------------------------------


@pytest.mark.parametrize("clip", [1e-8, 1e-3, 1e6])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_every_step_meets_the_radius(clip: float, scale: float) -> None:
    model = mlp()
    optimizer = kfac(model, kl_clip=clip)
    for index in range(3):
        observe(optimizer, model, randn(6, 4, seed=index))
        gradients = set_gradients(model, seed=index, scale=scale)
        optimizer.step()
        info = optimizer.last_step
        assert info is not None
        step = optimizer.direction()  # the basis has not changed since
        q = sum(float((gradients[n] * step[n]).sum()) for n in step)
        assert float(info.quadratic) == pytest.approx(q, rel=1e-9)
        nu = float(info.scale)
        length = optimizer.lr**2 * nu**2 * q
        assert nu == pytest.approx(min(1.0, math.sqrt(clip / (optimizer.lr**2 * q))), rel=1e-9)
        assert length <= clip * (1 + 1e-12)
        if nu < 1:
            assert length == pytest.approx(clip, rel=1e-9)
        assert float(info.predicted_kl) == pytest.approx(length / 2, rel=1e-9)


def categorical_kl(old: Tensor, new: Tensor) -> float:
    old_log, new_log = old.log_softmax(-1), new.log_softmax(-1)
    return float((old_log.exp() * (old_log - new_log)).sum(-1).mean())


@pytest.mark.parametrize("quadratic", ["kronecker", "exact"])
def test_the_kl_of_a_softmax_step_is_half_the_clip(quadratic: Any) -> None:
    model = build(nn.Linear(4, 3))
    inputs = randn(1, 4)
    clip = 1e-8
    optimizer = kfac(model, kl_clip=clip, damping=1e-9, momentum=0.0, lr=1.0, quadratic=quadratic)
    observe_softmax(optimizer, model, inputs)
    old = model(inputs)
    (-2.0 * old.log_softmax(-1)[0, 1]).backward()

    def softmax(output: Tensor) -> Tensor:
        p = output.softmax(-1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]

    form = fisher_quadratic(model, inputs, softmax)
    optimizer.step(fisher_quadratic=form if quadratic == "exact" else None)
    assert categorical_kl(old.detach(), model(inputs).detach()) == pytest.approx(clip / 2, rel=1e-3)


@pytest.mark.parametrize("quadratic", ["kronecker", "exact"])
def test_the_kl_of_a_gaussian_step_is_half_the_clip(quadratic: Any) -> None:
    model = build(nn.Linear(4, 3))
    inputs = randn(12, 4)
    optimizer = kfac(model, kl_clip=0.04, damping=1e-9, momentum=0.0, lr=9.0, quadratic=quadratic)
    observe_gaussian(optimizer, model, inputs)
    old = model(inputs)
    (5 * (old - randn(12, 3, seed=2)).square()).sum().backward()
    form = fisher_quadratic(model, inputs, identity_fisher)
    optimizer.step(fisher_quadratic=form if quadratic == "exact" else None)
    kl = float((model(inputs) - old).detach().square().sum(1).mean() / 2)
    assert kl == pytest.approx(0.02, rel=1e-6)  # the KL is exactly quadratic


def test_the_exact_quadratic_meets_the_kl_where_the_blocks_are_not_exact() -> None:
    errors = {}
    for quadratic in ("kronecker", "exact"):
        model = mlp()
        inputs = randn(12, 4)
        optimizer = kfac(model, kl_clip=1e-8, damping=0.1, momentum=0.0, quadratic=quadratic)
        observe_gaussian(optimizer, model, inputs)
        old = model(inputs)
        (old - randn(12, 3, seed=2)).square().sum().backward()
        form = fisher_quadratic(model, inputs, identity_fisher)
        optimizer.step(fisher_quadratic=form if quadratic == "exact" else None)
        kl = float((model(inputs) - old).detach().square().sum(1).mean() / 2)
        errors[quadratic] = abs(kl / 0.5e-8 - 1)
    assert errors["exact"] < 1e-3
    assert errors["kronecker"] > 0.05


def test_exact_quadratic_needs_the_function() -> None:
    model = mlp()
    optimizer = kfac(model, quadratic="exact")
    set_gradients(model)
    before = parameters(model)
    with pytest.raises(ValueError, match="fisher_quadratic"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in parameters(model).items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(bad: float) -> None:
    model = mlp()
    optimizer = kfac(model)
    observe(optimizer, model, randn(6, 4))
    set_gradients(model)
    model[0].weight.grad[1, 2] = bad
    before = parameters(model)
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in parameters(model).items())
    set_gradients(model)
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in parameters(model).values())
    assert not torch.equal(parameters(model)["0.weight"], before["0.weight"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("quadratic", ["corrected", "kronecker", "exact"])
@pytest.mark.parametrize("cold", [0, 9])
def test_nor_does_the_momentum_move_anything_then(bad: float, quadratic: Any, cold: int) -> None:
    model = mlp()
    optimizer = kfac(model, quadratic=quadratic, momentum=0.9, cold_steps=cold)

    def step(index: int) -> None:
        with optimizer.capture() as captured:
            output = model(randn(6, 4, seed=index))
        optimizer.observe(captured, output, GaussianLoss())
        set_gradients(model, seed=index)
        if index == 3:
            model[0].weight.grad[1, 2] = bad
        optimizer.step()

    for index in range(5):
        before = parameters(model)
        step(index)
        still = [torch.equal(p, before[n]) for n, p in parameters(model).items()]
        assert all(still) if index == 3 else not any(still)
        assert optimizer.last_step is not None
        assert float(optimizer.last_step.predicted_kl) == 0 or index != 3


def test_a_zero_gradient_moves_nothing() -> None:
    model = mlp()
    optimizer = kfac(model)
    observe(optimizer, model, randn(6, 4))
    set_gradients(model, scale=0.0)
    before = parameters(model)
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in parameters(model).items())
    assert optimizer.last_step is not None
    assert float(optimizer.last_step.scale) == 1.0


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_is_that_of_torch(to_none: bool) -> None:
    model = mlp()
    optimizer = kfac(model)
    set_gradients(model)
    optimizer.zero_grad(set_to_none=to_none)
    for parameter in model.parameters():
        assert parameter.grad is None if to_none else not parameter.grad.any()


# --- step, momentum, schedules --------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("clip", [1e-3, 1e9])
def test_the_scheduled_rate_reaches_the_step_and_the_trust_region(
    clip: float, momentum: float
) -> None:
    model = mlp()
    optimizer = kfac(model, lr=0.5, kl_clip=clip, momentum=momentum)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0 / (1 + n))
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for index in range(4):
        lr = 0.5 / (1 + index)
        assert optimizer.lr == pytest.approx(lr)
        observe(optimizer, model, randn(6, 4, seed=index))
        if index == 0:
            optimizer.refresh()
        gradients = set_gradients(model, seed=index)
        step = optimizer.direction()
        q = sum(float((gradients[n] * step[n]).sum()) for n in step)
        nu = min(1.0, math.sqrt(clip / (lr**2 * q)))
        before = parameters(model)
        optimizer.step()
        for name, change in moved(before, model).items():
            velocity[name] = momentum * velocity[name] + nu * step[name]
            expected = lr * (1 - momentum) * velocity[name]
            torch.testing.assert_close(change, expected, rtol=1e-9, atol=1e-14)
        schedule.step()


def test_setting_the_rate() -> None:
    optimizer = kfac(mlp())
    optimizer.param_groups[0]["lr"] = 0.125
    assert optimizer.lr == 0.125
    optimizer.lr = 0.5
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_weight_decay_enters_gradient_and_quadratic_form() -> None:
    model = mlp()
    optimizer = kfac(model, weight_decay=0.2, kl_clip=1e9, momentum=0.0)
    observe(optimizer, model, randn(6, 4))
    optimizer.refresh()
    gradients = set_gradients(model)
    before = parameters(model)
    step = optimizer.direction()
    optimizer.step()
    full = {n: g + 0.2 * before[n] if n.endswith("weight") else g for n, g in gradients.items()}
    assert optimizer.last_step is not None
    q = sum(float((full[n] * step[n]).sum()) for n in step)
    assert float(optimizer.last_step.quadratic) == pytest.approx(q, rel=1e-9)


def test_the_closure_is_called_with_gradients_enabled() -> None:
    model = mlp()
    optimizer = kfac(model)
    inputs = randn(6, 4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    before = model(inputs).square().mean().item()
    loss = optimizer.step(closure)
    assert loss is not None
    assert loss.item() == pytest.approx(before)
    assert model(inputs).square().mean().item() < before


def test_natural_gradient_descends_where_the_scale_of_the_inputs_defeats_sgd() -> None:
    inputs = randn(64, 3) * torch.tensor([1e-2, 1.0, 1e2]).double()
    targets = inputs @ randn(3, 2, seed=5)
    model = build(nn.Linear(3, 2))
    optimizer = kfac(model, lr=1.0, kl_clip=1e6, damping=1e-10, momentum=0.0)
    observe_gaussian(optimizer, model, inputs)
    ((model(inputs) - targets).square().sum(1).mean() / 2).backward()
    optimizer.step()  # one Newton step on a quadratic
    assert float((model(inputs) - targets).detach().abs().max()) < 1e-3
