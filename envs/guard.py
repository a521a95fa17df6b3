"""Checks around Gymnasium environments: exceptions, finite values, actions, final observations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from numpy.typing import NDArray

from acktr.envs.episodes import EpisodeStats
from acktr.envs.seeding import check_seed, env_seeds
from acktr.envs.settings import EnvError, EnvFault
from acktr.envs.spaces import check_actions

Array = NDArray[Any]
StepResult = tuple[Array, Array, Array, Array, dict[str, Any]]
if TYPE_CHECKING:
    AnyVectorWrapper = VectorWrapper[Any, Any, Any, Any, Any]
else:  # Gymnasium 1.2 has no generic VectorWrapper at run time
    AnyVectorWrapper = VectorWrapper


def one_line(error: BaseException) -> str:
    """The message of an exception on one line, with its type if there is no message."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


class SafeEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """One environment: exceptions name it, and integer spaces start at zero.

    Discrete and MultiDiscrete spaces with another start are shifted to zero.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], name: str, index: int) -> None:
        super().__init__(env)
        self._label = f"environment {index} of {name}"
        self._steps = 0
        self._action_start = _start(env.action_space)
        self._obs_start = _start(env.observation_space)
        if self._action_start is not None:
            self.action_space = _from_zero(env.action_space)
        if self._obs_start is not None:
            self.observation_space = _from_zero(env.observation_space)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset; see `gymnasium.Env.reset`."""
        try:
            obs, info = self.env.reset(seed=seed, options=options)
        except Exception as error:
            raise self._fault(error, "reset") from error
        return self._shift(obs), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step; see `gymnasium.Env.step`."""
        self._steps += 1
        if self._action_start is not None:
            action = action + self._action_start
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
        except Exception as error:
            raise self._fault(error, f"step {self._steps}") from error
        return self._shift(obs), reward, terminated, truncated, info

    def render(self) -> Any:
        """Render; a missing dependency or display becomes an EnvError."""
        try:
            return self.env.render()
        except Exception as error:
            raise EnvError(f"{self._label} cannot be rendered: {one_line(error)}") from error

    def _shift(self, obs: Any) -> Any:
        return obs if self._obs_start is None else obs - self._obs_start

    def _fault(self, error: Exception, when: str) -> EnvFault:
        return EnvFault(f"{self._label} raised {type(error).__name__} at {when}: {one_line(error)}")


class GuardedVectorEnv(AnyVectorWrapper):
    """A Gymnasium vector environment with the guarantees of `envs` (see the package).

    Args:
        env: The vector environment, under either same-step or next-step autoreset.
        name: For messages.
        seed: Of the first reset.
        foreign: Made by somebody else: its seeds, actions and infos are passed through as they
            are, except for the statistics of episodes.
    """

    reports_episodes = True
    """Its infos have the statistics of ended episodes."""

    def __init__(
        self, env: VectorEnv[Any, Any, Any], name: str, seed: int, *, foreign: bool = False
    ) -> None:
        super().__init__(env)
        self._foreign = foreign
        self._next_step = env.metadata.get("autoreset_mode") == AutoresetMode.NEXT_STEP
        self._dead = np.zeros(env.num_envs, np.bool_)
        self._name = name
        self._seed: int | None = check_seed(seed)
        self._steps = 0
        self._stats = EpisodeStats(env.num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Reset all environments, or those of `options["reset_mask"]`."""
        seed, self._seed = (self._seed if seed is None else check_seed(seed)), None
        mask = (options or {}).get("reset_mask")
        seeds: Any = seed
        if seed is not None and not self._foreign:
            seeds = env_seeds(seed, self.num_envs)  # sync environments take a list of seeds
        obs, infos = self.env.reset(seed=seeds, options=options)
        self._check_observations(obs, "observation", "reset")
        self._stats.reset(mask)
        self._dead[slice(None) if mask is None else mask] = False
        return obs, infos

    def step(self, actions: Any) -> StepResult:
        """Step all environments."""
        batch = actions
        if not self._foreign:
            batch = check_actions(actions, self.single_action_space, self.num_envs)
        self._steps += 1
        when = f"step {self._steps}"
        try:
            obs, rewards, terminated, truncated, infos = self.env.step(batch)
        except EnvFault:
            raise
        except Exception as error:
            raise EnvFault(
                f"{self._name} failed at {when}: {type(error).__name__}: {one_line(error)}"
            ) from error
        alive = ~self._dead
        dones = (terminated | truncated) & alive
        self._dead = dones & self._next_step
        self._check_finite(rewards, "reward", when)
        if dones.any() and not self._next_step:
            infos["final_obs"] = _dense(infos["final_obs"], dones, obs)
            infos["_final_obs"] = dones.copy()
            self._check_observations(infos["final_obs"], "final observation", when, dones)
        self._check_observations(obs, "observation", when)
        for key in ("episode", "_episode"):
            infos.pop(key, None)
        if not self._foreign:
            infos.pop("forced", None)
        infos.update(self._stats.step(rewards, dones, alive))
        return obs, rewards, terminated, truncated, infos

    def _check_observations(
        self, values: Array, what: str, when: str, mask: Array | None = None
    ) -> None:
        """Finite numbers, or integers that the Discrete space has; others than the mask's pass."""
        space = self.single_observation_space
        if not isinstance(space, spaces.Discrete):
            self._check_finite(values, what, when)
            return
        good = (values >= space.start) & (values < space.start + space.n)
        if mask is not None:
            good |= ~mask
        if not good.all():
            index = int(np.argmin(good))
            raise EnvFault(
                f"environment {index} of {self._name} returned the {what} {values[index]} at"
                f" {when}, which is not in range for {space}"
            )

    def _check_finite(self, values: Array, what: str, when: str) -> None:
        if values.dtype.kind != "f":
            return
        finite = np.isfinite(values)
        if finite.all():
            return
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        place = f" at element {where[1:]}" if len(where) > 1 else ""
        raise EnvFault(
            f"environment {where[0]} of {self._name} returned a non-finite {what} at {when}: "
            f"{values[where]}{place}"
        )


def _dense(rows: Any, mask: Array, like: Array) -> Array:
    """Final observations as one numeric array shaped as `like`, zero where no episode ended."""
    dense = np.zeros_like(like)
    for index in np.flatnonzero(mask):
        dense[index] = rows[index]
    return dense


def _start(space: spaces.Space[Any]) -> Any:
    """The start of an integer space if it is not zero, else None."""
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) and np.any(space.start != 0):
        return space.start
    return None


def _from_zero(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """The same integer space, starting at zero."""
    if isinstance(space, spaces.Discrete):
        return spaces.Discrete(int(space.n))
    if isinstance(space, spaces.MultiDiscrete):
        return spaces.MultiDiscrete(space.nvec)
    return space
