"""The ACKTR update against hand-written references in float64."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import nullcontext
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor
from torch.func import functional_call, jacrev

from acktr.algorithms.acktr import ACKTRLearner, adapt_lr
from acktr.algorithms.objectives import (
    JointObjective,
    Objective,
    PolicyObjective,
    ValueObjective,
    value_noise,
)
from acktr.config import (
    ACKTRConfig,
    Config,
    ConfigError,
    CriticConfig,
    NetworkConfig,
    SampledKFACConfig,
)
from acktr.kfac import Preconditioner
from acktr.policies import as_outputs
from acktr.policies.build import build_network
from acktr.policies.distributions import action_head
from acktr.rollout import Batch, micro_batches
from tests.tools.kfac import HostSyncError, NoHostSync

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float64)
ACTIONS: dict[str, gymnasium.Space] = {
    "discrete": spaces.Discrete(3),
    "gaussian": spaces.Box(-1, 1, (2,), np.float64),
}


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def configuration(*, shared: bool, **settings: Any) -> Config:
    kfac = {"lr": 1.0, "kl_clip": 1e-4, "quadratic": "exact", "momentum": 0.0, "damping": 1e-3}
    kfac |= settings.pop("kfac", {})
    acktr = ACKTRConfig(
        actor=SampledKFACConfig(**kfac),
        critic=SampledKFACConfig(**kfac),
        lr_schedule="constant",
        **settings.pop("acktr", {}),
    )
    network = NetworkConfig(shared=shared, hidden=(8,), critic_hidden=(8,), policy_gain=1.0)
    return Config(env="none", network=network, acktr=acktr, **settings)


def learner(space: str, config: Config, seed: int = 0) -> ACKTRLearner:
    torch.manual_seed(seed)
    head = action_head(ACTIONS[space])
    network = build_network(OBSERVATIONS, head, config.network)
    return ACKTRLearner(network, head, config, torch.Generator().manual_seed(seed), nullcontext)


def batch(agent: ACKTRLearner, rows: int = 64, seed: int = 1) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    observations = torch.randn(rows, 3, generator=draw)
    with torch.no_grad():
        parameters, values = agent.network(observations)
        dist = agent.head.make(parameters)
        actions = dist.sample(dist.noise(draw))
    advantages = torch.randn(rows, generator=draw)
    return Batch(observations, actions, advantages, values + advantages, values)


@pytest.mark.parametrize("space", ACTIONS)
@pytest.mark.parametrize("shared", [True, False])
def test_exact_quadratic_equals_the_dense_fisher(space: str, shared: bool) -> None:
    """U^T F U by one Jacobian-vector product equals the form with the dense Fisher matrix."""
    agent = learner(space, configuration(shared=shared, acktr={"value_sigma": 0.7}))
    data = batch(agent, rows=5)
    network: Any = agent.network if shared else agent.network.actor
    named = {name: p.detach() for name, p in network.named_parameters()}

    def outputs(values: dict[str, Tensor]) -> Tensor:
        found = functional_call(network, values, (data.observations,))
        return torch.cat([found[0], found[1][:, None]], 1) if shared else found

    jacobian = torch.cat([j.flatten(2) for j in jacrev(outputs)(named).values()], dim=2)
    parameters = network(data.observations)[0] if shared else network(data.observations)
    width = parameters.shape[1]
    fisher = torch.zeros(jacobian.shape[2], jacobian.shape[2])
    for row in range(len(data)):
        single = agent.head.make(parameters.detach()[row : row + 1])
        basis = torch.eye(width)
        q = torch.stack([single.fisher_quadratic(e[None])[0] for e in basis])
        pair = [[single.fisher_quadratic((a + b)[None])[0] for b in basis] for a in basis]
        h = (torch.stack([torch.stack(r) for r in pair]) - q[:, None] - q) / 2
        if shared:
            h = torch.block_diag(h, torch.tensor([[1 / 0.7**2]]))
        fisher += jacobian[row].mT @ h @ jacobian[row] / len(data)
    direction = {name: torch.randn_like(p) for name, p in named.items()}
    flat = torch.cat([direction[name].flatten() for name in named])
    given = (agent.head, data, agent.config, agent.generator, flat.dtype)
    objective: Objective = JointObjective(*given, None, 0.7) if shared else PolicyObjective(*given)
    whole = slice(0, len(data))
    loss, _ = objective.loss(as_outputs(network(data.observations)), whole)
    expected = torch.autograd.grad(loss, list(network.parameters()))
    (part,) = micro_batches(len(data), None)
    _, _, quadratic = agent._policy_step._learn(objective, data.observations, part, observing=False)
    assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), expected, strict=True))
    assert quadratic is not None
    torch.testing.assert_close(quadratic(direction), flat @ fisher @ flat, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sigma", [1.0, 0.5])
def test_value_noise_has_fisher_one_over_sigma_squared(sigma: float) -> None:
    """sigma = 1 gives 1 and sigma = 1/2 the factor 4 of the released Baselines code."""
    values = torch.zeros(200_000, requires_grad=True)
    data = Batch(*[values.detach()] * 5)
    draw = torch.Generator().manual_seed(0)
    noise = value_noise(data, draw, values.dtype)
    objective = ValueObjective(data, sigma, noise)
    loss = objective.fisher((values,), slice(None))
    (score,) = torch.autograd.grad(loss, values)
    error = score.square().std() / len(score) ** 0.5
    assert abs(score.square().mean() - 1 / sigma**2) <= 4 * error


@pytest.mark.parametrize("structure", ["kfac", "cholesky"])
@pytest.mark.parametrize("quadratic", ["kronecker", "exact"])
def test_without_its_fisher_the_value_moves_by_its_gradient_over_the_damping(
    structure: str, quadratic: str
) -> None:
    """Both with plain and with factored damping, whose ratio of traces goes to its bound."""
    kfac = {"structure": structure, "quadratic": quadratic, "kl_clip": None, "lr": 0.1}
    config = configuration(shared=True, kfac=kfac, acktr={"value_fisher": False})
    agent = learner("discrete", config)
    data, weight = batch(agent), agent.network.value.weight
    before = weight.detach().clone()
    loss = config.vf_coef * (agent.network(data.observations)[1] - data.returns).square().mean()
    (gradient,) = torch.autograd.grad(loss, weight)
    agent.update(data, progress=0.0)
    torch.testing.assert_close(weight.detach(), before - 0.1 * gradient / 1e-3, rtol=1e-6, atol=0)


def test_without_its_fisher_the_value_costs_nothing() -> None:
    """The exact form of a shared network is that of its policy alone."""
    agent = learner("discrete", configuration(shared=True, acktr={"value_fisher": False}))
    data = batch(agent)
    given = (agent.head, data, agent.config, agent.generator, torch.float64)
    outputs = as_outputs(agent.network(data.observations))
    tangents = [torch.randn_like(output) for output in outputs]
    whole = slice(0, len(data))
    alone = PolicyObjective(*given).metric(outputs[:1], whole)(tangents[0])
    assert torch.equal(JointObjective(*given).metric(outputs, whole)(*tangents), alone)


@pytest.mark.parametrize("shared", [True, False])
def test_adaptive_sigma_follows_the_error_of_the_values(shared: bool) -> None:
    """The bias-corrected average of mean((R - V)^2) with decay 0.99, also after a resume."""
    config = configuration(shared=shared, acktr={"value_sigma": "adaptive"})
    agent = learner("discrete", config)
    weights: list[float] = []
    squares: list[Tensor] = []
    for number in range(4):
        data = batch(agent, seed=number)
        data = dataclasses.replace(data, returns=data.values + (number + 1) * data.advantages)
        if number == 2:
            state = copy.deepcopy(agent.state_dict())
            agent = learner("discrete", config)
            agent.load_state_dict(state)
        metrics = agent.update(data, progress=0.0)
        squares.append((data.returns - data.values).square().mean())
        weights = [*(0.99 * weight for weight in weights), 0.01]
        mean = sum(w * s for w, s in zip(weights, squares, strict=True)) / sum(weights)
        assert metrics["train/value_sigma"] == pytest.approx(float(mean) ** 0.5, rel=1e-12)
    with pytest.raises(ConfigError, match="needs the batch's values"):
        agent.update(dataclasses.replace(data, values=None), progress=0.0)


def test_adaptive_sigma_has_a_floor_and_is_the_sigma_of_the_step() -> None:
    """An update with it equals one with the number that it had; 0.01 is the least."""
    config = configuration(shared=True, acktr={"value_sigma": "adaptive"})
    agent = learner("discrete", config)
    data = batch(agent)
    sigma = agent.update(data, progress=0.0)["train/value_sigma"]
    fixed = learner("discrete", configuration(shared=True, acktr={"value_sigma": sigma}))
    fixed.update(data, progress=0.0)
    pairs = zip(agent.network.parameters(), fixed.network.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    exact = learner("discrete", config)
    known = dataclasses.replace(data, returns=data.values)
    assert exact.update(known, progress=0.0)["train/value_sigma"] == 0.01


@pytest.mark.parametrize("space", ACTIONS)
def test_exact_kl_after_a_step_is_the_predicted_one(space: str) -> None:
    """With a small clip the measured KL of a separate actor is c / 2, as the quadratic says."""
    agent = learner(space, configuration(shared=False, kfac={"kl_clip": 1e-8}))
    metrics = agent.update(batch(agent), progress=0.0)
    assert metrics["train/trust_scale_actor"] < 1
    assert metrics["train/kl_quadratic"] == pytest.approx(0.5e-8, rel=1e-6)
    assert metrics["train/approx_kl"] == pytest.approx(0.5e-8, rel=2e-3)


def test_critic_step_respects_the_same_trust_region() -> None:
    """The mean squared change of the values, over sigma^2, is at most kl_clip."""
    settings = {"value_sigma": 0.5, "critic_steps": 1}
    agent = learner("discrete", configuration(shared=False, acktr=settings))
    data = batch(agent)
    agent.update(data, progress=0.0)
    with torch.no_grad():
        change = agent.network(data.observations)[1] - data.values
    assert change.square().mean() / 0.5**2 == pytest.approx(1e-4, rel=0.02)


@pytest.mark.parametrize("counts", [True, False])
def test_joint_step_matches_a_reference_with_dense_algebra(counts: bool) -> None:
    """One shared step equals gradient, Kronecker inverse and rescale written out by hand.

    Without the value in the Fisher matrix its sampled score is 0.
    """
    settings = {"kfac": {"quadratic": "kronecker", "lr": 0.1}, "ent_coef": 0.02, "vf_coef": 0.3}
    config = configuration(shared=True, acktr={"value_fisher": counts}, **settings)
    agent = learner("gaussian", config)
    data = batch(agent)
    network = agent.network
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    reference = torch.Generator().manual_seed(0)
    agent.update(data, progress=0.0)

    parameters, values = functional_call(network, before, (data.observations,))
    mean, log_std = parameters.chunk(2, -1)
    noise = torch.randn(mean.shape, generator=reference)
    score_mean = noise / log_std.exp()
    score_value = counts * torch.randn(values.shape, generator=reference)
    hidden = torch.tanh(data.observations @ before["trunk.1.weight"].mT + before["trunk.1.bias"])
    ones = torch.ones(len(data), 1)
    backward = score_mean @ before["policy.linear.weight"]
    backward = backward + score_value[:, None] @ before["value.weight"]
    signals = {
        "trunk.1": (data.observations, backward * (1 - hidden.square())),
        "policy.linear": (hidden, score_mean),
        "value": (hidden, score_value[:, None]),
    }
    leaves = {name: p.clone().requires_grad_() for name, p in before.items()}
    parameters, values = functional_call(network, leaves, (data.observations,))
    dist = agent.head.make(parameters)
    loss = -(data.advantages * dist.log_prob(data.actions)).mean()
    loss = loss - 0.02 * dist.entropy().mean() + 0.3 * (values - data.returns).square().mean()
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    steps = {"policy.log_std": gradients["policy.log_std"] / (2 + 1e-3)}
    for name, (inputs, outputs) in signals.items():
        homogeneous = torch.cat([inputs, ones], 1)
        a = homogeneous.mT @ homogeneous / len(data)
        g = outputs.mT @ outputs / len(data)
        gradient = torch.cat(
            [gradients[f"{name}.weight"], gradients[f"{name}.bias"][:, None]], 1
        ).flatten()
        fisher = torch.kron(g, a) + 1e-3 * torch.eye(len(gradient))
        step = torch.linalg.solve(fisher, gradient).view(len(g), len(a))
        steps[f"{name}.weight"], steps[f"{name}.bias"] = step[:, :-1], step[:, -1]
    q = sum((gradients[name] * steps[name]).sum() for name in steps)
    nu = min(1.0, float((1e-4 / (0.1**2 * q)).sqrt()))
    for name, parameter in network.named_parameters():
        expected = before[name] - 0.1 * nu * steps[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-8, atol=1e-10)


def test_advantages_are_standardised_on_request() -> None:
    plain = learner("discrete", configuration(shared=False))
    scaled = learner("discrete", configuration(shared=False, normalize_advantage=True))
    data = batch(plain)
    standard = (data.advantages - data.advantages.mean()) / data.advantages.std(correction=0)
    outputs = (plain.network(data.observations)[0],)
    log_prob = plain.head.make(outputs[0]).log_prob(data.actions)
    for agent, advantages in ((scaled, standard), (plain, data.advantages)):
        made = PolicyObjective(agent.head, data, agent.config, agent.generator, log_prob.dtype)
        _, terms = made.loss(outputs, slice(None))
        torch.testing.assert_close(terms["policy_loss"], -(advantages * log_prob).mean())


def test_target_kl_adapts_the_step() -> None:
    assert adapt_lr(0.03, kl=0.0041, target=0.002) == pytest.approx(0.02)
    assert adapt_lr(0.03, kl=0.0009, target=0.002) == pytest.approx(0.045)
    assert adapt_lr(0.03, kl=0.002, target=0.002) == 0.03
    assert adapt_lr(0.9, kl=0.0, target=0.002) == 1.0
    assert adapt_lr(1e-8, kl=1.0, target=0.002) == 1e-8
    settings = {"target_kl": 0.5}
    agent = learner("discrete", configuration(shared=False, acktr=settings, kfac={"lr": 0.1}))
    data = batch(agent)
    assert agent.update(data, 0.0)["train/learning_rate"] == 0.1
    assert agent.update(data, 0.0)["train/learning_rate"] == pytest.approx(0.15)


def test_linear_schedule_reaches_the_optimizer() -> None:
    config = configuration(shared=True)
    linear = dataclasses.replace(config.acktr, lr_schedule="linear")
    agent = learner("discrete", dataclasses.replace(config, acktr=linear))
    assert agent.update(batch(agent), 0.55)["train/learning_rate"] == pytest.approx(0.5)
    assert agent.update(batch(agent), 1.0)["train/learning_rate"] == pytest.approx(1 / 11)


@pytest.mark.parametrize("shared", [True, False])
def test_state_round_trip_continues_bit_for_bit(shared: bool) -> None:
    config = configuration(shared=shared, acktr={"target_kl": 1e-3}, kfac={"momentum": 0.9})
    first = learner("gaussian", config)
    batches = [batch(first, seed=seed) for seed in range(6)]
    for data in batches[:3]:
        first.update(data, 0.0)
    second = learner("gaussian", config, seed=9)
    second.network.load_state_dict(first.network.state_dict())
    second.load_state_dict(first.state_dict())
    for data in batches[3:]:
        numbers = [agent.update(data, 0.0) for agent in (first, second)]
        for name in numbers[0]:
            if not name.startswith("time/"):
                assert numbers[0][name] == numbers[1][name], name
    for one, two in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(one, two)
    other = learner("gaussian", configuration(shared=not shared))
    with pytest.raises(ValueError, match=r"separate critic|other layers"):
        other.load_state_dict(first.state_dict())


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_first_order_critic_leaves_the_actors_step_as_it_is(kind: Any) -> None:
    """The paper's ablations: the actor's K-FAC step is the same, the critic's is torch's own."""
    fit = CriticConfig(optimizer=kind, lr=0.01, epochs=3, batch_size=None)
    ablated = {"critic_optimizer": "first_order", "first_order": fit}
    one = learner("discrete", configuration(shared=False, acktr=ablated))
    two = learner("discrete", configuration(shared=False))
    data = batch(one)
    critic = copy.deepcopy(one.network.critic)
    parameters = list(critic.parameters())
    optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, 0.01, momentum=0.9)
    if kind == "adam":
        optimizer = torch.optim.Adam(parameters, 0.01, eps=1e-5)
    for _ in range(3):
        loss = (critic(data.observations) - data.returns).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    metrics = one.update(data, 0.0)
    assert metrics["train/value_loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    for a, b in zip(parameters, one.network.critic.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    two._policy_update(data)
    for a, b in zip(one.network.actor.parameters(), two.network.actor.parameters(), strict=True):
        assert torch.equal(a, b)
    state = one.state_dict()
    assert state["critic"].keys() == {"optimizer"}
    with pytest.raises((ValueError, KeyError)):
        two.load_state_dict(state)


def test_first_order_critic_needs_a_separate_one() -> None:
    with pytest.raises(ConfigError, match="applies to a separate critic"):
        configuration(shared=True, acktr={"critic_optimizer": "first_order"})


@pytest.mark.parametrize("space", ACTIONS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_an_update_waits_for_the_device_at_refreshes_and_for_metrics_alone(
    monkeypatch: pytest.MonkeyPatch, space: str, shared: bool, fraction: float
) -> None:
    kfac = {"refresh_interval": 1000, "stat_fraction": fraction}
    config = configuration(shared=shared, kfac=kfac, acktr={"critic_steps": 2})
    agent = learner(space, config, seed=3)
    data = batch(agent)
    with pytest.raises(HostSyncError), NoHostSync():  # type: ignore[no-untyped-call]
        learner(space, config, seed=3).update(data, 0.0)  # refreshes
    agent.update(data, 0.0)
    monkeypatch.setattr(
        "acktr.algorithms.acktr.to_floats", lambda tensors: dict.fromkeys(tensors, 0.0)
    )
    monkeypatch.setattr(Preconditioner, "extreme_eigenvalues", lambda curvature: (0.0, 0.0))
    before = [parameter.detach().clone() for parameter in agent.network.parameters()]
    with NoHostSync():  # type: ignore[no-untyped-call]
        agent.update(data, 0.0)
    after = list(agent.network.parameters())
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
