"""Small environments with known answers, for tests."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

Observation = NDArray[np.float32]


class IdentityEnv(gymnasium.Env[Observation, Any]):
    """The observation tells the action that is rewarded; every episode is truncated at `horizon`.

    Discrete, MultiDiscrete, MultiBinary: the observation is the (one-hot) target and the reward
    the share of right components. Box: the observation is a target in [-0.5, 0.5] and the reward
    minus the squared error.
    """

    def __init__(
        self,
        action_space: spaces.Space[Any],
        horizon: int = 20,
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = render_mode
        self.action_space = action_space
        self.horizon = horizon
        self._steps = 0
        self._target: NDArray[Any] = np.zeros(1)
        size = self._encode(self._draw()).size
        self.observation_space = spaces.Box(-1.0, 1.0, (size,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self._steps = 0
        self._target = self._draw()
        return self._encode(self._target), {}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        if isinstance(self.action_space, spaces.Box):
            reward = -float(np.sum((np.asarray(action) - self._target) ** 2))
        else:
            reward = float(np.mean(np.asarray(action) == self._target))
        self._steps += 1
        self._target = self._draw()
        return self._encode(self._target), reward, False, self._steps >= self.horizon, {}

    def _draw(self) -> NDArray[Any]:
        space = self.action_space
        if isinstance(space, spaces.Discrete):
            return np.asarray(self.np_random.integers(space.n) + space.start)
        if isinstance(space, spaces.MultiDiscrete):
            return np.asarray(self.np_random.integers(space.nvec))
        if isinstance(space, spaces.MultiBinary):
            return self.np_random.integers(0, 2, space.shape)
        return self.np_random.uniform(-0.5, 0.5, space.shape).astype(np.float32)

    def _encode(self, target: NDArray[Any]) -> Observation:
        space = self.action_space
        if isinstance(space, spaces.Discrete):
            return np.asarray(target - space.start == np.arange(space.n), np.float32)
        if isinstance(space, spaces.MultiDiscrete):
            rows = [np.eye(n)[t] for n, t in zip(space.nvec, target, strict=True)]
            return np.concatenate(rows).astype(np.float32)
        return np.asarray(target, np.float32).reshape(-1)


class CountingEnv(gymnasium.Env[Observation, Any]):
    """The observation is the number of steps in the episode, the reward the same number.

    The episode terminates after `terminate_at` steps or is truncated after `truncate_at`; with
    both None it does not end.
    """

    def __init__(
        self,
        terminate_at: int | None = None,
        truncate_at: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = render_mode
        self.observation_space = spaces.Box(0.0, np.inf, (1,), np.float32)
        self.action_space: spaces.Space[Any] = spaces.Discrete(2)
        self._ends = (terminate_at, truncate_at)
        self._count = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self._count = 0
        return self._observe(), {}

    def step(self, action: int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        self._count += 1
        terminated, truncated = (self._count == end for end in self._ends)
        return self._observe(), float(self._count), terminated, truncated, {"count": self._count}

    def _observe(self) -> Observation:
        return np.array([self._count], np.float32)


class StuckEnv(CountingEnv):
    """Asks for an orderly stop in its 40th step, and never returns from C then."""

    total = 0

    def step(self, action: int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        self.total += 1
        if self.total == 40:
            os.kill(os.getpid(), signal.SIGTERM)
            lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
            libc.pthread_mutex_lock(lock)
            libc.pthread_mutex_lock(lock)
        return super().step(action)


class FaultyEnv(gymnasium.Env[Observation, Any]):
    """Returns `value` as observation or reward, or raises, at step `at`.

    `what` is "observation", "final observation" (the episode ends there), "reward", "exception"
    or "reset". With `states` observations are Discrete. Only the instance number `index`
    misbehaves: the class counts them in `FaultyEnv.made`, which a test sets to 0 first.
    """

    made = 0

    def __init__(
        self,
        what: str = "observation",
        at: int = 3,
        index: int = 0,
        value: float = float("nan"),
        states: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = render_mode
        self.observation_space: Any = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        if states is not None:
            self.observation_space = spaces.Discrete(states)
        self.action_space: spaces.Space[Any] = spaces.Discrete(2)
        self._what, self._at, self._value = what, at, value
        self._bad = FaultyEnv.made == index
        FaultyEnv.made += 1
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observe("reset"), {}

    def step(self, action: int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        now = self._bad and self._steps == self._at
        if now and self._what == "exception":
            raise ZeroDivisionError("the toy\nbroke")
        reward = self._value if now and self._what == "reward" else 0.0
        ends = now and self._what == "final observation"
        return self._observe(self._what if now else ""), reward, ends, False, {}

    def _observe(self, what: str) -> Observation:
        obs = np.zeros(2, np.float32)
        bad_reset = what == "reset" == self._what and self._bad
        if bad_reset or what in ("observation", "final observation"):
            obs[1] = self._value
        discrete = isinstance(self.observation_space, spaces.Discrete)
        return np.int64(obs[1]) if discrete else obs  # type: ignore[return-value]


class SpacesEnv(gymnasium.Env[Any, Any]):
    """Any pair of spaces; observations are samples; keeps the last action; ends at step 5."""

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = render_mode
        self.observation_space = observation_space
        self.action_space = action_space
        self._steps = 0
        self.last_action: Any = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self._steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.last_action = action
        self._steps += 1
        return self.observation_space.sample(), 1.0, False, self._steps == 5, {}


IDENTITY_ACTIONS: dict[str, spaces.Space[Any]] = {
    "Discrete": spaces.Discrete(4),
    "Box": spaces.Box(-1.0, 1.0, (2,), np.float32),
    "MultiDiscrete": spaces.MultiDiscrete([3, 2]),
    "MultiBinary": spaces.MultiBinary(3),
}


def variant(toy: type[gymnasium.Env[Any, Any]], settings: dict[str, Any]) -> str:
    """Register a toy with constructor arguments under a new id, and return the id."""
    number = sum(spec.namespace == "toys" for spec in gymnasium.registry.values())
    env_id = f"toys/Variant{number}-v0"
    gymnasium.register(env_id, entry_point=f"{toy.__module__}:{toy.__name__}", kwargs=settings)
    return env_id


def register() -> None:
    """Register `toys/Identity<Kind>-v0`, `toys/Counting-v0` and `toys/Faulty-v0`."""
    if "toys/Counting-v0" in gymnasium.registry:
        return
    for kind, space in IDENTITY_ACTIONS.items():
        gymnasium.register(
            f"toys/Identity{kind}-v0",
            entry_point="tests.tools.toys:IdentityEnv",
            kwargs={"action_space": space},
        )
    gymnasium.register(
        "toys/Counting-v0", entry_point="tests.tools.toys:CountingEnv", kwargs={"terminate_at": 5}
    )
    gymnasium.register("toys/Stuck-v0", entry_point="tests.tools.toys:StuckEnv")
    gymnasium.register("toys/Faulty-v0", entry_point="tests.tools.toys:FaultyEnv")


register()


class Forced(gymnasium.vector.VectorWrapper):
    """Every third step of one environment is not the agent's own."""

    turn = 0

    def step(self, actions: Any) -> Any:
        observation, rewards, terminated, truncated, infos = self.env.step(actions)
        self.turn += 1
        infos["forced"] = np.array([self.turn % 3 == 0, False])
        return observation, rewards, terminated, truncated, infos
