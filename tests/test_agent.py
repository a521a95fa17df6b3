"""The Python interface, and what Stable-Baselines3 expects of it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from acktr import (
    A2C,
    ACKTR,
    TRPO,
    CheckpointError,
    Config,
    ConfigError,
    EnvError,
    EnvFault,
    TrainStats,
    preset,
)
from acktr.config import merge, to_dict
from acktr.envs import make_vec
from acktr.evaluate import evaluate
from acktr.runs.checkpoint import save_checkpoint
from tests.tools.toys import CountingEnv, FaultyEnv, SpacesEnv, variant


def tiny(env: str = "CartPole-v1", **changes: Any) -> Config:
    return dataclasses.replace(preset(env)[0], num_envs=2, num_steps=8, **changes)


def test_learn_counts_steps_and_returns_itself() -> None:
    agent = ACKTR("CartPole-v1", tiny())
    assert agent.learn(100) is agent
    assert agent.num_timesteps == 112
    agent.learn(16)
    assert agent.num_timesteps == 128
    agent.close()


def test_callback_receives_statistics_and_may_stop() -> None:
    seen: list[TrainStats] = []

    def callback(stats: TrainStats) -> bool:
        seen.append(stats)
        return len(seen) < 3

    agent = ACKTR("CartPole-v1", tiny()).learn(10_000, callback)
    assert [stats.timesteps for stats in seen] == [16, 32, 48]
    assert agent.num_timesteps == 48
    agent.learn(16, lambda stats: None)
    assert agent.num_timesteps == 64


def test_predict_takes_one_observation_or_a_batch() -> None:
    agent = ACKTR("CartPole-v1", tiny(), seed=1)
    one = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    action, state = agent.predict(one, deterministic=True)
    assert action.shape == ()
    assert agent.envs.single_action_space.contains(action)
    assert state is None
    batch, _ = agent.predict(np.stack([one, -one, one]), deterministic=True)
    assert batch.shape == (3,)
    assert batch[0] == batch[2] == action
    with pytest.raises(ValueError, match=r"shape \(3,\); \(4,\) or \(N, 4\) is needed"):
        agent.predict(np.zeros(3))
    samples = {int(agent.predict(one)[0]) for _ in range(50)}
    assert samples == {0, 1}


def test_predict_clips_to_the_bounds() -> None:
    agent = ACKTR("Pendulum-v1", tiny("Pendulum-v1"), seed=1)
    actions = np.concatenate([agent.predict(np.zeros(3, np.float32))[0] for _ in range(200)])
    assert actions.min() >= -2
    assert actions.max() <= 2


def test_save_and_load_give_the_same_agent(tmp_path: Path) -> None:
    agent = ACKTR("Pendulum-v1", tiny("Pendulum-v1"), seed=3).learn(64)
    agent.save(tmp_path / "agent")
    loaded = ACKTR.load(tmp_path / "agent")
    observations = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    first, _ = agent.predict(observations, deterministic=True)
    second, _ = loaded.predict(observations, deterministic=True)
    np.testing.assert_array_equal(first, second)
    assert loaded.config == agent.config
    assert loaded.num_timesteps == 64
    loaded.learn(16)
    assert loaded.num_timesteps == 80


def test_foreign_and_unfit_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        ACKTR.load(tmp_path / "nothing")
    agent = ACKTR("CartPole-v1", tiny())
    agent.save(tmp_path / "agent")
    other = make_vec("Pendulum-v1", 2, 0)
    with pytest.raises(CheckpointError, match=": the agent's observation space is "):
        ACKTR.load(tmp_path / "agent", other)
    other.close()


def test_vector_environments_are_taken_as_they_are() -> None:
    for mode in ("SAME_STEP", "NEXT_STEP"):
        envs = gymnasium.make_vec(
            "CartPole-v1",
            3,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode[mode]},
        )
        agent = ACKTR(envs, tiny())
        assert agent.config.num_envs == 3
        assert agent.config.env == "CartPole-v1"
        episodes: list[Any] = []
        agent.learn(400, lambda stats, found=episodes: found.extend(stats.episodes))  # type: ignore[misc]
        assert episodes
        assert all(episode.reward == episode.length for episode in episodes)
        envs.close()


def test_bad_arguments_are_refused_in_one_line() -> None:
    with pytest.raises(EnvError) as caught:
        ACKTR("NoSuchEnv-v0")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="env is 'Pendulum-v1' but the configuration is for"):
        ACKTR("Pendulum-v1", tiny())
    with pytest.raises(ConfigError, match="seed must be an integer >= 0"):
        ACKTR("CartPole-v1", tiny(), seed=-1)
    with pytest.raises(ConfigError, match="device must be auto, cpu, cuda"):
        ACKTR("CartPole-v1", tiny(), device="tpu")
    with pytest.raises(ValueError, match="total_timesteps must be at least 1"):
        ACKTR("CartPole-v1", tiny()).learn(0)


def test_stable_baselines_evaluate_policy_accepts_the_agent() -> None:
    evaluation = pytest.importorskip("stable_baselines3.common.evaluation")
    monitor = pytest.importorskip("stable_baselines3.common.monitor")
    agent = ACKTR("CartPole-v1", tiny(), seed=0).learn(2000)
    env = monitor.Monitor(gymnasium.make("CartPole-v1"))
    mean, _ = evaluation.evaluate_policy(agent, env, n_eval_episodes=5)
    assert 8 <= mean <= 500
    returns, lengths = evaluation.evaluate_policy(
        agent, env, n_eval_episodes=5, return_episode_rewards=True
    )
    assert returns == lengths


def test_evaluation_plays_equal_shares_with_frozen_statistics() -> None:
    agent = ACKTR("Pendulum-v1", tiny("Pendulum-v1"), seed=0).learn(64)
    normalizer = agent.trainer.collector.observation_normalizer
    assert normalizer is not None
    before = normalizer.moments.count
    envs = make_vec("Pendulum-v1", 3, 0, training=False)
    found = evaluate(agent.policy, envs, 7, seed=5)
    again = evaluate(agent.policy, envs, 7, seed=5)
    assert found == again
    assert found.lengths == (200,) * 7
    assert normalizer.moments.count == before
    assert found.mean == pytest.approx(np.mean(found.returns))
    with pytest.raises(ValueError, match="episodes must be at least 1"):
        evaluate(agent.policy, envs, 0, seed=5)
    envs.close()


def test_reused_observation_buffers_do_not_corrupt_the_rollout() -> None:
    maker = [lambda: gymnasium.make("CartPole-v1")] * 2
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    envs = gymnasium.vector.SyncVectorEnv(maker, copy=False, autoreset_mode=mode)
    agent = ACKTR(envs, tiny())
    observations = agent.trainer.collector.collect(6).observations
    assert len(np.unique(observations[:, 0], axis=0)) == 6


@pytest.mark.parametrize("mode", ["SAME_STEP", "NEXT_STEP"])
@pytest.mark.parametrize("what", ["observation", "reward", "exception"])
def test_faults_of_vector_environments_name_index_and_step(mode: str, what: str) -> None:
    FaultyEnv.made = 0
    maker = [lambda: FaultyEnv(what, at=3, index=1)] * 3
    autoreset = gymnasium.vector.AutoresetMode[mode]
    envs = gymnasium.vector.SyncVectorEnv(maker, autoreset_mode=autoreset)
    agent = ACKTR(envs, tiny())
    with pytest.raises(EnvFault, match="step 3") as caught:
        agent.learn(100)
    assert "\n" not in str(caught.value)
    assert what == "exception" or "environment 1 of" in str(caught.value)


def test_inner_statistics_wrappers_are_harmless() -> None:
    wrapper = gymnasium.wrappers.RecordEpisodeStatistics
    maker = [lambda: wrapper(gymnasium.make("CartPole-v1"))] * 2
    for mode in gymnasium.vector.AutoresetMode.SAME_STEP, gymnasium.vector.AutoresetMode.NEXT_STEP:
        envs = gymnasium.vector.SyncVectorEnv(maker, autoreset_mode=mode)
        found: list[Any] = []
        ACKTR(envs, tiny()).learn(400, lambda stats, to=found: to.extend(stats.episodes))  # type: ignore[misc]
        assert found
        assert all(episode.reward == episode.length for episode in found)


def test_schedule_runs_anew_in_each_call_of_learn() -> None:
    agent = ACKTR("CartPole-v1", tiny())
    rates: list[float] = []
    for _ in range(2):
        agent.learn(64, lambda stats: rates.append(stats.metrics["train/learning_rate"]))
    assert rates[:4] == rates[4:]
    assert rates[0] > rates[3]


def test_agent_moves_to_another_number_of_environments(tmp_path: Path) -> None:
    ACKTR("Pendulum-v1", tiny("Pendulum-v1")).learn(64).save(tmp_path / "agent")
    envs = gymnasium.make_vec("Pendulum-v1", 1, vectorization_mode="sync")
    assert ACKTR.load(tmp_path / "agent", envs).learn(16).num_timesteps == 80  # as 2 x 8 steps


def test_integer_vectors_are_normalised() -> None:
    space = gymnasium.spaces.Box(0, 255, (4,), np.uint8)
    maker = [lambda: SpacesEnv(space, gymnasium.spaces.Discrete(2))] * 2
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    agent = ACKTR(gymnasium.vector.SyncVectorEnv(maker, autoreset_mode=mode), tiny("Pendulum-v1"))
    observations = agent.learn(64).trainer.collector.collect(16).observations
    assert np.abs(observations).max() < 5


def test_an_evaluation_ends_though_the_policy_never_ends_an_episode() -> None:
    env = variant(CountingEnv, {})
    agent = ACKTR(env, tiny(env)).learn(16)
    envs = make_vec(env, 2, 0, training=False)
    found = evaluate(agent.policy, envs, 3, seed=0, max_episode_steps=10)
    assert found.lengths == (10, 10, 10)
    assert found.returns == (55.0, 55.0, 55.0)
    assert found.cut == 3


def test_a_file_cannot_name_a_module_to_import(tmp_path: Path) -> None:
    agent = ACKTR("CartPole-v1", tiny())
    config = {**to_dict(agent.config), "env": "this:CartPole-v1"}
    meta = {"format": "acktr-agent", "config": config}
    save_checkpoint(tmp_path / "evil", agent.trainer.state_dict(), meta)
    with pytest.raises(CheckpointError, match="would import the module this; import it first"):
        ACKTR.load(tmp_path / "evil")
    assert "this" not in sys.modules


@pytest.mark.parametrize("kind", [A2C, TRPO])
def test_other_algorithms_have_the_same_interface(kind: Any, tmp_path: Path) -> None:
    agent = kind("CartPole-v1", seed=2).learn(600)
    agent.save(tmp_path / "agent")
    again = kind.load(tmp_path / "agent")
    assert again.config == agent.config
    assert again.config.algo == kind.algo
    observation = np.full(4, 0.1, np.float32)
    assert (
        agent.predict(observation, deterministic=True)[0]
        == again.predict(observation, deterministic=True)[0]
    )
    again.learn(100)
    with pytest.raises(CheckpointError, match=f"use {kind.__name__}.load"):
        ACKTR.load(tmp_path / "agent")
    with pytest.raises(ConfigError, match=f"use {kind.__name__}"):
        ACKTR("CartPole-v1", agent.config)


@pytest.mark.parametrize("agent", [ACKTR, A2C, TRPO])
def test_an_observation_of_one_number_without_an_axis(agent: Any) -> None:
    number = gymnasium.spaces.Box(-1.0, 1.0, (), np.float32)
    settings = {"observation_space": number, "action_space": gymnasium.spaces.Discrete(2)}
    name = variant(SpacesEnv, settings)
    made = agent(
        name,
        merge(preset(name, agent.algo)[0], {"algo": agent.algo, "num_envs": 2, "num_steps": 16}),
    )
    made.learn(64)
    assert made.num_timesteps == 64
    action, _ = made.predict(np.float32(0.5))
    assert np.shape(action) == ()
    actions, _ = made.predict(np.array([0.5, -0.5], np.float32))
    assert np.shape(actions) == (2,)
