"""GAE against its definition, and what the collector records in both autoreset modes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from acktr.config import NetworkConfig
from acktr.policies.build import build_network
from acktr.policies.distributions import action_head
from acktr.policies.normalize import ObservationNormalizer, RewardScaler
from acktr.rollout import Acting, Collector, gae, make_batch
from tests.tools.toys import CountingEnv


def brute_force_gae(
    rewards: Any,
    values: Any,
    next_values: Any,
    terminated: Any,
    ended: Any,
    gamma: float,
    lam: float,
) -> Any:
    """O(T^2) definition: A_t = sum_k (gamma lambda)^k delta_{t+k} up to the episode's end."""
    steps, envs = rewards.shape
    result = np.zeros((steps, envs))
    for env in range(envs):
        for start in range(steps):
            for k in range(start, steps):
                future = 0.0 if terminated[k, env] else gamma * next_values[k, env]
                delta = rewards[k, env] + future - values[k, env]
                result[start, env] += (gamma * lam) ** (k - start) * delta
                if ended[k, env]:
                    break
    return result


@given(seed=st.integers(0, 10_000), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_gae_equals_its_definition(seed: int, gamma: float, lam: float) -> None:
    rng = np.random.default_rng(seed)
    shape = (rng.integers(1, 9), rng.integers(1, 4))
    rewards, values, following = rng.normal(size=(3, *shape))
    terminated = rng.random(shape) < 0.2
    ended = terminated | (rng.random(shape) < 0.2)
    expected = brute_force_gae(rewards, values, following, terminated, ended, gamma, lam)
    found = gae(rewards, values, following, terminated, ended, gamma, lam)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_limits_of_lambda() -> None:
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 6, 1))
    following = np.concatenate([values[1:], [[0.3]]])
    none = np.zeros((6, 1), bool)
    td = gae(rewards, values, following, none, none, 0.9, 0.0)
    np.testing.assert_allclose(td, rewards + 0.9 * following - values)
    monte_carlo = gae(rewards, values, following, none, none, 0.9, 1.0)
    discounts = 0.9 ** np.arange(6)
    total = (discounts * rewards[:, 0]).sum() + 0.9**6 * 0.3
    np.testing.assert_allclose(monte_carlo[0, 0], total - values[0, 0])


class CountValue(nn.Module):
    """Uniform policy over two actions; the value of an observation is 10 times its entry."""

    shared = True
    recurrent = False

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(observations), 2), 10 * observations[:, 0].float()


def counting(mode: AutoresetMode, num_envs: int = 1, **ends: int | None) -> Any:
    makers = [lambda: CountingEnv(**ends)] * num_envs
    return RecordEpisodeStatistics(SyncVectorEnv(makers, autoreset_mode=mode))


def collector(envs: Any, network: Any = None, **parts: Any) -> Collector:
    network = CountValue() if network is None else network
    head = action_head(envs.single_action_space)
    acting = Acting(network, head, torch.Generator().manual_seed(0), nullcontext)
    return Collector(envs, acting, **parts)


MODES = [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP]


@pytest.mark.parametrize("mode", MODES)
def test_truncation_bootstraps_from_the_final_observation(mode: AutoresetMode) -> None:
    found = collector(counting(mode, truncate_at=3)).collect(8)
    ended = np.flatnonzero(found.ended[:, 0])
    assert ended[0] == 2
    assert not found.terminated.any()
    np.testing.assert_array_equal(found.next_values[ended, 0], 30.0)


@pytest.mark.parametrize("mode", MODES)
def test_termination_has_no_future(mode: AutoresetMode) -> None:
    found = collector(counting(mode, terminate_at=3)).collect(8)
    batch = make_batch(found, gamma=0.5, gae_lambda=1.0, device=torch.device("cpu"))
    # Rewards of an episode are 1, 2, 3: returns 1 + 0.5 * 2 + 0.25 * 3, 2 + 0.5 * 3, 3.
    np.testing.assert_allclose(batch.returns[:3].numpy(), [2.75, 3.5, 3.0])


