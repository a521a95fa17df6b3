"""Returns and lengths of episodes in a vector of environments."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray


class EpisodeStats:
    """Accumulates raw rewards per environment and reports them when episodes end.

    The report has the form of Gymnasium's vector `RecordEpisodeStatistics`. That wrapper is not
    used because Gymnasium 1.2 drops the first step of each episode under same-step resets.
    """

    def __init__(self, num_envs: int) -> None:
        self.returns = np.zeros(num_envs, np.float64)
        self.lengths = np.zeros(num_envs, np.int64)
        self._start = np.full(num_envs, time.perf_counter())

    def reset(self, mask: NDArray[np.bool_] | None = None) -> None:
        """Begin new episodes, in all environments or in those of `mask`."""
        which = slice(None) if mask is None else mask
        self.returns[which] = 0.0
        self.lengths[which] = 0
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
