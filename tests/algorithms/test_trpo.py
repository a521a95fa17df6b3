"""TRPO against dense matrices in float64."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor
from torch.func import functional_call, jacrev

from acktr.algorithms.trpo import Surrogate, TRPOLearner, conjugate_gradient, fisher_product
from acktr.config import Config, ConfigError, CriticConfig, NetworkConfig, TRPOConfig
from acktr.policies.build import build_network
from acktr.policies.distributions import action_head
from acktr.rollout import Batch

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float64)
ACTIONS: dict[str, gymnasium.Space[Any]] = {
    "discrete": spaces.Discrete(3),
    "several": spaces.MultiDiscrete([2, 3]),
    "bits": spaces.MultiBinary(3),
    "gaussian": spaces.Box(-1, 1, (2,), np.float64),
}


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def learner(space: str = "gaussian", seed: int = 0, **settings: Any) -> TRPOLearner:
    torch.manual_seed(seed)
    config = Config(
        env="none",
        algo="trpo",
        ent_coef=settings.pop("ent_coef", 0.0),
        normalize_advantage=True,
        network=NetworkConfig(shared=False, hidden=(6,), critic_hidden=(6,), policy_gain=1.0),
        trpo=TRPOConfig(**settings),
    )
    head = action_head(ACTIONS[space])
    network = build_network(OBSERVATIONS, head, config.network)
    return TRPOLearner(network, head, config, torch.Generator().manual_seed(seed), nullcontext)


def batch(agent: TRPOLearner, rows: int = 96, seed: int = 1) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    observations = torch.randn(rows, 3, generator=draw)
    with torch.no_grad():
        dist = agent.head.make(agent.actor(observations))
        actions = dist.sample(dist.noise(draw))
        values = agent.critic.critic(observations)
    advantages = torch.randn(rows, generator=draw)
    return Batch(observations, actions, advantages, values + advantages, values)


def parameters(agent: TRPOLearner) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in agent.actor.parameters()])


def kl_hessian(agent: TRPOLearner, observations: Tensor) -> Tensor:
    """Hessian of mean KL(old || new) at the old parameters, entry by entry."""
    named = {name: p.detach() for name, p in agent.actor.named_parameters()}
    old = agent.head.make(agent.actor(observations).detach())

    def mean_kl(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [p.numel() for p in named.values()])
        values = {n: v.view_as(p) for (n, p), v in zip(named.items(), parts, strict=True)}
        return old.kl(functional_call(agent.actor, values, (observations,))).mean()

    hessian: Tensor = torch.autograd.functional.hessian(  # type: ignore[no-untyped-call]
        mean_kl, parameters(agent)
    )
    return hessian


@pytest.mark.parametrize("space", ACTIONS)
def test_fisher_product_equals_the_dense_fisher(space: str) -> None:
    agent = learner(space)
    data = batch(agent, rows=7)
    outputs = agent.actor(data.observations)
    old = agent.head.make(outputs.detach())
    product = fisher_product(outputs, old, agent.actor, damping=0.0)
    size = parameters(agent).numel()
    found = torch.stack([product(column) for column in torch.eye(size)], dim=1)
    torch.testing.assert_close(found, kl_hessian(agent, data.observations), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("space", ["discrete", "gaussian"])
def test_fisher_product_equals_the_scores_outer_products(space: str) -> None:
    """E[score score^T] over all actions (discrete), or J^T diag(1/std^2, 2) J (Gaussian)."""
    agent = learner(space)
    data = batch(agent, rows=5)
    named = {name: p.detach() for name, p in agent.actor.named_parameters()}
    jacobian = torch.cat(
        [
            part.flatten(2)
            for part in jacrev(lambda v: functional_call(agent.actor, v, (data.observations,)))(
                named
            ).values()
        ],
        dim=2,
    )
    outputs = agent.actor(data.observations)
    fisher = torch.zeros(jacobian.shape[2], jacobian.shape[2])
    for row, output in enumerate(outputs.detach()):
        if space == "discrete":
            p = output.softmax(-1)
            middle = torch.diag(p) - torch.outer(p, p)
        else:
            log_std = output[2:]
            middle = torch.diag(torch.cat([(-2 * log_std).exp(), torch.full((2,), 2.0)]))
        fisher += jacobian[row].mT @ middle @ jacobian[row] / len(outputs)
    old = agent.head.make(outputs.detach())
    product = fisher_product(outputs, old, agent.actor, damping=0.3)
    vector = torch.randn(len(fisher))
    torch.testing.assert_close(
        product(vector), fisher @ vector + 0.3 * vector, rtol=1e-10, atol=1e-12
    )


def test_conjugate_gradient_equals_a_dense_solve() -> None:
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=draw)
    matrix = root @ root.mT + 0.1 * torch.eye(12)
    right = torch.randn(12, generator=draw)
    found, residual = conjugate_gradient(lambda v: matrix @ v, right, 40, 1e-24)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, right), rtol=1e-8, atol=1e-10)
    assert float(residual) <= 1e-20
    rough, left = conjugate_gradient(lambda v: matrix @ v, right, 3, 1e-24)
    torch.testing.assert_close(left, (right - matrix @ rough).square().sum(), rtol=1e-8, atol=0)
    assert float(left) > 1e-6


@pytest.mark.parametrize("space", ACTIONS)
def test_full_step_is_the_damped_natural_gradient_at_the_bound(space: str) -> None:
    """A first step that is accepted equals the dense solution scaled to sqrt(2 delta / x^T M x)."""
    agent = learner(space, max_kl=1e-6, cg_iterations=200, cg_tolerance=1e-30, ent_coef=0.01)
    data = batch(agent)
    before = parameters(agent)
    matrix = kl_hessian(agent, data.observations) + 0.1 * torch.eye(len(before))
    centred = data.advantages - data.advantages.mean()
    dist = agent.head.make(agent.actor(data.observations))
    gain = (centred / centred.square().mean().sqrt() * dist.log_prob(data.actions)).mean()
    gain = gain + 0.01 * dist.entropy().mean()
    slope = torch.autograd.grad(gain, list(agent.actor.parameters()))
    x = torch.linalg.solve(matrix, torch.cat([part.reshape(-1) for part in slope]))
    metrics = agent.update(data, 0.0)
    assert metrics["train/line_search_accepted"] == 1
    fraction = 0.8 ** metrics["train/line_search_steps"]
    expected = fraction * x * (2e-6 / (x @ matrix @ x)).sqrt()
    torch.testing.assert_close(parameters(agent) - before, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("space", ACTIONS)
@pytest.mark.parametrize("max_kl", [0.001, 0.01, 0.3])
def test_every_accepted_step_keeps_the_bound_and_improves(space: str, max_kl: float) -> None:
    agent = learner(space, max_kl=max_kl)
    accepted = 0
    for seed in range(8):
        data = batch(agent, seed=seed)
        with torch.no_grad():
            old = agent.head.make(agent.actor(data.observations))
            before = old.log_prob(data.actions)
        metrics = agent.update(data, 0.0)
        with torch.no_grad():
            after = agent.actor(data.observations)
            kl = float(old.kl(after).mean())
            centred = data.advantages - data.advantages.mean()
            ratio = (agent.head.make(after).log_prob(data.actions) - before).exp()
        assert kl <= max_kl
        assert metrics["train/approx_kl"] == pytest.approx(kl, rel=1e-5, abs=1e-9)
        if metrics["train/line_search_accepted"]:
            accepted += 1
            assert float((ratio * centred).mean()) > 0
    assert accepted >= 6


@pytest.mark.parametrize("broken", ["worse", "nan"])
def test_failed_search_leaves_the_parameters_bit_for_bit(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, their memory and later rollouts are as if there had been no search."""
    agent = learner()
    data = batch(agent)
    before = {name: p.detach().clone() for name, p in agent.actor.named_parameters()}
    memory = [p.data_ptr() for p in agent.actor.parameters()]
    true = Surrogate.__call__
    calls = []

    def surrogate(self: Surrogate, outputs: Tensor) -> Tensor:
        calls.append(1)
        value = true(self, outputs)
        if len(calls) == 1:
            return value
        return value * torch.nan if broken == "nan" else value.detach() - 1e3

    monkeypatch.setattr(Surrogate, "__call__", surrogate)
    metrics = agent.update(data, 0.0)
    assert len(calls) == 1 + agent.config.trpo.backtrack_steps
    assert metrics["train/line_search_accepted"] == 0
    assert metrics["train/approx_kl"] == 0
    assert metrics["train/surrogate_gain"] == 0
    for name, parameter in agent.actor.named_parameters():
        assert torch.equal(parameter, before[name])
    assert [p.data_ptr() for p in agent.actor.parameters()] == memory


