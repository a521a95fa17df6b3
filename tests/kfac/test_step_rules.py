"""The quadratic-model step and the adaptive damping, against dense solves."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    Exact,
    GaussianLoss,
    LMConfig,
    OutputLoss,
    dense_fisher,
)
from tests.tools.kfac import (
    build,
    mlp,
    parameters,
    plain_config,
    randn,
    same,
    seeded,
    set_gradients,
    snapshot,
)

OMEGA = 0.95**5


def vector(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def ordered(model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
    return vector({name: tensors[name] for name, _ in model.named_parameters()})


def decay_matrix(model: nn.Module, decay: float) -> Tensor:
    """Diagonal of eta, on weights only."""
    return torch.cat(
        [
            torch.full((p.numel(),), decay if n.endswith("weight") else 0.0).double()
            for n, p in model.named_parameters()
        ]
    ).diag()


class Problem:
    """A net with its loss and one batch."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        self.loss: OutputLoss[Any]
        if kind == "softmax":
            self.model = build(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3), seed=seed)
            self.loss = CategoricalLoss()
            self.targets = torch.randint(3, (7,), generator=seeded(4))
        elif kind == "linear":
            self.model = build(nn.Linear(2, 2), seed=seed)
            self.loss = GaussianLoss(std=0.6)
            self.targets = randn(7, 2, seed=4)
        else:  # three parameters
            self.model = build(nn.Linear(2, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False))
            self.loss = GaussianLoss(std=0.6, reduction="sum")
            self.targets = randn(7, 1, seed=4)
        self.inputs = randn(7, 2, seed=3)

    def objective(self) -> Tensor:
        value: Tensor = self.loss(self.model(self.inputs), self.targets)
        return value

    def full(self, decay: float) -> float:
        """The objective with its weight decay."""
        with torch.no_grad():
            weights = [p for n, p in self.model.named_parameters() if n.endswith("weight")]
            square = sum(float(w.square().sum()) for w in weights)
            return float(self.objective()) + 0.5 * decay * square

    def backward(self, optimizer: KFAC) -> None:
        with optimizer.capture() as captured:
            output = self.model(self.inputs)
        optimizer.observe(captured, output, self.loss, source=Exact())
        optimizer.zero_grad()
        self.objective().backward()

    def gradient(self, decay: float) -> Tensor:
        found = {
            n: p.grad + (decay if n.endswith("weight") else 0.0) * p.detach()
            for n, p in self.model.named_parameters()
            if p.grad is not None
        }
        return vector(found)

    def fisher(self) -> Tensor:
        return dense_fisher(self.model, (self.inputs,), self.loss)


