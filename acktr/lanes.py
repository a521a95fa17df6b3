"""Environments that are stepped together, while the policy may act for others."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from gymnasium.vector import VectorEnv

from acktr.steps import Array, Bools
from envs.groups import GroupedEnvs
from envs.guard import StepResult


class Stepper(Protocol):
    """Whose step has a beginning and an end."""

    def step_async(self, actions: Array) -> None:
        """Begin."""

    def step_wait(self) -> StepResult:
        """Wait for the end."""


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


class Lane:
    """Some of the environments, with what they show at present.

    Args:
        stepper: Steps them.
        rows: Which of all they are.
    """

    def __init__(self, stepper: Stepper, rows: slice) -> None:
        self.stepper = stepper
        self.rows = rows
        self.observation: Array = np.empty(0)
        self.dead: Bools = np.zeros(rows.stop - rows.start, np.bool_)
        """Whose next step is the reset of next-step autoreset."""

    def show(self, observations: Array, dead: Bools | None = None) -> None:
        """Take over the rows of all environments' observations and dead flags (None: no)."""
        self.observation = observations[self.rows].copy()
        self.dead = np.zeros(len(self.dead), np.bool_) if dead is None else dead[self.rows].copy()


def lanes(envs: VectorEnv[Any, Any, Any]) -> list[Lane]:
    """The groups of grouped environments, one lane otherwise."""
    if not isinstance(envs, GroupedEnvs):
        return [Lane(AtOnce(envs), slice(0, envs.num_envs))]
    size = envs.num_envs // len(envs.groups)
    return [
        Lane(group, slice(index * size, (index + 1) * size))
        for index, group in enumerate(envs.groups)
    ]
