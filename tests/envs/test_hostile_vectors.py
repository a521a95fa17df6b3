"""Vector environments that somebody else made are checked as a batch."""

from __future__ import annotations

import re
import sys
import time
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from acktr import ACKTR
from acktr.config import Config
from acktr.envs import EnvFault, EnvWarning


class HostileVector(gymnasium.vector.VectorEnv[Any, Any, Any]):
    """Two environments in one object, which gives something else at step 3."""

    def __init__(self, **gives: Any) -> None:
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.num_envs = 2
        self.single_observation_space = spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.single_action_space = spaces.Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, 2)
        self.action_space = batch_space(self.single_action_space, 2)
        self._gives = gives
        self._steps = 0

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        self._do("reset")
        return np.zeros((2, 3), np.float32), {}

    def step(self, actions: Any) -> Any:
        self._steps += 1
        usual = {
            "obs": np.zeros((2, 3), np.float32),
            "rewards": np.zeros(2),
            "terminated": np.zeros(2, np.bool_),
            "truncated": np.zeros(2, np.bool_),
            "infos": {},
        }
        if self._steps == 3:
            self._do("step")
            usual |= {name: value for name, value in self._gives.items() if name in usual}
        return tuple(usual.values())

    def _do(self, when: str) -> None:
        if when in self._gives:
            self._gives[when]()


def learn(envs: HostileVector, **settings: Any) -> None:
    config = Config(env="HostileVector", num_envs=2, num_steps=4, device="cpu", **settings)
    ACKTR(envs, config).learn(16)


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        ({"obs": np.zeros((2, 2), np.float32)}, r"float32 (2, 2) at step 3, not as float32 (2, 3)"),
        ({"obs": np.full((2, 3), "x")}, "as <U1 (2, 3) at step 3, not as float32 (2, 3)"),
        ({"obs": np.full((2, 3), np.nan)}, "environment 0 of HostileVector returned a non-finite"),
        ({"rewards": ["1", "2"]}, "returned rewards ['1' '2'] at step 3, not numbers"),
        ({"rewards": np.array([0.0, 1e20])}, "environment 1 of HostileVector returned a too large"),
        ({"terminated": np.array([0.5, 0.0])}, "terminated [0.5 0. ] at step 3, not booleans"),
        ({"truncated": np.zeros(3)}, "truncated of shape (3,) at step 3, not (2,)"),
        ({"infos": None}, "HostileVector failed at step 3: TypeError: its infos are None"),
        ({"step": lambda: sys.exit(0)}, "HostileVector failed at step 3: SystemExit: 0"),
        ({"reset": lambda: 1 / 0}, "HostileVector failed at reset: ZeroDivisionError"),
    ],
)
def test_what_is_no_batch_is_named(gives: dict[str, Any], said: str) -> None:
    with pytest.raises(EnvFault, match=re.escape(said)):
        learn(HostileVector(**gives))


@pytest.mark.parametrize("call", ["step", "reset"])
def test_a_call_that_does_not_return_is_ended(call: str) -> None:
    started = time.monotonic()
    said = f"HostileVector did not return from {call}.* within 0.3 s; env_timeout sets the limit"
    with pytest.raises(EnvFault, match=said):
        learn(HostileVector(**{call: lambda: time.sleep(60)}), env_timeout=0.3)
    assert time.monotonic() - started < 10


def test_observations_outside_of_their_space_are_told_once() -> None:
    outside = np.array([[0, 0, 0], [0, 0, 3]], np.float32)
    with pytest.warns(EnvWarning, match=r"environment 1 of .* 3.0 at element \(2,\) at step 3"):
        learn(HostileVector(obs=outside))
