"""When batches are folded, and when decompositions are renewed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from acktr.kfac.config import KFACConfig

SPARSEST = 8
"""One over the least part of a batch that stands for all of it in a measurement."""


class Cadence:
    """The intervals of the settings, counted in turns t: the number of steps before this one."""

    def __init__(self, config: KFACConfig) -> None:
        self._config = config

    def observes(self, turn: int) -> bool:
        """Whether the batches of a turn are folded."""
        return turn % self._config.stat_interval == 0 or self._starts(turn)

    def refreshes(self, turn: int) -> bool:
        """Whether the step of a turn begins with a refresh."""
        doubled = self._starts(turn) and turn & (turn - 1) == 0  # 1, 2, 4, ...
        return turn % self._config.refresh_interval == 0 or doubled

    def delay(self, turn: int) -> int:
        """Steps until the result of a turn's refresh is used; that of the first one is at once."""
        return 0 if turn == 0 or self._starts(turn) else self._config.refresh_delay or 0

    def renewed(self, turn: int) -> bool:
        """Whether the step of a turn is the first one with new decompositions."""
        begun = {turn, turn - (self._config.refresh_delay or 0)}
        return any(self.refreshes(t) and t + self.delay(t) == turn for t in begun)

    def _starts(self, turn: int) -> bool:
        return self._config.eager_start and turn < self._config.refresh_interval


class Measurements:
    """When the trust region measures a step, and with how much of the batch.

    A measurement that was foretold doubles the number of steps to the next, up to ten; another
    halves it. New decompositions change what is foretold at once, so that of those steps the last
    one with a refresh is measured.
    """

    _LONGEST = 10

    def __init__(self) -> None:
        self.sparsest = SPARSEST
        """Every how many-th sample a measurement takes at most."""
        self.next = 0
        """Number of the step that is measured next."""
        self._interval = 1

    def plan(self, near: bool, turn: int, renewed: Callable[[int], bool]) -> None:
        """Choose the next step.

        Args:
            near: Whether what was measured at this step had been foretold.
            turn: Number of the step.
            renewed: Whether the step of a turn is the first one with new decompositions.
        """
        longer = min(self._LONGEST, 2 * self._interval)
        self._interval = longer if near else max(1, self._interval // 2)
        last = turn + self._interval
        self.next = next((t for t in range(last, turn, -1) if renewed(t)), last)

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact resume needs."""
        return {"interval": self._interval, "due": self.next, "sparsest": self.sparsest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._interval, self.next = state["interval"], state["due"]
        self.sparsest = state["sparsest"]
