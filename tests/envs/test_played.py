"""What is seen of steps that others take, and what it costs."""

from __future__ import annotations

import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from acktr.envs import Witness, make_vec


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
    witness.begin()
    envs.step(np.zeros(1, np.int64))
    witness.stepped()
    witness.note()
    one.rows.append([])
    assert not witness.played
    assert time.process_time() - started < 0.1
    one.step(0)
    assert witness.played
    envs.close()
