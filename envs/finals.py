"""Last observations of episodes that have become the first ones of the next."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from acktr.envs.errors import EnvWarning
from acktr.envs.vector import AnyVectorEnv, Array


class ReusedFinals:
    """Finds environments that write every observation into one and the same array.

    Under same-step autoreset Gymnasium's vector shows the last observation of an episode without a
    copy of it, after the reset. It is then the first one of the next episode, by which a truncated
    episode would be valued.

    Both lie in one memory then, which is told once the environment has written there: rows of a
    table that stay as they are do no harm.

    Args:
        envs: The vector; of others than Gymnasium's in this process nothing is seen.
        name: For messages.
    """

    def __init__(self, envs: AnyVectorEnv, name: str) -> None:
        self._envs, self._name = envs, name
        self._shared: dict[int, list[tuple[Array, Array]]] = {}  # each with what was in it
        self._told = False

    def step(self, shown: Any, cut: Array) -> None:
        """Look at the last observations that a step has shown.

        Args:
            shown: Its ``infos["final_obs"]`` as the environment gave it; None if there was none.
            cut: Where the episode was truncated only; the last observations of others are not used.
        """
        for row, pairs in () if self._told else self._shared.items():
            if not all(np.array_equal(array, was) for array, was in pairs):
                self._told = True
                warnings.warn(
                    f"environment {row} of {self._name} gave final observations that are the first"
                    " ones of the next episodes: it returns the same array at every step and must"
                    " return a copy(), or truncated episodes are valued by what comes after them",
                    EnvWarning,
                    stacklevel=2,
                )
                return
        first = getattr(self._envs.unwrapped, "_env_obs", None)  # of Gymnasium's SyncVectorEnv
        if not (isinstance(first, list) and isinstance(shown, np.ndarray) and shown.dtype == "O"):
            return
        for row in np.flatnonzero(cut).tolist():
            both = zip(_arrays(shown[row]), _arrays(first[row]), strict=False)
            shared = [(last, last.copy()) for last, next_ in both if np.shares_memory(last, next_)]
            self._shared[row] = shared


def _arrays(value: Any) -> list[Array]:
    """The arrays of an observation, however deep they lie in it."""
    if isinstance(value, dict | tuple):
        inside = value.values() if isinstance(value, dict) else value
        return [array for each in inside for array in _arrays(each)]
    return [value] if isinstance(value, np.ndarray) else []