def test_both_autoreset_modes_learn_the_same_transitions() -> None:
    """The next-step mode's reset steps are masked: what is left equals the same-step mode."""
    same = collector(counting(AutoresetMode.SAME_STEP, truncate_at=3)).collect(6)
    following = collector(counting(AutoresetMode.NEXT_STEP, truncate_at=3)).collect(8)
    assert same.env_steps == 6
    assert following.env_steps == 6
    assert following.valid.sum() == 6
    device = torch.device("cpu")
    first = make_batch(same, 0.9, 0.8, device)
    second = make_batch(following, 0.9, 0.8, device)
    for name in ("observations", "advantages", "returns", "values"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("mode", MODES)
def test_learned_transitions_are_the_true_ones(mode: AutoresetMode) -> None:
    """Over many short episodes every learned row is a true (state, reward) pair of the game."""
    runner = collector(counting(mode, num_envs=3, terminate_at=4))
    episodes = 0
    rows = 0
    for _ in range(5):
        found = runner.collect(7)
        states = found.observations.numpy()[found.valid][:, 0]
        np.testing.assert_array_equal(found.rewards[found.valid], states + 1)
        assert set(states) <= {0.0, 1.0, 2.0, 3.0}
        rows += int(found.valid.sum())
        episodes += len(found.episodes)
        assert all(end.length == 4 and end.reward == 10.0 for end in found.episodes)
    assert rows // 4 - 3 <= episodes <= rows // 4


@pytest.mark.parametrize("mode", MODES)
def test_values_at_the_end_are_those_of_each_step(mode: AutoresetMode) -> None:
    """A separate critic is asked once for a rollout; a joint network gives values step by step."""

    class Joint(nn.Module):
        shared = True
        recurrent = False

        def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = separate(observations)
            return found

    torch.manual_seed(0)
    space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    config = NetworkConfig(shared=False, hidden=(8,), critic_hidden=(8,))
    separate = build_network(space, action_head(gymnasium.spaces.Discrete(2)), config)
    found = []
    for network in (separate, Joint()):
        runner = collector(
            counting(mode, num_envs=3, truncate_at=4),
            network,
            observation_normalizer=ObservationNormalizer((1,)),
        )
        found.append(runner.collect(11))
    once, stepwise = found
    assert once.ended.sum() == 6
    np.testing.assert_array_equal(once.actions, stepwise.actions)
    assert once.values.shape == once.next_values.shape == (11, 3)
    np.testing.assert_allclose(once.values, stepwise.values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(once.next_values, stepwise.next_values, rtol=1e-5, atol=1e-6)


def test_infinite_horizon_value_with_time_limits() -> None:
    """Constant reward 1 truncated every 5 steps: with V = 1/(1-gamma) every advantage is 0."""

    class Constant(CountValue):
        def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
            return torch.zeros(len(observations), 2), torch.full((len(observations),), 10.0)

    class OneReward(gymnasium.vector.VectorWrapper):
        def step(self, actions: Any) -> Any:
            observation, _, terminated, truncated, infos = self.env.step(actions)
            return observation, np.ones(self.num_envs), terminated, truncated, infos

    for mode in MODES:
        runner = collector(OneReward(counting(mode, truncate_at=5)), Constant())
        batch = make_batch(runner.collect(17), 0.9, 0.95, torch.device("cpu"))
        torch.testing.assert_close(batch.advantages, torch.zeros(len(batch)), atol=1e-5, rtol=0)


def test_forced_steps_are_not_learned_from() -> None:
    class Forced(gymnasium.vector.VectorWrapper):
        def step(self, actions: Any) -> Any:
            observation, rewards, terminated, truncated, infos = self.env.step(actions)
            infos["forced"] = np.array([observation[0, 0] == 2, False])
            return observation, rewards, terminated, truncated, infos

    found = collector(Forced(counting(AutoresetMode.SAME_STEP, num_envs=2))).collect(4)
    np.testing.assert_array_equal(found.valid[:, 0], [True, False, True, True])
    assert found.valid[:, 1].all()
    assert found.env_steps == 8
    assert len(make_batch(found, 0.9, 0.9, torch.device("cpu"))) == 7


def test_normalisers_see_each_true_observation_once() -> None:
    for mode, steps in ((AutoresetMode.SAME_STEP, 6), (AutoresetMode.NEXT_STEP, 8)):
        normalizer = ObservationNormalizer((1,))
        scaler = RewardScaler(1, gamma=0.9)
        runner = collector(
            counting(mode, truncate_at=3),
            observation_normalizer=normalizer,
            reward_scaler=scaler,
        )
        runner.collect(steps)
        assert normalizer.moments.count == 6
        np.testing.assert_allclose(normalizer.moments.mean, [1.0])
        assert scaler.moments.count == 6


class Broken(CountingEnv):
    """An error once, in the step of this number over all environments."""

    steps, fails_at = 0, 0

    def step(self, action: int) -> Any:
        Broken.steps += 1
        if Broken.steps == Broken.fails_at:
            raise KeyboardInterrupt
        return super().step(action)


@pytest.mark.parametrize("mode", MODES)
def test_a_rollout_that_was_broken_off_joins_no_episodes(mode: AutoresetMode) -> None:
    """Other environments had stepped by then, and statistics had counted, what nobody learned."""
    Broken.steps, Broken.fails_at = 0, 4 * 16 + 4 * 3 + 3
    makers = [lambda: Broken(terminate_at=10)] * 4
    envs: Any = RecordEpisodeStatistics(SyncVectorEnv(makers, autoreset_mode=mode))
    normalizer = ObservationNormalizer((1,))
    scaler = RewardScaler(4, gamma=0.9)
    runner = collector(envs, observation_normalizer=normalizer, reward_scaler=scaler)
    runner.collect(16)
    kept = [normalizer.moments.count, scaler.moments.count]
    with pytest.raises(KeyboardInterrupt):
        runner.collect(16)
    with pytest.warns(UserWarning, match="was broken off: new episodes begin") as told:
        found = runner.collect(16)
    assert len(told) == 1
    counts = [normalizer.moments.count, scaler.moments.count]
    assert counts == [count + found.valid.sum() for count in kept]
    lengths = [end.length for each in (found, runner.collect(16)) for end in each.episodes]
    assert set(lengths) == {10}


def test_a_reset_ends_the_running_discounted_returns() -> None:
    scaler = RewardScaler(1, gamma=0.9)
    runner = collector(counting(AutoresetMode.SAME_STEP), reward_scaler=scaler)
    runner.collect(3)
    assert scaler.returns[0] > 0
    runner.reset(0)
    assert scaler.returns[0] == 0


def test_undeclared_autoreset_mode_is_refused() -> None:
    envs = counting(AutoresetMode.SAME_STEP)
    envs.unwrapped.metadata = {}
    envs.metadata = {}
    with pytest.raises(ValueError, match="autoreset mode None; NEXT_STEP or SAME_STEP is needed"):
        collector(envs)
    envs.metadata = {"autoreset_mode": AutoresetMode.DISABLED}
    with pytest.raises(ValueError, match="NEXT_STEP or SAME_STEP is needed"):
        collector(envs)
