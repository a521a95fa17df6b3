"""Environments that are stepped together: those of one kind in groups, all others at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gymnasium.vector import VectorEnv

from acktr.envs import GroupedEnvs, Stepper, StepResult
from acktr.rollout.buffer import Array


class AtOnce:
    """A vector environment whose step cannot be divided: all of it happens at the end."""

    def __init__(self, envs: VectorEnv[Any, Any, Any]) -> None:
        self._envs = envs
        self._actions: Array | None = None

    def step_async(self, actions: Array) -> None:
        """Keep the actions."""
        self._actions = actions

    def step_wait(self) -> StepResult:
        """Step."""
        return self._envs.step(self._actions)


@dataclass
class Group:
    """Environments that are stepped together."""

    stepper: Stepper
    rows: slice
    """Their places among all environments."""
    under_way: bool = False
    """Whether a step has begun and not ended."""


def groups_of(envs: VectorEnv[Any, Any, Any]) -> list[Group]:
    """The groups of grouped environments; all of others are one group."""
    steppers: Sequence[Stepper] = [AtOnce(envs)]
    if isinstance(envs, GroupedEnvs):
        steppers = envs.groups
    size = envs.num_envs // len(steppers)
    return [Group(each, slice(n * size, (n + 1) * size)) for n, each in enumerate(steppers)]
