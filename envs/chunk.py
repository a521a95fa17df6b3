"""Environments stepped in turn, and the memory that their steps are read from and written to."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from acktr.envs.guard import Array, one_line
from acktr.envs.settings import EnvFault

AnyEnv = gymnasium.Env[Any, Any]

UNSEEDED = -1
"""In place of a seed: the environment goes on with its own generator."""

_CACHE_LINE = 64


@dataclass(frozen=True)
class StepArrays:
    """One row for each environment; processes that were forked later share the memory."""

    actions: Array
    """What the next step executes."""
    seeds: NDArray[np.int64]
    """Seeds of the next reset, or UNSEEDED."""
    chosen: NDArray[np.bool_]
    """Which environments the next reset resets."""
    observations: Array
    """After the step, those of new episodes where one ended."""
    final: Array
    """Last observations of episodes that ended; otherwise undefined."""
    rewards: NDArray[np.float64]
    """Of the step."""
    terminated: NDArray[np.bool_]
    """Whether the step ended the episode in a terminal state."""
    truncated: NDArray[np.bool_]
    """Whether the step was the last one for another reason."""


def step_arrays(
    observation_space: spaces.Space[Any], action_space: spaces.Space[Any], num_envs: int
) -> StepArrays:
    """Zeroed arrays for environments with these (supported) spaces."""
    observations = (observation_space.shape or (), observation_space.dtype)
    layout: list[tuple[tuple[int, ...], Any]] = [
        (action_space.shape or (), action_space.dtype),
        ((), np.int64),
        ((), np.bool_),
        observations,
        observations,
        ((), np.float64),
        ((), np.bool_),
        ((), np.bool_),
    ]
    sizes = [num_envs * int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in layout]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _CACHE_LINE) * _CACHE_LINE)
    memory = mmap.mmap(-1, starts[-1])
    return StepArrays(
        *(
            np.ndarray((num_envs, *shape), dtype, memory, start)
            for (shape, dtype), start in zip(layout, starts, strict=False)
        )
    )


class Chunk:
    """Neighbouring environments of a vector, stepped in turn under same-step autoreset.

    Args:
        envs: The environments.
        first: Index of the first one in the vector.
        arrays: Of the whole vector.
        name: For messages.
    """

    def __init__(self, envs: Sequence[AnyEnv], first: int, arrays: StepArrays, name: str) -> None:
        self._rows = slice(first, first + len(envs))
        self._arrays = arrays
        self._name = name
        self._places = [
            (row, env, arrays.observations[row, ...], arrays.final[row, ...])
            for row, env in enumerate(envs, first)
        ]

    @property
    def label(self) -> str:
        """What messages call it."""
        first, last = self._rows.start, self._rows.stop - 1
        which = f"environment {first}" if first == last else f"environments {first} to {last}"
        return f"{which} of {self._name}"

    def reset(self, options: dict[str, Any] | None = None) -> None:
        """Reset the chosen environments.

        Raises:
            EnvFault: An environment failed.
        """
        arrays = self._arrays
        for row, env, observation, _ in self._places:
            if arrays.chosen[row]:
                seed = int(arrays.seeds[row])
                obs, _ = env.reset(seed=None if seed == UNSEEDED else seed, options=options)
                try:
                    _put(observation, obs)
                except Exception as error:
                    raise self._fault(row, "reset", error) from error

    def step(self) -> None:
        """Execute the actions.

        Raises:
            EnvFault: An environment failed.
        """
        arrays = self._arrays
        rewards, terminated, truncated = arrays.rewards, arrays.terminated, arrays.truncated
        actions = arrays.actions[self._rows].copy()  # an environment may keep its last action
        for (row, env, observation, final), action in zip(self._places, actions, strict=True):
            obs, reward, terminal, cut, _ = env.step(action)
            try:
                rewards[row], terminated[row], truncated[row] = reward, terminal, cut
                if terminated[row] or truncated[row]:
                    _put(final, obs)
                    obs, _ = env.reset()
                _put(observation, obs)
            except EnvFault:
                raise
            except Exception as error:
                raise self._fault(row, "a step", error) from error

    def close(self) -> None:
        """Close the environments."""
        for _, env, _, _ in self._places:
            env.close()

    def _fault(self, row: int, when: str, error: Exception) -> EnvFault:
        return EnvFault(
            f"environment {row} of {self._name} gave something unfit at {when}: "
            f"{type(error).__name__}: {one_line(error)}"
        )


def _put(place: Array, obs: Any) -> None:
    """Write an observation to its place."""
    value = np.asarray(obs)
    if value.shape != place.shape:
        raise ValueError(f"an observation of shape {value.shape}, its space has {place.shape}")
    np.copyto(place, value, casting="same_kind")