KINDS = ["three", "softmax", "linear"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_coefficients_solve_the_dense_model(kind: str, decay: float) -> None:
    problem = Problem(kind)
    config = plain_config(damping=0.2, weight_decay=decay, kl_clip=None, refresh_interval=1)
    optimizer = KFAC(problem.model, config, step_rule="quadratic_model")
    last: Tensor | None = None
    for _ in range(4):
        problem.backward(optimizer)
        optimizer.refresh()
        ahead = -ordered(problem.model, optimizer.direction())
        slope, fisher = problem.gradient(decay), problem.fisher()
        eye = torch.eye(len(slope)).double()
        matrix = fisher + decay_matrix(problem.model, decay) + 0.2 * eye
        basis = torch.stack([ahead] if last is None else [ahead, last], dim=1)
        expected = torch.linalg.solve(basis.mT @ matrix @ basis, -basis.mT @ slope)
        before = vector(parameters(problem.model))
        optimizer.step()
        info = optimizer.last_step
        assert info is not None
        assert info.coefficients is not None
        assert len(info.coefficients) == (1 if last is None else 2)
        torch.testing.assert_close(info.coefficients, expected, rtol=1e-7, atol=1e-9)
        change = vector(parameters(problem.model)) - before
        torch.testing.assert_close(change, basis @ expected, rtol=1e-7, atol=1e-10)
        length = float(change @ fisher @ change)
        assert float(info.quadratic) == pytest.approx(length, rel=1e-6)
        assert float(info.predicted_kl) == pytest.approx(length / 2, rel=1e-6)

        def model(step: Tensor, s: Tensor = slope, m: Tensor = matrix) -> float:
            return float(s @ step + 0.5 * step @ m @ step)

        for shift in (1e-2 * basis).unbind(1):  # no other combination does better
            assert model(change) <= min(model(change + shift), model(change - shift))
        last = change


def test_the_trust_region_shortens_a_model_step() -> None:
    free, clipped = Problem("softmax"), Problem("softmax")
    changes = []
    for problem, settings in ((free, {"kl_clip": None}), (clipped, {"kl_clip": 1e-4})):
        config = plain_config(damping=0.2, **settings)
        optimizer = KFAC(problem.model, config, step_rule="quadratic_model")
        before = vector(parameters(problem.model))
        problem.backward(optimizer)
        fisher = problem.fisher()
        optimizer.step()
        changes.append(vector(parameters(problem.model)) - before)
        info = optimizer.last_step
        assert info is not None
    long, short = changes
    torch.testing.assert_close(short / short.norm(), long / long.norm(), rtol=1e-9, atol=1e-11)
    assert float(info.scale) < 0.9
    assert float(short @ fisher @ short) == pytest.approx(1e-4, rel=1e-9)
    assert float(info.predicted_kl) == pytest.approx(0.5e-4, rel=1e-9)
    torch.testing.assert_close(short, float(info.scale) * long, rtol=1e-9, atol=1e-12)


def test_a_model_step_needs_an_observed_loss_and_leaves_a_whole_state() -> None:
    model = mlp()
    optimizer = KFAC(model, step_rule="quadratic_model")
    set_gradients(model)
    before = parameters(model)
    with pytest.raises(ValueError, match="needs observe"):
        optimizer.step()
    assert same(parameters(model), before)
    assert optimizer.state_by_name()["momentum"] == {}


@pytest.mark.parametrize("rule", ["trust_region", "quadratic_model"])
@pytest.mark.parametrize("quadratic", ["kronecker", "exact"])
def test_nan_in_a_parameter_that_the_fisher_does_not_see(rule: Any, quadratic: Any) -> None:
    model = mlp()
    model.register_parameter("unused", nn.Parameter(torch.ones(2).double()))
    optimizer = KFAC(
        model,
        plain_config(quadratic=quadratic, momentum=0.0),
        known_fisher={"unused": 1.0},
        step_rule=rule,
    )
    inputs = randn(6, 4)
    for bad in (False, True, False):
        before = parameters(model)
        with optimizer.capture() as captured:
            output = model(inputs)
        optimizer.observe(captured, output, GaussianLoss())
        set_gradients(model)
        if bad:
            model.unused.grad = torch.tensor([math.nan, 1.0]).double()
        optimizer.step()
        assert same(parameters(model), before) == bad
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_an_unknown_rule() -> None:
    with pytest.raises(ValueError, match="step_rule must be trust_region or quadratic_model"):
        KFAC(mlp(), step_rule="newton")  # type: ignore[arg-type]


# --- adaptive damping -----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["trust_region", "quadratic_model"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_rho_is_the_actual_over_the_predicted_change(rule: Any, kind: str, decay: float) -> None:
    problem = Problem(kind)
    config = plain_config(
        lr=0.4, damping=0.2, weight_decay=decay, kl_clip=0.02, momentum=0.5, refresh_interval=1
    )
    optimizer = KFAC(
        problem.model, config, step_rule=rule, adaptive=LMConfig(interval=2, factor=0.9)
    )
    damping = 0.2
    for index in range(6):
        problem.backward(optimizer)
        slope, fisher = problem.gradient(decay), problem.fisher()
        matrix = fisher + decay_matrix(problem.model, decay)
        old, before = problem.full(decay), vector(parameters(problem.model))
        optimizer.step(objective=problem.objective)
        assert optimizer.last_step is not None
        rho = optimizer.last_step.rho
        if index % 2 == 0:
            assert rho is None
            assert optimizer.damping == damping
            continue
        change = vector(parameters(problem.model)) - before
        predicted = float(slope @ change + 0.5 * change @ matrix @ change)
        expected = (problem.full(decay) - old) / predicted
        assert rho == pytest.approx(expected, rel=1e-7)
        if kind == "linear":
            assert rho == pytest.approx(1.0, rel=1e-8)
        else:
            assert abs(rho - 1) > 1e-5
        damping *= 0.81 if rho > 0.75 else 1 / 0.81 if rho < 0.25 else 1
        assert optimizer.damping == pytest.approx(damping, rel=1e-12)


def test_the_next_direction_uses_the_new_damping() -> None:
    problem = Problem("linear")
    config = plain_config(damping=0.2, refresh_interval=1, kl_clip=None)
    optimizer = KFAC(problem.model, config, adaptive=LMConfig(interval=1, factor=0.5))
    problem.backward(optimizer)
    optimizer.step(objective=problem.objective)
    assert optimizer.damping == 0.1
    problem.backward(optimizer)
    optimizer.refresh()
    slope, fisher = problem.gradient(0.0), problem.fisher()
    step = optimizer.direction()
    # a single linear layer with isotropic outputs: its block is the exact Fisher
    expected = torch.linalg.solve(fisher + 0.1 * torch.eye(len(slope)).double(), slope)
    torch.testing.assert_close(ordered(problem.model, step), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_objective_that_is_not_finite_raises_the_damping(bad: float) -> None:
    problem = Problem("softmax")
    optimizer = KFAC(problem.model, plain_config(damping=0.2), adaptive=LMConfig(interval=1))
    problem.backward(optimizer)
    values = iter([torch.tensor(1.0), torch.tensor(bad)])
    optimizer.step(objective=lambda: next(values))
    assert optimizer.last_step is not None
    assert optimizer.last_step.rho == -math.inf
    assert optimizer.damping == pytest.approx(0.2 / 0.95, rel=1e-12)


@pytest.mark.parametrize("rule", ["trust_region", "quadratic_model"])
def test_an_adaptation_without_objective_or_observation_moves_nothing(rule: Any) -> None:
    problem = Problem("softmax")
    optimizer = KFAC(problem.model, plain_config(), step_rule=rule, adaptive=LMConfig(interval=1))
    problem.backward(optimizer)
    region = optimizer.curvature.region
    observed, region.observed = region.observed, None
    before, state = parameters(problem.model), snapshot(optimizer)
    with pytest.raises(ValueError, match=r"adaptive damping needs observe\(\) with a loss"):
        optimizer.step(objective=problem.objective)
    region.observed = observed
    with pytest.raises(ValueError, match="adaptive damping needs objective in step"):
        optimizer.step()
    assert same(parameters(problem.model), before)
    assert same(snapshot(optimizer), state)


@pytest.mark.parametrize("rule", ["trust_region", "quadratic_model"])
def test_cold_steps_need_no_objective_and_count_no_interval(rule: Any) -> None:
    problem = Problem("softmax")
    config = plain_config(cold_steps=3, damping=0.2)
    optimizer = KFAC(problem.model, config, step_rule=rule, adaptive=LMConfig(interval=2))
    seen = []
    for index in range(7):
        problem.backward(optimizer)
        optimizer.step(objective=None if index < 3 else problem.objective)
        assert optimizer.last_step is not None
        seen.append(optimizer.last_step.rho is not None)
    assert seen == [False, False, False, False, True, False, True]


@pytest.mark.parametrize("rule", ["trust_region", "quadratic_model"])
def test_adaptive_runs_resume_bit_for_bit(rule: Any) -> None:
    def made(problem: Problem, damping: float) -> KFAC:
        config = plain_config(damping=damping, refresh_interval=2)
        return KFAC(problem.model, config, step_rule=rule, adaptive=LMConfig(interval=2))

    def train(problem: Problem, optimizer: KFAC, count: int) -> None:
        for _ in range(count):
            problem.backward(optimizer)
            optimizer.step(objective=problem.objective)

    problem, other = Problem("softmax"), Problem("softmax", seed=8)
    optimizer, resumed = made(problem, 0.2), made(other, 0.7)
    train(problem, optimizer, 5)
    other.model.load_state_dict(copy.deepcopy(problem.model.state_dict()))
    resumed.load_state_dict(snapshot(optimizer))
    assert resumed.damping == optimizer.damping != 0.2
    train(problem, optimizer, 4)
    train(other, resumed, 4)
    assert same(parameters(other.model), parameters(problem.model))
    assert same(snapshot(resumed), snapshot(optimizer))


def test_newton_on_a_linear_model_in_one_step() -> None:
    """alpha makes up for any scale of the direction: without damping one step is the minimum."""
    problem = Problem("linear")
    config = plain_config(damping=1e-9, kl_clip=None, lr=1e-3)
    optimizer = KFAC(problem.model, config, step_rule="quadratic_model")
    problem.backward(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    problem.objective().backward()
    assert float(problem.gradient(0.0).abs().max()) < 1e-6
