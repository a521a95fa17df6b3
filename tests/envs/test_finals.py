"""Last observations that are the next episode's first ones are told, others are not."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from acktr.envs import EnvError, EnvWarning, GuardedVectorEnv, make_vec


class Buffered(gymnasium.Env[Any, Any]):
    """Counts to three in one and the same array, or in a new one each time."""

    action_space = spaces.Discrete(2)

    def __init__(
        self, reused: bool = True, kind: Any = np.float32, rate: int = 1, **more: Any
    ) -> None:
        self.observation_space: Any = spaces.Box(0, 9, (2,), kind)
        self.array, self.reused, self.rate = np.zeros(2, kind), reused, rate
        self.home, self.cut = more.get("home", False), more.get("cut", True)

    def _seen(self) -> Any:
        self.array[:] = self.rate * (0 if self.home and self.count == 3 else self.count)
        return self.array if self.reused else self.array.copy()

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.count = 0
        return self._seen(), {}

    def step(self, action: Any) -> Any:
        self.count += 1
        over = self.count == 3
        return self._seen(), 1.0, over and not self.cut, over and self.cut, {}


def warned(make: Any, steps: int = 24, own: bool = False) -> list[str]:
    """What is said in some steps of two environments."""
    same = AutoresetMode.SAME_STEP
    envs: Any
    if own:
        envs = make_vec(make, 2)
    else:
        two = SyncVectorEnv([make, make], autoreset_mode=same)
        envs = GuardedVectorEnv(two, "Buffered", 0, foreign=True)
    envs.reset()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(steps):
            envs.step(np.zeros(2, np.int64))
    envs.close()
    return [str(each.message) for each in told if each.category is EnvWarning]


def test_an_array_that_is_used_again_is_told_once() -> None:
    (line,) = warned(Buffered)
    assert line.startswith("environment 0 of Buffered gave final observations that are the first")
    assert "must return a copy()" in line


def test_pictures_that_are_used_again_are_told() -> None:
    assert warned(lambda: Buffered(kind=np.uint8))
    assert warned(lambda: Buffered(kind=np.int8, home=True))  # the numbers of which are the same


class Parts(Buffered):
    """The array is one of several parts."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        one = self.observation_space
        self.observation_space = spaces.Dict(fresh=one, deep=spaces.Tuple((one, one)))

    def _seen(self) -> Any:
        seen = super()._seen()
        return {"fresh": seen.copy(), "deep": (seen.copy(), seen)}


class Table(Buffered):
    """Shows rows of a table, which it never changes, and ends where it begins."""

    rows = np.arange(6, dtype=np.float32).reshape(3, 2)

    def _seen(self) -> Any:
        return self.rows[self.count % 3]


def test_a_part_that_is_used_again_is_told() -> None:
    assert warned(Parts)
    assert not warned(lambda: Parts(reused=False))


def test_what_is_right_or_no_harm_is_not_told() -> None:
    assert not warned(Buffered, own=True)  # which copies
    assert not warned(lambda: Buffered(reused=False))
    assert not warned(lambda: Buffered(rate=0))  # whose observations are all the same
    assert not warned(Table)
    assert not warned(lambda: Buffered(reused=False, home=True))  # ends where it begins
    assert not warned(lambda: Buffered(cut=False))  # whose last observations have no value


def test_an_instance_that_is_twice_in_a_vector_is_refused() -> None:
    one = Buffered(reused=False)
    twice = SyncVectorEnv([lambda: one, lambda: one], autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(EnvError, match=r"Two: environments 0 and 1 are one and the same: the func"):
        GuardedVectorEnv(twice, "Two", 0, foreign=True)


def test_views_of_one_simulation_are_no_twins() -> None:
    """As the agents of one world, which a vector of somebody else's steps together."""

    class World(SyncVectorEnv):
        pass

    one = Buffered(reused=False)
    views = World([lambda: one, lambda: one], autoreset_mode=AutoresetMode.SAME_STEP)
    GuardedVectorEnv(views, "World", 0, foreign=True).reset()
