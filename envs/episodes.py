"""Returns and lengths of episodes in a vector of environments, and numbers of their last infos."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acktr.envs.values import require_like

SUCCESS = "is_success"
"""Key of the info of an episode's last step that says whether the task was solved."""


class EpisodeStats:
    """Accumulates raw rewards per environment and reports them when episodes end.

    The report has the form of Gymnasium's vector `RecordEpisodeStatistics`. That wrapper is not
    used because Gymnasium 1.2 drops the first step of each episode under same-step resets.
    """

    def __init__(self, num_envs: int) -> None:
        self.returns = np.zeros(num_envs, np.float64)
        self.lengths = np.zeros(num_envs, np.int64)
        self.begun = np.zeros(num_envs, np.float64)
        """Episodes that have begun; NaN where it is not known, as of loaded states."""
        self._start = np.full(num_envs, time.perf_counter())

    def reset(self, mask: NDArray[np.bool_] | None = None) -> None:
        """Begin new episodes, in all environments or in those of `mask`."""
        which = slice(None) if mask is None else mask
        self.returns[which] = 0.0
        self.lengths[which] = 0
        self.begun[which] += 1
        self._start[which] = time.perf_counter()

    def step(
        self,
        rewards: NDArray[Any],
        dones: NDArray[np.bool_],
        counted: NDArray[np.bool_] | bool = True,
    ) -> dict[str, Any]:
        """Add one step.

        Args:
            rewards: raw rewards of shape (num_envs,).
            dones: episodes that ended at this step, shape (num_envs,).
            counted: steps that belong to an episode; the reset steps of next-step autoreset do not.

        Returns:
            Nothing when no episode ended, otherwise `episode` (a dict of return `r`, length `l`
            in steps and duration `t` in seconds; zero where none ended) and the mask `_episode`.
        """
        np.add(self.returns, rewards, out=self.returns, where=counted)
        self.lengths += counted
        if not dones.any():
            return {}
        elapsed = time.perf_counter() - self._start
        report = {
            "episode": {
                "r": np.where(dones, self.returns, 0.0),
                "l": np.where(dones, self.lengths, 0),
                "t": np.where(dones, elapsed, 0.0),
            },
            "_episode": dones.copy(),
        }
        self.reset(dones)
        return report

    def state_dict(self) -> dict[str, Any]:
        """The running episodes, without their seconds: the same state is the same bytes."""
        return {"returns": self.returns.copy(), "lengths": self.lengths.copy()}

    def check_state_dict(self, state: Any) -> None:
        """Raise ValueError unless a state, which is not trusted, fits."""
        require_like(state, self.state_dict(), "episodes")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.check_state_dict(state)
        self.returns[:], self.lengths[:] = state["returns"], state["lengths"]
        self.begun[:] = math.nan
        self._start[:] = time.perf_counter()


def number(value: object) -> float:
    """The number in an info, also in an array of one; NaN for anything else."""
    array = np.asarray(value)
    return float(array.item()) if array.size == 1 and array.dtype.kind in "biuf" else math.nan


def last_infos(
    infos: Mapping[str, Any], keys: tuple[str, ...], ended: NDArray[np.bool_], same_step: bool
) -> dict[str, NDArray[np.float64]]:
    """Numbers (num_envs,) in the infos of the last steps of episodes, NaN elsewhere.

    Args:
        infos: What Gymnasium's vector environments give: an array for each key with a mask of its
            name behind a ``_``; of a last step before a same-step reset in ``final_info``.
        keys: Which numbers.
        ended: The environments whose episode ended, (num_envs,).
        same_step: Whether they are reset within the step.
    """
    final = infos.get("final_info") if same_step else None
    columns: dict[str, NDArray[np.float64]] = {}
    for key in keys:
        columns[key] = np.full(len(ended), math.nan)
        place = final if isinstance(final, Mapping) and key in final else infos
        for index in np.flatnonzero(ended & place.get(f"_{key}", ended)) if key in place else ():
            columns[key][index] = number(place[key][index])
    return columns
