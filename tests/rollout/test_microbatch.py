"""Updates from micro-batches are those of whole batches, in float64."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from acktr.algorithms.a2c import A2CLearner
from acktr.algorithms.acktr import ACKTRLearner
from acktr.algorithms.critic import FirstOrderCritic
from acktr.config import (
    A2CConfig,
    ACKTRConfig,
    Config,
    ConfigError,
    CriticConfig,
    NetworkConfig,
    SampledKFACConfig,
)
from acktr.policies.build import build_network
from acktr.policies.distributions import action_head
from acktr.rollout import Batch, add_means, micro_batches, outputs_of

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float64)
IMAGES = spaces.Box(0, 255, (4, 12, 12), np.uint8)
ACTIONS: dict[str, gymnasium.Space] = {
    "discrete": spaces.Discrete(3),
    "gaussian": spaces.Box(-1, 1, (2,), np.float64),
    "multi-discrete": spaces.MultiDiscrete([2, 3]),
    "multi-binary": spaces.MultiBinary(2),
}
ROWS = 61
Agent = ACKTRLearner | A2CLearner


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def configuration(*, shared: bool, algo: Any = "acktr", **settings: Any) -> Config:
    kfac = {"lr": 0.3, "kl_clip": 1e-3, "damping": 1e-2, "refresh_interval": 2, "cold_steps": 1}
    kfac |= settings.pop("kfac", {})
    acktr = ACKTRConfig(
        actor=SampledKFACConfig(**kfac),
        critic=SampledKFACConfig(**kfac),
        critic_steps=2,
        value_sigma=0.7,
    )
    network = NetworkConfig(shared=shared, hidden=(8,), critic_hidden=(7,), policy_gain=1.0)
    common = {"ent_coef": 0.02, "normalize_advantage": True, "network": network, "acktr": acktr}
    a2c = A2CConfig(max_grad_norm=0.1)
    return Config(env="none", algo=algo, a2c=a2c, **{**common, **settings})


def learner(space: str, config: Config, observations: Any = OBSERVATIONS) -> Agent:
    torch.manual_seed(0)
    head = action_head(ACTIONS[space])
    network = build_network(observations, head, config.network)
    kind: Any = ACKTRLearner if config.algo == "acktr" else A2CLearner
    agent: Agent = kind(network, head, config, torch.Generator().manual_seed(0), nullcontext)
    return agent


def batch(agent: Agent, seed: int, observations: Any = OBSERVATIONS) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    seen = torch.randn(ROWS, 3, generator=draw)
    if observations is IMAGES:
        seen = torch.randint(256, (ROWS, *IMAGES.shape), generator=draw, dtype=torch.uint8)
    with torch.no_grad():
        parameters, values = agent.network(seen)
        dist = agent.head.make(parameters)
        actions = dist.sample(dist.noise(draw))
    advantages = torch.randn(ROWS, generator=draw)
    return Batch(seen, actions, advantages, values + advantages, values)


def check_equal(
    space: str, config: Config, limit: int, observations: Any = OBSERVATIONS, updates: int = 3
) -> None:
    """Updates with and without micro-batches: parameters, metrics and the generator."""
    split = dataclasses.replace(config, micro_batch=limit)
    agents = [learner(space, one, observations) for one in (config, split)]
    for update in range(updates):
        data = batch(agents[0], update, observations)
        metrics = [agent.update(data, 0.1 * update) for agent in agents]
        assert list(metrics[0]) == list(metrics[1])
        for name, value in metrics[0].items():
            if not name.startswith("time/"):
                tolerance = {"rel": 1e-5, "abs": 1e-9, "nan_ok": True}  # metrics are float32
                assert metrics[1][name] == pytest.approx(value, **tolerance), name
    for one, other in zip(*(agent.network.parameters() for agent in agents), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-13)
    if isinstance(agents[0], ACKTRLearner) and isinstance(agents[1], ACKTRLearner):
        states = [agent.generator.get_state() for agent in agents]  # type: ignore[union-attr]
        assert torch.equal(*states)


@pytest.mark.parametrize("fraction", [1.0, 0.3])
@pytest.mark.parametrize("quadratic", ["kronecker", "exact"])
@pytest.mark.parametrize("space", ACTIONS)
@pytest.mark.parametrize("shared", [True, False])
def test_acktr_learns_the_same(shared: bool, space: str, quadratic: str, fraction: float) -> None:
    kfac = {"quadratic": quadratic, "stat_fraction": fraction}
    check_equal(space, configuration(shared=shared, kfac=kfac), 16)


@pytest.mark.parametrize("quadratic", ["kronecker", "exact"])
def test_images_are_the_same(quadratic: str) -> None:
    kfac = {"quadratic": quadratic, "stat_fraction": 0.25, "structure": "cholesky"}
    kfac["cold_steps"] = 0
    check_equal("discrete", configuration(shared=True, kfac=kfac), 31, IMAGES, updates=1)


def test_a_first_order_critic_learns_the_same() -> None:
    fit = CriticConfig(epochs=3, batch_size=40)
    config = configuration(shared=False)
    acktr = dataclasses.replace(config.acktr, critic_optimizer="first_order", first_order=fit)
    check_equal("gaussian", dataclasses.replace(config, acktr=acktr), 16)


def test_the_step_that_adapts_to_the_kl_is_the_same() -> None:
    config = configuration(shared=False)
    adapted = dataclasses.replace(config.acktr, target_kl=1e-3)
    check_equal("gaussian", dataclasses.replace(config, acktr=adapted), 16)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("space", ["discrete", "gaussian"])
@pytest.mark.parametrize("shared", [True, False])
def test_a2c_learns_the_same(shared: bool, space: str, normalize: bool) -> None:
    """The clip, which holds here, is that of the accumulated gradient."""
    config = configuration(shared=shared, algo="a2c", normalize_advantage=normalize)
    check_equal(space, config, 16)


@pytest.mark.parametrize("algo", ["acktr", "a2c"])
@pytest.mark.parametrize("shared", [True, False])
def test_no_forward_pass_of_an_update_is_larger(shared: bool, algo: str) -> None:
    config = configuration(shared=shared, algo=algo, micro_batch=16, kfac={"quadratic": "exact"})
    agent = learner("discrete", config)
    data = [batch(agent, update) for update in range(2)]
    sizes: list[int] = []

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sizes.append(len(inputs[0]))

    for module in agent.network.modules():
        module.register_forward_pre_hook(hook)
    for one in data:
        agent.update(one, 0.0)
    assert max(sizes) <= 16 and min(sizes) >= 15


def test_parts_cover_the_batch_in_even_sizes() -> None:
    for samples in range(1, 40):
        for limit in (None, *range(1, 45)):
            parts = micro_batches(samples, limit)
            sizes = [part.rows.stop - part.rows.start for part in parts]
            assert sum(sizes) == samples and max(sizes) - min(sizes) <= 1
            assert max(sizes) <= (limit or samples)
            assert len(parts) == -(-samples // (limit or samples))
            assert [part.rows.start for part in parts[1:]] == [p.rows.stop for p in parts[:-1]]
            assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
            assert [part.share for part in parts] == [size / samples for size in sizes]


def test_means_and_outputs_are_those_of_the_whole() -> None:
    numbers = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    totals: dict[str, Tensor] = {}
    for part in micro_batches(10, 4):
        add_means(totals, {"x": numbers[part.rows].mean()}, part.share)
    torch.testing.assert_close(totals["x"], numbers.mean())
    assert torch.equal(outputs_of(torch.square, numbers, 3), numbers.square())
    assert torch.equal(outputs_of(torch.square, numbers, None), numbers.square())


def test_a_critic_without_a_limit_takes_its_steps_whole() -> None:
    sizes: list[int] = []

    class Value(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, observations: Tensor) -> Tensor:
            sizes.append(len(observations))
            return self.layer(observations)[:, 0]

    rows = torch.randn(30, 3)
    data = Batch(rows, rows, rows[:, 0], rows[:, 1], rows[:, 2])
    config = CriticConfig(epochs=1, batch_size=None)
    for limit, expected in ((None, [30]), (12, [10, 10, 10])):
        sizes.clear()
        FirstOrderCritic(Value(), config, torch.Generator(), nullcontext, limit).fit(data)
        assert sizes == expected


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="micro_batch must be an integer >= 1, got 0"):
        configuration(shared=True, micro_batch=0)
    with pytest.raises(ConfigError, match="trpo takes whole batches"):
        configuration(shared=False, algo="trpo", micro_batch=64)