def test_fisher_fraction_takes_every_kth_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = learner(fisher_fraction=0.25)
    data = batch(agent, rows=10)
    vector = torch.randn(len(parameters(agent)))
    dense = kl_hessian(agent, data.observations[[0, 4, 8]])
    seen: list[Tensor] = []

    def watched(*args: Any) -> Any:
        product = fisher_product(*args)
        seen.append(product(vector))
        return product

    monkeypatch.setattr("acktr.algorithms.trpo.fisher_product", watched)
    agent.update(data, 0.0)
    (found,) = seen
    torch.testing.assert_close(found, dense @ vector + 0.1 * vector)


def test_critic_fit_equals_adam_written_by_hand() -> None:
    """Two epochs over the whole batch, against the update rule of Kingma and Ba (2015)."""
    agent = learner(critic=CriticConfig(lr=0.01, epochs=2, batch_size=None))
    data = batch(agent)
    critic = agent.critic.critic
    values = {name: p.detach().clone() for name, p in critic.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in values.items()}
    second = {name: torch.zeros_like(p) for name, p in values.items()}
    for step in (1, 2):
        leaves = {name: v.clone().requires_grad_() for name, v in values.items()}
        loss = (functional_call(critic, leaves, (data.observations,)) - data.returns).square()
        slopes = torch.autograd.grad(loss.mean(), list(leaves.values()))
        for (name, value), slope in zip(values.items(), slopes, strict=True):
            first[name] = 0.9 * first[name] + 0.1 * slope
            second[name] = 0.999 * second[name] + 0.001 * slope**2
            mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
            value -= 0.01 * mean / (square.sqrt() + 1e-5)
    agent.critic.fit(data)
    for name, parameter in critic.named_parameters():
        torch.testing.assert_close(parameter.detach(), values[name], rtol=1e-10, atol=1e-13)


