"""Groups of environments that can be stepped one while the policy acts for another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from acktr.envs.errors import UnsavedError
from acktr.envs.spaces import check_actions
from acktr.envs.values import Tree
from acktr.envs.vector import Array, StepResult, check_mask


class Stepper(Protocol):
    """Environments whose step has a beginning and an end."""

    def step_async(self, actions: Any) -> None:
        """Begin a step."""

    def step_wait(self) -> StepResult:
        """Wait for its end."""


class Group(Stepper, Protocol):
    """Such a vector environment; a whole reset gives up a step that is under way."""

    metadata: dict[str, Any]
    single_observation_space: Any
    single_action_space: Any

    @property
    def num_envs(self) -> int:
        """Number of environments."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Reset as a vector environment does; a `reset_mask` may select none."""

    def close(self) -> None:
        """Close the environments."""


class GroupedEnvs(VectorEnv[Any, Any, Any]):
    """Vector environments of one kind and size as a single one; they take the step together.

    Who wants to act for one group while another is stepped uses the groups themselves, and ends
    all steps before using this object again.

    Args:
        groups: The environments, in order; this object owns them from now on.

    Raises:
        ValueError: There is none, or their sizes or spaces differ.
    """

    reports_episodes = True
    """Its infos have the statistics of ended episodes if those of the groups have."""

    def __init__(self, groups: Sequence[Group]) -> None:
        kinds = [(g.num_envs, g.single_observation_space, g.single_action_space) for g in groups]
        if not kinds or any(kind != kinds[0] for kind in kinds):
            raise ValueError("groups must be of one size and have the same spaces")
        self.groups = tuple(groups)
        self.turns = 0
        """Resets and steps of this object, and states that it was given."""
        size, self.single_observation_space, self.single_action_space = kinds[0]
        self.num_envs = len(groups) * size
        self.metadata = groups[0].metadata
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Reset all environments, or those of `options["reset_mask"]`."""
        self.turns += 1
        parts: list[dict[str, Any] | None] = [options] * len(self.groups)
        if options is not None and "reset_mask" in options:
            mask = check_mask(options["reset_mask"], self.num_envs)
            parts = [{**options, "reset_mask": part} for part in self._split(mask)]
        pairs = zip(self.groups, parts, strict=True)
        results = [group.reset(seed=seed, options=part) for group, part in pairs]
        observations, infos = zip(*results, strict=True)
        return np.concatenate(observations), self._joined(infos)

    def step(self, actions: Any) -> StepResult:
        """Step all environments; after an exception none is under way."""
        self.turns += 1
        batch = check_actions(actions, self.single_action_space, self.num_envs)
        begun: list[Group] = []
        results: list[StepResult] = []
        try:
            for group, part in zip(self.groups, self._split(batch), strict=True):
                group.step_async(part)
                begun.append(group)
            while begun:
                results.append(begun.pop(0).step_wait())
        except BaseException:
            for group in begun:
                with suppress(Exception):
                    group.step_wait()  # nobody wants its results
            raise
        *arrays, infos = zip(*results, strict=True)
        observations, rewards, terminated, truncated = (np.concatenate(part) for part in arrays)
        return observations, rewards, terminated, truncated, self._joined(infos)

    def state_dict(self) -> Tree:
        """What the groups are in the middle of.

        Raises:
            UnsavedError: One of them cannot be saved.
        """
        return {"groups": [_asked(group, "state_dict")() for group in self.groups]}

    def check_state_dict(self, state: Any) -> None:
        """Raise ValueError, with one line, unless a state fits; it is not trusted."""
        parts = state.get("groups") if isinstance(state, dict) else None
        if not isinstance(parts, list) or len(parts) != len(self.groups):
            raise ValueError(f"it has no states of {len(self.groups)} groups")
        for group, part in zip(self.groups, parts, strict=True):
            _asked(group, "check_state_dict")(part)

    def load_state_dict(self, state: Tree) -> None:
        """Restore a state.

        Raises:
            ValueError: It does not fit.
        """
        self.check_state_dict(state)
        self.turns += 1
        for group, part in zip(self.groups, state["groups"], strict=True):
            _asked(group, "load_state_dict")(part)

    def close_extras(self, **kwargs: Any) -> None:
        """Close the groups."""
        for group in self.groups:
            group.close()

    def _split(self, rows: Array) -> list[Array]:
        return np.split(rows, len(self.groups))

    def _joined(self, infos: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The infos of all groups; zeros where a group lacks an entry that another has."""
        size = self.num_envs // len(self.groups)
        joined: dict[str, Any] = {}
        for name in dict.fromkeys(key for info in infos for key in info):
            present = [info[name] for info in infos if name in info]
            if isinstance(present[0], dict):
                joined[name] = self._joined([info.get(name, {}) for info in infos])
                continue
            absent = np.zeros((size, *present[0].shape[1:]), present[0].dtype)
            joined[name] = np.concatenate([info.get(name, absent) for info in infos])
        if "env_id" in joined:
            joined["env_id"] = np.arange(self.num_envs, dtype=joined["env_id"].dtype)
        return joined


def _asked(group: Group, name: str) -> Callable[..., Any]:
    """A method that not every group has."""
    method: Callable[..., Any] | None = getattr(group, name, None)
    if method is None:
        raise UnsavedError(f"{type(group).__name__} has no {name}")
    return method
