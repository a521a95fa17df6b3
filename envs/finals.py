"""Last observations of episodes that have become the first ones of the next."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from gymnasium import spaces

from acktr.envs.errors import EnvWarning
from acktr.envs.nested import flat, parts
from acktr.envs.vector import Array

_ENOUGH = 2
"""Episodes of an environment, after another one, after which it is no coincidence."""


class ReusedFinals:
    """Finds environments that write every observation into one and the same array.

    Under same-step autoreset Gymnasium's vector environments show the last observation of an
    episode without a copy of it, after the reset. It is then the first one of the next episode, by
    which a truncated episode would be valued.

    That is told of an environment whose episodes were cut, at a place other than where the next one
    begins, with last observations in one array that are the first ones. The latest is held, so that
    no new array has its memory. An environment is no longer looked at after an episode whose two
    observations differ. Spaces of integers have few observations, so that they may be alike by
    chance.

    Args:
        space: Of one environment's observations.
        num_envs: Number of environments.
        name: For messages.
    """

    def __init__(self, space: spaces.Space[Any], num_envs: int, name: str) -> None:
        inside = parts(space).items()
        self._parts = [
            key for key, part in inside if isinstance(part, spaces.Box) and part.dtype.kind == "f"
        ]
        self._space, self._name = space, name
        self._looked = np.full(num_envs, bool(self._parts))
        self._alike = np.zeros(num_envs, np.int64)
        self._before: list[Array] | None = None
        self._held: dict[int, list[Array]] = {}

    def see(self, observations: Any) -> None:
        """Take note of what is shown before the next step."""
        if self._looked.any():
            self._before = [each.copy() for each in self._floats(observations)]

    def step(self, observations: Any, shown: Any, cut: Array) -> None:
        """Compare the last observations of episodes with the first ones of the next.

        Args:
            observations: What the step returned.
            shown: Its ``infos["final_obs"]`` as the environment gave it; None if there was none.
            cut: Where the episode was truncated only; the last observations of others are not used.
        """
        if isinstance(shown, np.ndarray) and shown.dtype == object:
            self._compare(shown, observations, cut)
        self.see(observations)

    def _compare(self, shown: Array, observations: Any, cut: Array) -> None:
        rows = np.flatnonzero(cut & self._looked)
        if self._before is None or not len(rows):
            return
        first = self._floats(observations)
        for row in rows.tolist():
            last, held = self._floats(shown[row]), self._held.get(row)
            self._held[row] = last
            if not _same(last, [each[row] for each in first]):
                self._looked[row] = False
            elif held is not None and not _same(last, [each[row] for each in self._before]):
                pairs = zip(last, held, strict=True)
                self._alike[row] += all(np.may_share_memory(*pair) for pair in pairs)
        if (self._alike >= _ENOUGH).any():
            self._looked[:] = False
            warnings.warn(
                f"environment {int(self._alike.argmax())} of {self._name} gave final observations"
                " that are the first ones of the next episodes, number for number: if it returns"
                " the same array at every step, it must return a copy(), or truncated episodes are"
                " valued by what comes after them",
                EnvWarning,
                stacklevel=2,
            )

    def _floats(self, observations: Any) -> list[Array]:
        arrays = flat(self._space, observations)
        return [arrays[key] for key in self._parts] if isinstance(arrays, dict) else [arrays]


def _same(ours: list[Array], theirs: list[Array]) -> bool:
    return all(map(np.array_equal, ours, theirs))
