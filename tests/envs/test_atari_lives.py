"""The Atari layer on a scripted native environment: lives, FIRE, final observations, resets."""

from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from acktr.envs import AtariSettings, env_seeds
from acktr.envs.atari import AtariEnvs


class Script(VectorEnv[Any, Any, Any]):
    """Two games whose lives and ends are given; observations are 7 in every row."""

    def __init__(self, lives: list[list[int]], ends: list[list[bool]]) -> None:
        self.num_envs = 2
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = spaces.Box(0, 255, (3,), np.uint8)
        self.single_action_space = spaces.Discrete(4)
        self.lives, self.ends = lives, ends
        self.time = 0
        self.received: list[list[int]] = []
        self.seeds: list[Any] = []

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.seeds.append(seed)
        return np.full((2, 3), 7, np.uint8), {"lives": np.array(self.lives[self.time], np.int32)}

    def send(self, actions: Any) -> None:
        self.received.append(actions.tolist())

    def recv(self) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self.time += 1
        infos = {"lives": np.array(self.lives[self.time], np.int32)}
        ends = np.array(self.ends[self.time])
        if ends.any():
            infos["final_obs"] = np.full((2, 3), 9, np.uint8)
        obs = np.full((2, 3), 7, np.uint8)
        return obs, np.array([2, -3], np.int32), ends, np.zeros(2, bool), infos


def layer(native: Any) -> AtariEnvs:
    return AtariEnvs(native, AtariSettings(), training=True, press_fire=True, seed=0)


def test_life_loss_needs_a_life_left_and_a_game_that_goes_on() -> None:
    # Game 0: loses one of three lives, then falls to 0 while the game goes on (as QBert does),
    # then ends. Game 1: gains a life, and ends at a step that shows fewer lives (a new game).
    lives = [[3, 3], [2, 4], [0, 3], [3, 3]]
    ends = [[False, False], [False, False], [False, True], [True, False]]
    native = Script(lives, ends)
    vec = layer(native)
    vec.reset()
    flags, forced = [], []
    for _ in range(3):
        obs, rewards, terminated, _, infos = vec.step(np.array([2, 3]))
        flags.append(terminated.tolist())
        forced.append(infos["forced"].tolist())
        np.testing.assert_array_equal(rewards, [1, -1])
        np.testing.assert_array_equal(obs, 7)
        ended = native.ends[native.time]
        assert ("_final_obs" in infos) == ("episode" in infos) == any(ended)
        if any(ended):
            np.testing.assert_array_equal(infos["_final_obs"], ended)
            np.testing.assert_array_equal(infos["final_obs"][:, 0], np.where(ended, 9, 0))
    assert flags == [[True, False], [False, True], [True, False]]
    assert forced == [[False, False], [True, False], [False, False]]
    assert native.received == [[2, 3], [1, 3], [2, 3]]
    np.testing.assert_array_equal(infos["episode"]["r"], [6, 0])
    np.testing.assert_array_equal(infos["episode"]["l"], [3, 0])


def test_partial_reset_forgets_the_pending_fire_and_seeds_the_chosen() -> None:
    native = Script([[3, 3], [2, 2], [2, 2]], [[False, False]] * 3)
    vec = layer(native)
    vec.reset(seed=4)
    vec.step(np.array([0, 0]))
    vec.reset(seed=5, options={"reset_mask": np.array([False, True])})
    infos = vec.step(np.array([0, 0]))[4]
    np.testing.assert_array_equal(infos["forced"], [True, False])
    assert native.received[-1] == [1, 0]
    np.testing.assert_array_equal(native.seeds[0], env_seeds(4, 2))
    np.testing.assert_array_equal(native.seeds[1], env_seeds(5, 2)[1:])
