"""Groups of environments that can be stepped one while the policy acts for another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from envs.guard import Array, StepResult
from envs.parallel import chosen_envs
from envs.spaces import check_actions


class Group(Protocol):
    """A vector environment whose step has a beginning and an end."""

    metadata: dict[str, Any]

    @property
    def num_envs(self) -> int:
        """Environments."""

    @property
    def single_observation_space(self) -> Any:
        """Of one environment."""

    @property
    def single_action_space(self) -> Any:
        """Of one environment."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """As a vector environment does."""

    def step_async(self, actions: Any) -> None:
        """Begin a step."""

    def step_wait(self) -> StepResult:
        """Wait for its end."""

    def close(self) -> None:
        """End."""


class GroupedEnvs(VectorEnv[Any, Any, Any]):
    """Vector environments of one kind and size as a single one; they take the step together.

    Who wants to act for one group while another is stepped uses the groups themselves.

    Args:
        groups: The environments, in order; this object owns them from now on.

    Raises:
        ValueError: There is none, or their sizes differ.
    """

    reports_episodes = True
    """Its infos have the statistics of ended episodes if those of the groups have."""

    def __init__(self, groups: Sequence[Group]) -> None:
        if len({group.num_envs for group in groups}) != 1:
            raise ValueError("groups must be of one size")
        self.groups = tuple(groups)
        first = self.groups[0]
        self.num_envs = len(self.groups) * first.num_envs
        self.metadata = first.metadata
        self.single_observation_space = first.single_observation_space
        self.single_action_space = first.single_action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Reset all environments, or those of `options["reset_mask"]`."""
        masks: list[dict[str, Any] | None] = [options] * len(self.groups)
        if options is not None and "reset_mask" in options:
            chosen = chosen_envs(options["reset_mask"], self.num_envs)
            masks = [{**options, "reset_mask": part} for part in self._split(chosen)]
        found = [
            group.reset(seed=seed, options=mask)
            for group, mask in zip(self.groups, masks, strict=True)
        ]
        observations, infos = zip(*found, strict=True)
        return np.concatenate(observations), self._joined(infos)

    def step(self, actions: Any) -> StepResult:
        """Step all environments."""
        batch = check_actions(actions, self.single_action_space, self.num_envs)
        for group, part in zip(self.groups, self._split(batch), strict=True):
            group.step_async(part)
        results = [group.step_wait() for group in self.groups]
        *arrays, infos = zip(*results, strict=True)
        observations, rewards, terminated, truncated = (np.concatenate(part) for part in arrays)
        return observations, rewards, terminated, truncated, self._joined(infos)

    def close_extras(self, **kwargs: Any) -> None:
        """Close the groups."""
        for group in self.groups:
            group.close()

    def _split(self, rows: Array) -> list[Array]:
        size = self.groups[0].num_envs
        return [rows[first : first + size] for first in range(0, len(rows), size)]

    def _joined(self, infos: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The infos of all groups; zeros where a group lacks an entry that another has."""
        size = self.groups[0].num_envs
        joined: dict[str, Any] = {}
        for name in dict.fromkeys(key for info in infos for key in info):
            present = [info[name] for info in infos if name in info]
            if isinstance(present[0], dict):
                joined[name] = self._joined([info.get(name, {}) for info in infos])
                continue
            shape = (size, *present[0].shape[1:])
            absent = np.zeros(shape, present[0].dtype)
            joined[name] = np.concatenate([info.get(name, absent) for info in infos])
        if "env_id" in joined:
            joined["env_id"] = np.arange(self.num_envs, dtype=joined["env_id"].dtype)
        return joined
