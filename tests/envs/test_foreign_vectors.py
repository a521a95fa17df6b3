"""What would go wrong in silence with environments of other programs is refused, or right."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper

from acktr import A2C
from acktr.envs import EnvError, GuardedVectorEnv, found_masks, make_vec


class Counted(gymnasium.Env[Any, Any]):
    """Ten steps of reward 1; the info says which action is allowed."""

    observation_space = gymnasium.spaces.Box(0, 20, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        self.count += 1
        return np.full(2, self.count, np.float32), 1.0, self.count == 10, False, {}


def test_evaluations_refuse_what_training_refuses() -> None:
    with A2C(Counted, num_envs=2, num_steps=8) as agent:
        envs = SyncVectorEnv([Counted, Counted], autoreset_mode=AutoresetMode.DISABLED)
        with pytest.raises(EnvError, match="declares autoreset mode"):
            agent.evaluate(envs, episodes=4)
        fit = SyncVectorEnv([Counted, Counted], autoreset_mode=AutoresetMode.NEXT_STEP)
        assert agent.evaluate(fit, episodes=4).lengths == (10,) * 4


@pytest.mark.parametrize("listed", [False, True])
def test_one_environment_is_not_several(listed: bool) -> None:
    one = Counted()
    given: Any = [lambda: one, lambda: one] if listed else lambda: one
    with pytest.raises(EnvError, match=r"0 and 1 are one and the same: .* a new one each time"):
        A2C(given, num_envs=2)
    A2C(given if not listed else [lambda: one], num_envs=1).close()


def test_an_instance_that_is_twice_in_a_vector_is_refused() -> None:
    one = Counted()
    twice = SyncVectorEnv([lambda: one, lambda: one], autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(EnvError, match=r"Two: environments 0 and 1 are one and the same: the func"):
        GuardedVectorEnv(twice, "Two", 0, foreign=True)


def test_views_of_one_simulation_are_no_twins() -> None:
    """As the agents of one world, which a vector of somebody else's steps together."""

    class World(SyncVectorEnv):
        pass

    one = Counted()
    views = World([lambda: one, lambda: one], autoreset_mode=AutoresetMode.SAME_STEP)
    GuardedVectorEnv(views, "World", 0, foreign=True).reset()


class Masking(VectorWrapper):  # type: ignore[type-arg]
    def action_masks(self) -> Any:
        return np.tile([False, True, True], (self.num_envs, 1))


def test_masks_of_a_wrapper_around_a_vector_count() -> None:
    seen: list[Any] = []

    class Seen(Counted):
        def step(self, action: Any) -> Any:
            seen.append(int(action))
            return super().step(action)

    envs = Masking(SyncVectorEnv([Seen, Seen], autoreset_mode=AutoresetMode.SAME_STEP))
    with A2C(envs, num_steps=16) as agent:
        agent.learn(64)
        assert found_masks(agent.envs).source == "action_masks"
    assert set(seen) == {1, 2}


class Flags(VectorWrapper):  # type: ignore[type-arg]
    """Ends as numbers, as C and old code have them."""

    def step(self, actions: Any) -> Any:
        obs, rewards, terminated, truncated, infos = self.env.step(actions)
        return obs, rewards, terminated.astype(np.int8), truncated.astype(np.float32), infos


def test_ends_may_be_numbers() -> None:
    lengths: dict[bool, list[Any]] = {}
    for wrapped in (False, True):
        envs: VectorEnv[Any, Any, Any] = SyncVectorEnv(
            [Counted, Counted], autoreset_mode=AutoresetMode.SAME_STEP
        )
        with A2C(Flags(envs) if wrapped else envs, num_steps=16, seed=0) as agent:
            lengths[wrapped] = []

            def keep(stats: Any, found: Any = lengths[wrapped]) -> None:
                found.extend((each.reward, each.length) for each in stats.episodes)

            agent.learn(96, keep)
    assert lengths[True] == lengths[False] and len(lengths[True]) == 8


def test_processes_of_gymnasium_are_taken_as_before() -> None:
    envs = AsyncVectorEnv([Counted, Counted], autoreset_mode=AutoresetMode.NEXT_STEP)
    with A2C(envs, num_steps=16) as agent:
        agent.learn(64)
    envs.close()
    plain = make_vec(Counted, 2)
    assert found_masks(plain).source is None
    plain.close()


class Forcing(Counted):
    """Has a word of its own that this package knows as well."""

    def step(self, action: Any) -> Any:
        return *super().step(action)[:4], {"forced": True}


@pytest.mark.parametrize("own", [True, False])
def test_forced_is_a_word_of_others_too(own: bool) -> None:
    """Nothing at all was learned from such environments."""
    pair = [Forcing, Forcing]
    envs = pair if own else SyncVectorEnv(pair, autoreset_mode=AutoresetMode.SAME_STEP)
    with A2C(envs, num_steps=8) as agent:
        assert agent.trainer.collector.collect(8).valid.all()


class Pictures(gymnasium.Env[Any, Any]):
    observation_space = gymnasium.spaces.Box(0, 255, (3, 36, 36), np.uint8)
    action_space = gymnasium.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros((3, 36, 36), np.uint8), {}

    def step(self, action: Any) -> Any:
        return np.zeros((3, 36, 36), np.uint8), 1.0, True, False, {}


def test_predictions_do_not_cut_numbers_off() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (3, 36, 36), np.uint8)
    with A2C(Pictures, num_envs=1, num_steps=4) as agent:
        value = agent.value(picture)
        assert agent.value(picture.astype(np.int64)) == value
        assert agent.value(picture.astype(np.float32)) == value
        for wrong in (picture / 255.0, picture.astype(np.int64) + 256, picture.astype(float) - 1):
            for ask in (agent.value, agent.predict):
                with pytest.raises(ValueError, match="does not fit uint8"):
                    ask(wrong)  # type: ignore[operator]
