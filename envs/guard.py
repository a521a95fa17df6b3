"""Checks around a vector environment: finite values, actions, final observations, episodes."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from acktr.envs.episodes import EpisodeStats
from acktr.envs.errors import EnvFault, named
from acktr.envs.spaces import check_actions
from acktr.envs.vector import AnyVectorWrapper, Array, StepResult, check_seed, env_seeds


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
            raise EnvFault(f"{self._name} failed at {when}: {named(error)}") from error
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
