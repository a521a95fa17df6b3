"""What blocks with one running average have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from acktr.kfac.linalg import Inverse, Parts
from acktr.kfac.statistics.averages import History, RunningAverage


class MomentBlock:
    """A block whose statistics are one running average.

    Args:
        what: Name of the block in messages.
        zero: Zeros of the shape, type and device of the average.
        limit: Failures in a row that are an error.
    """

    key: ClassVar[str] = "moment"
    """Name of the average in states."""
    method: Inverse = "eigen"
    needs_samples = True
    """Whether rows are added up sample by sample."""

    def __init__(self, what: str, zero: Tensor, limit: int) -> None:
        self.moment = RunningAverage(zero)
        self.history = History(what, limit, zero.device)

    @property
    def averages(self) -> list[RunningAverage]:
        """All that batches are folded into."""
        return [self.moment]

    @property
    def factors(self) -> list[RunningAverage]:
        """What a refresh looks at, and decomposes where there is something to decompose."""
        return self.averages

    def pass_over(self, count: float) -> None:
        """Count a part of a batch in which the parameters were not used."""
        self.moment.pass_over(count)

    def fold(self, decay: float) -> None:
        """Take the joined batch into the running average."""
        self.history.fold(self.averages, decay)

    def requests(self, damping: float) -> list[Tensor]:
        """The matrix, or diagonal, to decompose; empty before any statistics.

        Raises:
            FactorError: After ``max_failures`` batches of NaN or Inf in a row.
        """
        started = self.history.has_statistics()
        return [factor.mean() for factor in self.factors] if started else []

    def install(self, results: Sequence[Parts]) -> None:
        """Take new decompositions, of which a diagonal needs none."""

    def state_dict(self) -> dict[str, Any]:
        """The average, and what happened so far."""
        return self.moment.state_dict(self.key) | self.history.state_dict()

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a checked state; parts of an unfinished batch are dropped."""
        self.moment.load_state_dict(self.key, state)
        self.history.load(state)
