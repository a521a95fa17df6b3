"""Numbers in the infos of episodes' last steps, from every kind of environment."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space

from acktr import ACKTR, ConfigError, EnvError, EnvFault, preset
from acktr.config import from_dict
from acktr.envs import GuardedVectorEnv, make_vec
from acktr.envs.episodes import last_infos, number
from acktr.evaluate import evaluate
from tests.tools.toys import CountingEnv


class Ratio(CountingEnv):
    """Its episodes of 3 and 4 steps end with the ratio 10 * length in their last info."""

    made = 0

    def __init__(self, last: bool = True) -> None:
        super().__init__(truncate_at=3 + Ratio.made % 2)
        Ratio.made += 1
        self._last = last

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        if truncated and self._last:
            info["ratio"] = np.float32(10 * info["count"])
        return obs, reward, terminated, truncated, info


def config(**changes: Any) -> Any:
    base = dataclasses.replace(preset("x")[0], num_envs=2, num_steps=8, **changes)
    return dataclasses.replace(base, normalize_observation=False)


@pytest.fixture(autouse=True)
def counted() -> None:
    Ratio.made = 0


def vector(kind: str) -> Any:
    if kind.isdigit():
        return Ratio
    name, _, mode = kind.partition(" ")
    make = SyncVectorEnv if name == "sync" else AsyncVectorEnv
    makers = [lambda: _numbered(0), lambda: _numbered(1)]
    return make(makers, autoreset_mode=AutoresetMode[mode])


def _numbered(index: int) -> Ratio:
    Ratio.made = index
    return Ratio()


@pytest.mark.parametrize("kind", ["1", "2", "sync SAME_STEP", "sync NEXT_STEP", "async SAME_STEP"])
def test_the_last_step_counts_in_every_kind_of_environment(kind: str) -> None:
    found: list[Any] = []
    settings = config(env_workers=int(kind) if kind.isdigit() else 1)
    agent = ACKTR(vector(kind), settings, record=("ratio", "count"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent.learn(96, lambda stats: found.extend(stats.episodes))
    assert {episode.length for episode in found} == {3, 4}
    for episode in found:
        assert episode.info == {"ratio": 10.0 * episode.length, "count": episode.length}
    agent.envs.close()


def test_evaluation_has_them_but_not_of_episodes_cut_short() -> None:
    agent = ACKTR(Ratio, config())
    envs = make_vec(Ratio, 2, record=("ratio",))
    played = evaluate(agent.policy, envs, 4, seed=0)
    assert [info["ratio"] for info in played.infos] == [10.0 * n for n in played.lengths]
    assert played.mean_of("ratio") == 10 * np.mean(played.lengths)
    cut = evaluate(agent.policy, envs, 2, seed=0, max_episode_steps=3)
    assert [info.get("ratio") for info in cut.infos] == [30.0, None]
    assert cut.mean_of("ratio") == 30.0
    assert math.isnan(cut.mean_of("other"))
    envs.close()


@pytest.mark.parametrize("kind", ["worker", "sync"])
def test_a_number_that_is_missing_is_told_once(kind: str) -> None:
    envs: Any = make_vec(Ratio, 2, env_kwargs={"last": False}, record=("ratio", "count"))
    if kind == "sync":
        mode = AutoresetMode.SAME_STEP
        sync = SyncVectorEnv([lambda: Ratio(False)] * 2, autoreset_mode=mode)
        envs = GuardedVectorEnv(sync, "Ratio", 0, foreign=True, record=("ratio", "count"))
    envs.reset()
    with pytest.warns(UserWarning, match="has no number 'ratio', which is to be recorded") as told:
        for _ in range(12):
            infos = envs.step(np.zeros(2, np.int64))[4]
    assert len(told) == 1
    assert np.isnan(infos["recorded"]["ratio"]).all()
    envs.close()


def test_numbers_and_what_is_none() -> None:
    assert [number(value) for value in (3, np.float32(0.5), True, np.array([2]))] == [3, 0.5, 1, 2]
    for value in (None, "3", [1, 2], np.array([]), {}):
        assert math.isnan(number(value))
    ended = np.array([True, False, True])
    infos = {"a": np.array([1.0, 2.0, 3.0]), "_a": np.array([True, True, False])}
    np.testing.assert_array_equal(last_infos(infos, ("a",), ended, True)["a"], [1, np.nan, np.nan])
    infos = {"final_info": {"a": [4.0, 5.0, 6.0]}, **infos}
    np.testing.assert_array_equal(last_infos(infos, ("a",), ended, True)["a"], [4, np.nan, 6])
    np.testing.assert_array_equal(last_infos(infos, ("a",), ended, False)["a"], [1, np.nan, np.nan])


@pytest.mark.parametrize("record", [("r",), ("",), ("a", "a"), ("a\nb",), (3,), "ratio"])
def test_keys_that_cannot_be_recorded(record: Any) -> None:
    with pytest.raises(ConfigError, match="record must be"):
        from_dict({"env": "X-v0", "record": record})


def test_where_nothing_can_be_recorded() -> None:
    with pytest.raises(EnvError, match="Atari games have nothing to record"):
        make_vec("ALE/Pong-v5", 2, record=("lives",))
    envs = make_vec(Ratio, 2)
    with pytest.raises(EnvError, match="give record= to that as well"):
        ACKTR(envs, record="ratio")
    envs.close()


class Foreign(VectorEnv[Any, Any, Any]):
    """Reward 1 in some form at each step; the second environment is cut after 2 steps."""

    def __init__(self, final: bool = True, form: str = "column", ends: str = "truncated") -> None:
        self.num_envs, self._final, self._form, self._ends = 2, final, form, ends
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = gymnasium.spaces.Box(-1.0, 9.0, (1,), np.float32)
        self.single_action_space = gymnasium.spaces.Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, 2)
        self.action_space = batch_space(self.single_action_space, 2)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        self._count = 0
        return np.zeros((2, 1), np.float32), {}

    def step(self, actions: Any) -> Any:
        self._count += 1
        rewards: Any = np.ones((2, 1)) if self._form == "column" else [1, 1]
        rewards = np.ones(3) if self._form == "wrong" else rewards
        over = [False, self._count % 2 == 0]
        flags = {"terminated": [False, False], "truncated": [False, False], self._ends: over}
        last = np.array([None, np.full(1, 2, np.float32)], object)
        infos = {"final_obs": last} if self._final and over[1] else {}
        obs = np.full((2, 1), self._count % 2, np.float32)
        return obs, rewards, flags["terminated"], flags["truncated"], infos


@pytest.mark.parametrize("form", ["column", "list"])
def test_rewards_and_ends_in_other_forms(form: str) -> None:
    found: list[Any] = []
    ACKTR(Foreign(form=form), config()).learn(32, lambda s: found.extend(s.episodes))
    assert {(episode.reward, episode.length) for episode in found} == {(2.0, 2)}


def test_what_a_vector_environment_lacks_is_told_in_one_line() -> None:
    with pytest.raises(
        EnvFault, match=r"environment 1 .* was truncated at step 2 without its last"
    ):
        ACKTR(Foreign(final=False), config()).learn(32)
    ACKTR(Foreign(final=False, ends="terminated"), config()).learn(32)
    with pytest.raises(EnvFault, match=r"rewards of shape \(3,\) at step 1, not \(2,\)"):
        ACKTR(Foreign(form="wrong"), config()).learn(32)


class Solvable(CountingEnv):
    """Its episodes of 3 steps are solved in turn; with ``says``, their last info tells."""

    def __init__(self, says: bool = True) -> None:
        super().__init__(truncate_at=3)
        self._says, self._ended = says, 0

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        if truncated and self._says:
            self._ended += 1
            info["is_success"] = self._ended % 2 == 0
        return obs, reward, terminated, truncated, info


@pytest.mark.parametrize("foreign", [False, True])
def test_success_is_recorded_without_being_asked_for(foreign: bool) -> None:
    """As its rate in training and evaluation; where nothing is said there is none, silently."""
    for says in (True, False):
        place: Any = lambda says=says: Solvable(says)  # noqa: E731
        mode = AutoresetMode.SAME_STEP
        env: Any = SyncVectorEnv([place] * 2, autoreset_mode=mode) if foreign else place
        found: list[Any] = []
        agent = ACKTR(env, config())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            agent.learn(96, found.append)
            played = agent.evaluate(place, episodes=16)
        infos = [episode.info for stats in found for episode in stats.episodes]
        assert len(infos) > 20
        if says:
            assert {info["is_success"] for info in infos} == {0.0, 1.0}
            assert played.mean_of("is_success") == 0.5
        else:
            assert infos == [{}] * len(infos)
            assert played.infos == ({},) * 16
