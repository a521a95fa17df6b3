"""The preconditioner in front of torch's own optimizers."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import KFAC, CategoricalLoss, Exact, GaussianLoss, Preconditioner
from tests.tools.kfac import (
    EXACT,
    build,
    mlp,
    parameters,
    plain_config,
    randn,
    same,
    seeded,
    set_gradients,
)

LOSS = GaussianLoss()


def convolutional(seed: int = 0) -> nn.Sequential:
    return build(
        nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.LayerNorm(4), seed=seed
    )


def batch(model: nn.Module, index: int) -> tuple[Tensor, Tensor]:
    shape = (6, 2, 3, 3) if isinstance(model[0], nn.Conv2d) else (6, 4)  # type: ignore[index]
    inputs = randn(*shape, seed=index)
    with torch.no_grad():
        width = model(inputs).shape[-1]
    return inputs, randn(6, width, seed=100 + index)


def backward(curvature: Preconditioner | KFAC, model: nn.Module, index: int) -> None:
    inputs, targets = batch(model, index)
    with curvature.capture() as captured:
        output = model(inputs)
    curvature.observe(captured, output, LOSS)
    model.zero_grad()
    LOSS(output, targets).backward()


CASES = [
    {},
    {"kl_clip": None},
    {"kl_clip": 1e-5},
    {"quadratic": "exact", "kl_clip": 1e-4},
    {"weight_decay": 0.3},
    {"structure": "ekfac"},
    {"structure": "cholesky"},
    {"refresh_delay": 2},
]


@pytest.mark.filterwarnings("ignore:the schedule of lr")
@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize("make", [mlp, convolutional])
def test_in_front_of_sgd_it_is_the_optimizer_without_momentum(
    settings: dict[str, Any], make: Any
) -> None:
    config = plain_config(lr=0.2, momentum=0.0, refresh_interval=3, **settings)
    model, other = make(), make()
    curvature = Preconditioner(other, config, seed=5)
    sgd = torch.optim.SGD(other.parameters(), lr=0.2)
    optimizer = KFAC(model, config, seed=5)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (optimizer, sgd)]
    start = parameters(model)
    for index in range(7):
        backward(optimizer, model, index)
        optimizer.step()
        backward(curvature, other, index)
        # In a measured region a schedule takes its part of the step for the full step size.
        full = config.quadratic == "corrected"
        info = curvature.precondition(lr=0.2 if full else sgd.param_groups[0]["lr"])
        sgd.step()
        for schedule in schedules:
            schedule.step()
        assert info is not None
        assert optimizer.last_step is not None
        assert float(info.scale) == pytest.approx(float(optimizer.last_step.scale), rel=1e-12)
    for name, value in parameters(other).items():
        torch.testing.assert_close(parameters(model)[name], value, rtol=1e-12, atol=1e-14)
        assert not torch.equal(value, start[name])
    curvature.close()
    optimizer.close()
    assert same(curvature.state_dict()["layers"].keys(), optimizer.curvature.stats.keys())


def test_three_lines_around_an_existing_loop() -> None:
    """One constructor, one capture with its observation, one call before the step."""
    model = build(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs, targets = randn(64, 4), torch.randint(3, (64,), generator=seeded(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    curvature = Preconditioner(model, plain_config(kl_clip=0.1))
    loss = CategoricalLoss()
    values = []
    for _ in range(20):
        with curvature.capture() as captured:
            output = model(inputs)
        curvature.observe(captured, output, loss)
        optimizer.zero_grad()
        nn.functional.cross_entropy(output, targets).backward()
        curvature.precondition(lr=0.3)
        optimizer.step()
        values.append(float(loss(output, targets)))
    plain = build(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    sgd = torch.optim.SGD(plain.parameters(), lr=0.3, momentum=0.5)
    for _ in range(20):
        sgd.zero_grad()
        loss(plain(inputs), targets).backward()
        sgd.step()
    reached = float(loss(plain(inputs), targets))
    assert values[-1] < 0.8 * reached < values[0]


def test_the_gradient_tensors_are_replaced_in_place() -> None:
    model = mlp()
    curvature = Preconditioner(model, plain_config(kl_clip=None, damping=0.2))
    backward(curvature, model, 0)
    tensors = {name: p.grad for name, p in model.named_parameters()}
    pointers = {name: g.data_ptr() for name, g in tensors.items() if g is not None}
    before = {name: g.clone() for name, g in tensors.items() if g is not None}
    curvature.refresh()
    expected = curvature.direction(curvature.gradients())
    info = curvature.precondition(lr=0.1)
    assert info is not None
    for name, parameter in model.named_parameters():
        assert parameter.grad is tensors[name]
        assert parameter.grad is not None
        assert parameter.grad.data_ptr() == pointers[name]
        torch.testing.assert_close(parameter.grad, expected[name], **EXACT)
        assert not torch.allclose(parameter.grad, before[name])
    q = sum(float((before[n] * expected[n]).sum()) for n in before)
    assert float(info.quadratic) == pytest.approx(q, rel=1e-12)
    assert float(info.predicted_kl) == pytest.approx(0.005 * q, rel=1e-12)


def test_adam_sees_the_preconditioned_gradient() -> None:
    model, other = mlp(), mlp()
    curvature = Preconditioner(model, plain_config(kl_clip=1e-2, quadratic="kronecker"))
    adam = torch.optim.AdamW(model.parameters(), lr=0.05)
    reference = torch.optim.AdamW(other.parameters(), lr=0.05)
    for index in range(5):
        backward(curvature, model, index)
        curvature.refresh()
        gradients = curvature.gradients()
        step = curvature.direction(gradients)
        q = sum(float((gradients[n] * step[n]).sum()) for n in step)
        nu = min(1.0, math.sqrt(1e-2 / (0.05**2 * q)))
        for name, parameter in other.named_parameters():
            parameter.grad = nu * step[name]
        curvature.precondition(lr=0.05)
        adam.step()
        reference.step()
        for name, value in parameters(other).items():
            torch.testing.assert_close(parameters(model)[name], value, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("rate", [0.01, 0.1, 1.0])
def test_the_trust_region_knows_the_optimizers_rate(rate: float) -> None:
    model = mlp()
    config = plain_config(lr=123.0, kl_clip=1e-6, damping=0.5, quadratic="kronecker")
    curvature = Preconditioner(model, config)
    backward(curvature, model, 0)
    gradients = {n: g.clone() for n, g in curvature.gradients().items()}
    info = curvature.precondition(lr=rate)
    assert info is not None
    assert float(info.scale) < 1
    step = {n: p.grad for n, p in model.named_parameters()}
    nu = float(info.scale)
    q = sum(float((gradients[n] * g).sum()) for n, g in step.items() if g is not None) / nu
    assert rate**2 * nu**2 * q == pytest.approx(1e-6, rel=1e-10)


def test_backward_may_come_before_or_after_the_observation() -> None:
    gradients = []
    states = []
    for early in (False, True):
        model = mlp()
        curvature = Preconditioner(model, seed=3)
        inputs, targets = batch(model, 0)
        with curvature.capture() as captured:
            output = model(inputs)
        loss = LOSS(output, targets)
        if early:
            loss.backward(retain_graph=True)
        curvature.observe(captured, output, LOSS)
        if not early:
            loss.backward()
        states.append(curvature.state_dict())
        curvature.precondition(lr=0.1)
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert same(gradients[0], gradients[1])
    assert same(states[0]["layers"], states[1]["layers"])


def test_the_observation_leaves_the_gradients_alone() -> None:
    model = mlp()
    curvature = Preconditioner(model)
    kept = set_gradients(model)
    with curvature.capture() as captured:
        output = model(randn(6, 4))
    curvature.observe(captured, output, LOSS, source=Exact())
    assert all(torch.equal(p.grad, kept[n]) for n, p in model.named_parameters())  # type: ignore[arg-type]


def test_without_gradients_nothing_is_done() -> None:
    model = mlp()
    curvature = Preconditioner(model)
    assert curvature.precondition(lr=0.1) is None
    assert all(p.grad is None for p in model.parameters())


def test_parameters_without_gradient_stay_out_of_the_step() -> None:
    model = mlp()
    curvature = Preconditioner(model, plain_config(kl_clip=None))
    backward(curvature, model, 0)
    model[0].weight.grad = None
    model[0].bias.grad = None
    info = curvature.precondition(lr=0.1)
    assert info is not None
    assert model[0].weight.grad is None
    assert float(info.scale) == 1


@pytest.mark.parametrize("quadratic", ["kronecker", "exact"])
def test_a_gradient_that_is_not_finite_gives_a_zero_gradient(quadratic: Any) -> None:
    model = mlp()
    model.register_parameter("unused", nn.Parameter(torch.ones(2).double()))
    curvature = Preconditioner(
        model, plain_config(quadratic=quadratic), known_fisher={"unused": 1.0}
    )
    backward(curvature, model, 0)
    model.unused.grad = torch.tensor([math.nan, 1.0]).double()
    curvature.precondition(lr=0.1)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())  # type: ignore[arg-type]


def test_the_state_resumes_bit_for_bit() -> None:
    config = plain_config(refresh_interval=4, structure="ekfac")

    def train(model: nn.Module, curvature: Preconditioner, steps: range) -> None:
        for index in steps:
            backward(curvature, model, index)
            curvature.precondition(lr=0.1)
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(parameter.grad, alpha=0.1)

    model = mlp()
    curvature = Preconditioner(model, config, seed=2)
    train(model, curvature, range(6))
    state, weights = copy.deepcopy(curvature.state_dict()), copy.deepcopy(model.state_dict())
    train(model, curvature, range(6, 10))
    other = mlp(seed=9)
    other.load_state_dict(weights)
    resumed = Preconditioner(other, config, seed=77)
    resumed.load_state_dict(state)
    train(other, resumed, range(6, 10))
    assert same(parameters(other), parameters(model))
    assert same(resumed.state_dict(), curvature.state_dict())
