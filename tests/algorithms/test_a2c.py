"""A2C against an update written by hand in float64."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.func import functional_call

from acktr.algorithms.a2c import A2CLearner, RMSpropTF
from acktr.config import A2CConfig, Config, ConfigError, NetworkConfig
from acktr.policies.build import build_network
from acktr.policies.distributions import action_head
from acktr.rollout import Batch

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float64)
ACTIONS = spaces.Box(-1, 1, (2,), np.float64)


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def learner(*, shared: bool, clip: float = 0.5, schedule: Any = "linear") -> A2CLearner:
    torch.manual_seed(0)
    config = Config(
        env="none",
        algo="a2c",
        ent_coef=0.01,
        vf_coef=0.5,
        network=NetworkConfig(shared=shared, hidden=(5,), critic_hidden=(4,)),
        a2c=A2CConfig(lr=0.01, max_grad_norm=clip, lr_schedule=schedule),
    )
    head = action_head(ACTIONS)
    network = build_network(OBSERVATIONS, head, config.network)
    return A2CLearner(network, head, config, torch.Generator(), nullcontext)


def batch(seed: int, rows: int = 20) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    observations = torch.randn(rows, 3, generator=draw)
    actions = torch.randn(rows, 2, generator=draw)
    advantages, values = torch.randn(2, rows, generator=draw)
    return Batch(observations, actions, advantages, values + advantages, values)


def by_hand(agent: A2CLearner, parameters: dict[str, Tensor], data: Batch) -> dict[str, Tensor]:
    """Clipped gradients of L = -mean(A log pi) + 0.5 mean((V - R)^2) - 0.01 mean(H)."""
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    outputs, values = functional_call(agent.network, leaves, (data.observations,))
    loss = torch.zeros(())
    for row in range(len(data)):
        mean, log_std = outputs[row, :2], outputs[row, 2:]
        z = (data.actions[row] - mean) / log_std.exp()
        log_prob = (-0.5 * z**2 - log_std - 0.5 * np.log(2 * np.pi)).sum()
        entropy = (log_std + 0.5 * np.log(2 * np.pi * np.e)).sum()
        error = values[row] - data.returns[row]
        loss = loss + (-data.advantages[row] * log_prob + 0.5 * error**2 - 0.01 * entropy) / len(
            data
        )
    slopes = torch.autograd.grad(loss, list(leaves.values()))
    norm = float(torch.sqrt(torch.stack([(s**2).sum() for s in slopes]).sum()))
    factor = min(1.0, agent.config.a2c.max_grad_norm / (norm + 1e-6))
    return {name: slope * factor for name, slope in zip(leaves, slopes, strict=True)}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("clip", [0.05, 1e3])
def test_steps_equal_the_update_by_hand(shared: bool, clip: float) -> None:
    """Three steps of gradient, clipping, RMSprop with s_0 = 1 and the linear schedule."""
    agent = learner(shared=shared, clip=clip)
    parameters = {name: p.detach().clone() for name, p in agent.network.named_parameters()}
    squares = {name: torch.ones_like(p) for name, p in parameters.items()}
    for step, progress in enumerate((0.0, 0.25, 0.9)):
        data = batch(step)
        for name, slope in by_hand(agent, parameters, data).items():
            squares[name] = 0.99 * squares[name] + 0.01 * slope**2
            change = 0.01 * (1 - progress) * slope / torch.sqrt(squares[name] + 1e-5)
            parameters[name] = parameters[name] - change
        metrics = agent.update(data, progress)
        assert metrics["train/learning_rate"] == pytest.approx(0.01 * (1 - progress), rel=1e-12)
        for name, parameter in agent.network.named_parameters():
            torch.testing.assert_close(parameter.detach(), parameters[name], rtol=1e-12, atol=1e-14)


def test_rmsprop_equals_stable_baselines3() -> None:
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

    torch.manual_seed(1)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    first = RMSpropTF(ours, alpha=0.9, eps=1e-3)
    second = RMSpropTFLike(theirs.parameters(), lr=0.02, alpha=0.9, eps=1e-3)
    for _ in range(5):
        inputs = torch.randn(6, 4)
        for module in (ours, theirs):
            module.zero_grad()
            module(inputs).square().sum().backward()
        first.step(0.02)
        second.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-12, atol=1e-14)


def test_constant_schedule_keeps_lr() -> None:
    agent = learner(shared=True, schedule="constant")
    assert agent.update(batch(0), 0.9)["train/learning_rate"] == 0.01


def test_parameters_without_gradient_stay() -> None:
    module = nn.Linear(2, 2)
    before = module.weight.detach().clone()
    optimizer = RMSpropTF(module, 0.99, 1e-5)
    module.bias.grad = torch.ones(2)
    optimizer.step(0.1)
    assert torch.equal(module.weight, before)
    torch.testing.assert_close(optimizer.state_dict()["bias"], torch.ones(2))


def test_state_goes_on_exactly_and_foreign_state_is_refused() -> None:
    agent, twin = learner(shared=True), learner(shared=True)
    agent.update(batch(0), 0.0)
    twin.network.load_state_dict(agent.network.state_dict())
    twin.load_state_dict(agent.state_dict())
    for one in (agent, twin):
        one.update(batch(1), 0.1)
    for a, b in zip(agent.network.parameters(), twin.network.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="another network"):
        learner(shared=False).load_state_dict(agent.state_dict())


@pytest.mark.parametrize(
    ("field", "value"), [("lr", 0.0), ("rms_alpha", 1.0), ("rms_eps", 0.0), ("max_grad_norm", -1.0)]
)
def test_bad_settings_name_the_field(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        A2CConfig(**{field: value})
