"""When batches are folded, and when decompositions are renewed."""

from __future__ import annotations

from acktr.kfac.config import KFACConfig


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