def test_critic_sees_every_sample_once_per_epoch() -> None:
    agent = learner(critic=CriticConfig(lr=1e-12, epochs=3, batch_size=32, optimizer="sgd"))
    data = batch(agent, rows=80)
    seen: list[Tensor] = []
    agent.critic.critic.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    loss = agent.critic.fit(data)
    assert [len(part) for part in seen] == [32, 32, 16] * 3
    for epoch in range(3):
        rows = torch.cat(seen[3 * epoch : 3 * epoch + 3])
        order = rows[:, 0].argsort()
        assert torch.equal(rows[order], data.observations[data.observations[:, 0].argsort()])
    assert not torch.equal(seen[0], seen[3])
    expected = (data.values - data.returns).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_state_goes_on_exactly() -> None:
    agent, twin = learner(), learner(seed=5)
    agent.update(batch(agent), 0.0)
    twin.actor.load_state_dict(agent.actor.state_dict())
    twin.critic.critic.load_state_dict(agent.critic.critic.state_dict())
    twin.load_state_dict(agent.state_dict())
    data = batch(agent, seed=3)
    for one in (agent, twin):
        one.update(data, 0.5)
    assert torch.equal(parameters(agent), parameters(twin))
    for a, b in zip(agent.critic.critic.parameters(), twin.critic.critic.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_another_network_is_refused() -> None:
    agent = learner()
    agent.update(batch(agent), 0.0)
    torch.manual_seed(0)
    config = Config(
        env="none", algo="trpo", network=NetworkConfig(shared=False, critic_hidden=(9,))
    )
    head = action_head(ACTIONS["gaussian"])
    network = build_network(OBSERVATIONS, head, config.network)
    other = TRPOLearner(network, head, config, torch.Generator(), nullcontext)
    with pytest.raises(ValueError, match="does not fit parameter"):
        other.load_state_dict(agent.state_dict())


def test_shared_network_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"network\.shared must be false"):
        Config(env="none", algo="trpo", network=NetworkConfig(shared=True))
    config = Config(env="none", algo="trpo", network=NetworkConfig(shared=False))
    head = action_head(ACTIONS["discrete"])
    network = build_network(OBSERVATIONS, head, NetworkConfig(shared=True))
    assert network.shared
    with pytest.raises(ValueError, match="a critic of its own"):
        TRPOLearner(network, head, config, torch.Generator(), nullcontext)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_kl", 0.0),
        ("cg_iterations", 0),
        ("cg_damping", -1.0),
        ("fisher_fraction", 1.5),
        ("backtrack_factor", 1.0),
        ("backtrack_steps", 0),
    ],
)
def test_bad_settings_name_the_field(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        TRPOConfig(**{field: value})
