"""What a rollout records: the steps of all environments, and the episodes that ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Bools = NDArray[np.bool_]
Final = tuple[Bools, Array]
"""Where episodes were truncated, and the final observations there, as the network takes them."""


@dataclass(frozen=True)
class EpisodeEnd:
    """An episode that ended during a rollout, in the environment's own reward."""

    reward: float
    length: int
    moment: float
    """time.perf_counter() when it ended."""


@dataclass(frozen=True)
class Rollout:
    """T steps of N environments; arrays are (T, N, ...) unless noted."""

    observations: Array | Tensor
    """As the network takes them: normalised, or converted images (T * N, C, H, W), which the next
    rollout overwrites."""
    actions: Tensor
    rewards: NDArray[np.float32]
    """As learning takes them (scaled)."""
    values: NDArray[np.float32]
    next_values: NDArray[np.float32]
    """V of the true successor state, the final observation where an episode was truncated."""
    terminated: Bools
    ended: Bools
    """Terminated or truncated."""
    valid: Bools
    """Steps to learn from: the agent's own action in a running episode."""
    episodes: tuple[EpisodeEnd, ...]
    env_steps: int
    """Environment steps taken (reset steps of next-step autoreset are none)."""
    env_seconds: float
    """Waiting for the environments: what they did while the policy acted is not part of it."""
    forward_seconds: float
    """Acting and recording."""


class Recorder:
    """Lists of per-step arrays that become a :class:`Rollout`.

    Args:
        lanes: Groups of n = N / lanes environments; every step is recorded as one step of each, in
            order, and the T steps become T * lanes rows of n.
    """

    def __init__(self, lanes: int = 1) -> None:
        self.lanes = lanes
        self.observations: list[Array] = []
        self.steps: list[tuple[Array, ...]] = []
        self.actions: list[Tensor] = []
        self.values: list[Tensor] = []
        self.finals: list[tuple[int, Final]] = []
        self.last: Array | None = None
        self.episodes: tuple[EpisodeEnd, ...] = ()
        self.env_steps = 0
        self.env_seconds = 0.0
        self.forward_seconds = 0.0

    def act(self, observation: Array | None, actions: Tensor, values: Tensor | None) -> None:
        """What a lane's policy saw and did.

        Values are None if they are computed at the end, observations if they are stored elsewhere.
        """
        if values is not None:
            self.values.append(values)
        if observation is not None:
            self.observations.append(observation)
        self.actions.append(actions)

    def add(
        self,
        rewards: Array,
        terminated: Bools,
        ended: Bools,
        valid: Bools,
        final: Final | None,
        alive: Bools,
    ) -> None:
        """What came of a lane's step.

        Args:
            rewards: As learning takes them.
            terminated: Episodes that ended in a terminal state.
            ended: Episodes that ended.
            valid: Steps to learn from.
            final: Of truncated episodes, where a reset has replaced the observations.
            alive: Environments that took a step, rather than the reset of next-step autoreset.
        """
        if final is not None:
            self.finals.append((len(self.steps), final))
        self.steps.append((rewards, terminated, ended, valid))
        self.env_steps += int(alive.sum())

    def unvalued(self) -> Array:
        """Observations kept here (B, ...) whose values :meth:`finish` needs."""
        assert self.last is not None
        steps = [] if self.values else self.observations
        return np.concatenate([*steps, self.last, *(final[1] for _, final in self.finals)])

    def finish(self, missing: NDArray[np.float32], stored: Tensor | None) -> Rollout:
        """The rollout.

        Args:
            missing: Values of the steps, if :meth:`act` had none, of ``last`` and of final
                observations.
            stored: The steps' observations, if :meth:`act` had none.
        """
        rewards, terminated, ended, valid = (
            self._whole(np.stack(column)) for column in zip(*self.steps, strict=True)
        )
        if self.values:
            values = torch.stack(self.values).float().cpu().numpy()
        else:
            values, missing = np.split(missing, [rewards.size])
        values = values.reshape(rewards.shape)
        num = rewards.shape[1]
        next_values = np.concatenate([values[1:], missing[None, :num]])
        rows = next_values.reshape(len(self.steps), -1)  # a view
        missing = missing[num:]
        for row, (truncated, observed) in self.finals:
            rows[row, truncated] = missing[: len(observed)]
            missing = missing[len(observed) :]
        actions = torch.stack(self.actions)
        return Rollout(
            observations=self._whole(np.stack(self.observations)) if stored is None else stored,
            actions=actions.reshape(*rewards.shape, *actions.shape[2:]),
            rewards=rewards.astype(np.float32),
            values=values,
            next_values=next_values,
            terminated=terminated,
            ended=ended,
            valid=valid,
            episodes=self.episodes,
            env_steps=self.env_steps,
            env_seconds=self.env_seconds,
            forward_seconds=self.forward_seconds,
        )

    def _whole(self, rows: Array) -> Array:
        """(T * lanes, n, ...) as (T, N, ...)."""
        return rows.reshape(len(rows) // self.lanes, -1, *rows.shape[2:])
