"""Last observations of episodes that have become the first ones of the next."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from acktr.envs.errors import EnvWarning
from acktr.envs.nested import flat, parts
from acktr.envs.vector import Array

_ENOUGH = 3
"""Episodes of an environment after which it is no coincidence."""


class ReusedFinals:
    """Finds environments that write every observation into one and the same array.

    Under same-step autoreset Gymnasium's vector environments show the last observation of an
    episode without a copy of it, after the reset. It is then the first one of the next episode, by
    which a truncated episode would be valued.

    An environment is no longer looked at after an episode whose two observations differ. Where all
    observations are alike, nothing is wrong. Spaces of integers have few observations, so that they
    may be alike by chance.

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

    def see(self, observations: Any) -> None:
        """Take note of what is shown before the next step."""
        if self._looked.any():
            self._before = [each.copy() for each in self._floats(observations)]

    def step(self, infos: Mapping[str, Any], observations: Any) -> None:
        """Compare the last observations of episodes that ended with the first ones of the next."""
        if "final_obs" in infos:
            self._compare(infos["final_obs"], observations, infos["_final_obs"])
        self.see(observations)

    def _compare(self, finals: Any, observations: Any, ended: Array) -> None:
        rows = np.flatnonzero(ended & self._looked)
        if self._before is None or not len(rows):
            return
        last, first = self._floats(finals), self._floats(observations)
        for row in rows.tolist():
            if not _same(last, first, row):
                self._looked[row] = False
            elif not _same(self._before, first, row):
                self._alike[row] += 1
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


def _same(ours: list[Array], theirs: list[Array], row: int) -> bool:
    return all(np.array_equal(a[row], b[row]) for a, b in zip(ours, theirs, strict=True))
