"""Environments that are stepped together, while the policy may act for others."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from acktr.envs import GroupedEnvs, Stepper, StepResult
from acktr.rollout.recorder import Array, Bools


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
        self._stepper = stepper
        self.rows = rows
        self.observation: Array = np.empty(0)
        self.dead: Bools = np.zeros(rows.stop - rows.start, np.bool_)
        """Whose next step is the reset of next-step autoreset."""
        self.under_way = False
        """Whether a step has begun and not ended."""

    def show(self, observations: Array, dead: Bools | None = None) -> None:
        """Take over the rows of all environments' observations and dead flags (None: no)."""
        self.observation = observations[self.rows].copy()
        self.dead = np.zeros(len(self.dead), np.bool_) if dead is None else dead[self.rows].copy()

    def begin(self, actions: Array) -> None:
        """Begin a step."""
        self.under_way = True  # before, since an interrupt may come in between
        self._stepper.step_async(actions)

    def end(self) -> StepResult:
        """Wait for its end."""
        self.under_way = False
        return self._stepper.step_wait()


def lanes(envs: VectorEnv[Any, Any, Any]) -> list[Lane]:
    """The groups of grouped environments, one lane otherwise."""
    if not isinstance(envs, GroupedEnvs):
        return [Lane(AtOnce(envs), slice(0, envs.num_envs))]
    size = envs.num_envs // len(envs.groups)
    return [
        Lane(group, slice(index * size, (index + 1) * size))
        for index, group in enumerate(envs.groups)
    ]
