"""Cuts a training into a warm-up and windows, all of which end with an update."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from scripts.bench.cases import Timing


class Windows:
    """Takes the ends of updates and keeps the speed of each window.

    Args:
        timing: Lengths.
        clock: Seconds.
    """

    def __init__(self, timing: Timing, clock: Callable[[], float] = time.perf_counter) -> None:
        self.rates: list[float] = []
        """Environment steps per second of each finished window."""
        self.updates = 0
        """Updates since the warm-up."""
        self.seconds = 0.0
        """Seconds of all finished windows together."""
        self.warm = False
        """Whether the warm-up is over."""
        self._timing = timing
        self._clock = clock
        self._started = clock()
        self._steps = 0
        self._cold_updates = 0

    @property
    def done(self) -> bool:
        """Whether there are as many windows as wanted."""
        return len(self.rates) >= self._timing.windows

    def end_update(self, timesteps: int) -> None:
        """Record the end of an update.

        Args:
            timesteps: Environment steps so far, those of the warm-up included.
        """
        now = self._clock()
        if self.warm:
            self._count(now, timesteps)
            return
        self._cold_updates += 1
        long_enough = now - self._started >= self._timing.warm_up
        if long_enough and self._cold_updates >= self._timing.warm_up_updates:
            self.warm, self._started, self._steps = True, now, timesteps

    def _count(self, now: float, timesteps: int) -> None:
        self.updates += 1
        elapsed = now - self._started
        if elapsed < self._timing.seconds:
            return
        self.rates.append((timesteps - self._steps) / elapsed)
        self.seconds += elapsed
        self._started, self._steps = now, timesteps

    def result(self) -> dict[str, Any]:
        """The measurement as JSON values."""
        return {"rates": self.rates, "updates": self.updates, "seconds": self.seconds}
