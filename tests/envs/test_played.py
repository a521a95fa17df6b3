"""What is seen of steps that others take, what it costs, and what it leaves of environments."""

from __future__ import annotations

import copy
import inspect
import pickle
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv

from acktr.envs import GuardedVectorEnv, Witness, make_vec


class Laden(gymnasium.Env[Any, Any]):
    """Has a counter, and a lot of data that no step changes."""

    observation_space, action_space = spaces.Box(0, 1, (1,), np.float32), spaces.Discrete(2)

    def __init__(self) -> None:
        self.rows = [[0.5] * 500 for _ in range(1000)]
        self.table = np.zeros(10_000_000, np.int32)
        self.count = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.count += 1
        return np.zeros(1, np.float32), 0.0, False, False, {}


def test_what_the_users_own_steps_change_is_seen() -> None:
    one = Laden()
    envs = make_vec(one, 1)
    witness = Witness(envs)
    envs.reset()
    witness.note()
    started = time.process_time()
    assert not witness.played
    envs.step(np.zeros(1, np.int64))
    witness.note()
    one.rows.append([])
    assert not witness.played
    assert time.process_time() - started < 0.1
    one.step(0)
    assert witness.played
    envs.close()


def seen(env: Any) -> bool:
    """Whether a step by hand is, also in a vector that somebody else made."""
    envs = GuardedVectorEnv(SyncVectorEnv([lambda: env]), "Given", 0, foreign=True)
    witness = Witness(envs)
    envs.reset()
    witness.note()
    assert not witness.played
    env.step(0)
    return witness.played


class Floats(gymnasium.Env[Any, Any]):
    """Keeps nothing but a float."""

    observation_space, action_space = spaces.Box(0, 1, (1,), np.float32), spaces.Discrete(2)
    where = 0.0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.where += 0.5
        return np.zeros(1, np.float32), self.where, False, False, {}


class Frozen(Floats):
    """Its attributes are not to be set, but for one."""

    def __setattr__(self, name: str, value: Any) -> None:
        assert name == "where"
        super().__setattr__(name, value)


class Closed(Floats):
    """Its step cannot be replaced."""

    @property
    def step(self) -> Any:  # type: ignore[override]
        return super().step


def test_steps_that_change_nothing_but_floats_are_seen() -> None:
    assert seen(Floats())
    assert seen(Frozen())
    assert not seen(Closed())  # which does no harm


def test_a_counted_environment_is_what_it_was() -> None:
    """It may be copied and pickled, its methods look the same, and at the end they are."""
    one: Any = Floats()
    plain, kept = Floats(), one.reset
    one.reset = kept  # as somebody else may replace it
    envs = make_vec(one, 1)
    witness, other = Witness(envs), Witness(envs)
    envs.reset()
    witness.note()
    for name in ("reset", "step"):
        before, after = getattr(plain, name), getattr(one, name)
        assert inspect.signature(after) == inspect.signature(before)
        assert (after.__name__, after.__annotations__) == (name, before.__annotations__)
    unpickled = pickle.loads(pickle.dumps(one))  # noqa: S301 - of this test
    for again in (copy.deepcopy(one), unpickled):
        again.step(0)
        assert (one.where, again.where) == (0.0, 0.5)
        assert not witness.played
    del witness
    other.note()
    one.step(0)
    assert other.played
    del other
    assert {name: vars(one).get(name) for name in ("reset", "step")} == {
        "reset": kept,
        "step": None,
    }
    envs.close()
