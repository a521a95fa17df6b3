"""What every block with statistics is made of: running averages and its history."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from acktr.kfac.linalg import FactorError, Parts, all_finite
from acktr.kfac.ranks import Ranks

_logger = logging.getLogger(__name__)


class RunningAverage:
    """Bias-corrected exponential average of a matrix: value and weight decay together.

    A batch whose statistic is not finite leaves the average as it was; this is decided on the
    device, without a host synchronisation. A batch may come in parts (:meth:`add`), which
    :meth:`take` joins. Tensors are replaced, never changed, so that a state is a snapshot.

    Args:
        zero: Zeros of the shape, type and device of the average.
    """

    def __init__(self, zero: Tensor) -> None:
        self.value = zero
        self.weight = zero.new_zeros(())
        self._total: Tensor | None = None
        self._count = 0.0

    def add(self, total: Tensor, count: float) -> None:
        """Join the sum of a part of a batch, and what it adds to the divisor."""
        self._total = total if self._total is None else self._total + total
        self._count += count

    def pass_over(self, count: float) -> None:
        """Join a part of a batch in which there was nothing to sum, but that the divisor counts."""
        self._count += count

    def take(self) -> Tensor | None:
        """The joined batch's mean, or None when there was nothing; the parts are forgotten."""
        # No part of a sum over the batch counts, and a sum is not divided.
        mean = None if self._total is None else self._total / (self._count or 1.0)
        self._total, self._count = None, 0.0
        return mean

    def drop(self) -> None:
        """Forget the parts of an unfinished batch."""
        self._total, self._count = None, 0.0

    def update(self, new: Tensor, decay: float) -> None:
        """S <- decay S + (1 - decay) S_new, and the same for the weight with 1 in place of S."""
        self.accept(new.nan_to_num(0.0, 0.0, 0.0), decay, all_finite(new))

    def accept(self, new: Tensor, decay: float, valid: Tensor) -> None:
        """:meth:`update` if ``valid`` is true; either way every entry of ``new`` is finite."""
        rate = valid.to(self.weight.dtype) * (1 - decay)
        self.value = self.value.lerp(new, rate)
        self.weight = self.weight + rate * (1 - self.weight)

    def part(self) -> tuple[Tensor, float, float]:
        """The joined sum, or zeros; what the divisor counts; and 1 if there is a sum, else 0."""
        if self._total is None:
            return torch.zeros_like(self.value), self._count, 0.0
        return self._total.to(self.value.dtype), self._count, 1.0

    def replace_part(self, total: Tensor, count: float, given: float) -> None:
        """Take what :meth:`part` gave of several processes together for the joined parts."""
        self._total, self._count = (total if given else None), count

    def move(self, linear: Callable[[Tensor], Tensor]) -> None:
        """Take the average, and the parts of an unfinished batch, through a linear map."""
        self.value = linear(self.value).contiguous()
        self._total = None if self._total is None else linear(self._total).contiguous()

    def mean(self) -> Tensor:
        """The corrected average S / weight; NaN before the first finite batch."""
        return self.value / self.weight

    def load(self, value: Tensor, weight: Tensor) -> None:
        """Restore value and weight; parts of an unfinished batch are dropped."""
        self.value, self.weight = value.to(self.value.device), weight.to(self.weight.device)
        self.drop()

    def state_dict(self, key: str) -> dict[str, Tensor]:
        """Value and weight, with a key for its entries in the state of a block."""
        return {key: self.value, f"{key}_weight": self.weight}

    def load_state_dict(self, key: str, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict` from the checked state of a block."""
        self.load(state[key], state[f"{key}_weight"])


def join_ranks(averages: Sequence[RunningAverage], ranks: Ranks) -> None:
    """Add up the parts of a batch over the ranks: sums and divisors, which all of them then fold.

    Args:
        averages: In the same order on all ranks, with or without a sum on this one.
        ranks: Who has the other parts.
    """
    if not averages or ranks.size == 1:
        return
    totals, *facts = zip(*(average.part() for average in averages), strict=True)
    numbers = torch.tensor(facts, dtype=torch.float64, device=totals[0].device)
    (numbers, *sums) = ranks.summed([numbers, *totals])
    for average, total, count, given in zip(averages, sums, *numbers.tolist(), strict=True):
        average.replace_part(total, count, given)


class History:
    """What happened to a block: batches, failures, and whether it has a decomposition.

    Failures of decompositions are counted on the host, those of statistics on the device.

    Args:
        what: The block's name in messages.
        limit: Failures in a row that are an error.
        device: Where the statistics are.
    """

    def __init__(self, what: str, limit: int, device: torch.device) -> None:
        self.what = what
        self.limit = limit
        self.ready = False
        """Whether a decomposition was installed."""
        self.started = False
        """Whether there are statistics, be they of NaN."""
        self.observed = False
        """Whether a batch gave any; averages may have started without one."""
        self.failures = 0
        """Failed refreshes in a row."""
        self.total_failures = 0
        self.rejected = torch.zeros((), dtype=torch.int64, device=device)
        """Batches of NaN or Inf in a row."""

    def fold(self, averages: Sequence[RunningAverage], decay: float) -> None:
        """Take a joined batch into all averages or none, so that they belong to the same batches.

        One whose statistics are finite starts the count of others again.
        """
        new = [average.take() for average in averages]
        given = [mean for mean in new if mean is not None]
        if len(given) < len(new):
            return
        self.started = self.observed = True
        # A sum is finite only if all entries are; it takes a tenth of the time of a look at each.
        valid = all_finite(reduce(torch.add, [mean.sum() for mean in given]))
        self.rejected = (self.rejected + 1) * ~valid
        for average, mean in zip(averages, given, strict=True):
            average.accept(mean.nan_to_num_(0.0, 0.0, 0.0), decay, valid)

    def has_statistics(self) -> bool:
        """Whether there are any; raises FactorError after ``limit`` batches of NaN in a row."""
        rejected = int(self.rejected)
        if rejected >= self.limit:
            raise FactorError(
                f"K-FAC {self.what}: the statistics of {rejected} batches in a row were"
                " NaN or Inf (lower lr or kl_clip, or normalise rewards)"
            )
        return self.started

    @property
    def late(self) -> bool:
        """Whether the first decomposition is still to come, although there are statistics."""
        return self.started and not self.ready and not self.failures

    def settle(self, results: Sequence[Parts | FactorError]) -> bool:
        """Whether every decomposition succeeded; raises FactorError after ``limit`` failures."""
        error = next((result for result in results if isinstance(result, FactorError)), None)
        if error is None:
            self.ready, self.failures = True, 0
            return True
        self.failures += 1
        self.total_failures += 1
        if self.failures >= self.limit:
            raise FactorError(
                f"K-FAC {self.what}: {error}; {self.failures} refreshes failed in a"
                " row (lower lr or kl_clip, raise damping, or normalise rewards)"
            ) from error
        _logger.warning("K-FAC %s keeps its former decomposition: %s", self.what, error)
        return False

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {
            "ready": self.ready,
            "started": self.started,
            "failures": self.failures,
            "total_failures": self.total_failures,
            "rejected": int(self.rejected),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore checked counts."""
        self.ready, self.started = state["ready"], state["started"]
        self.observed = self.started  # whoever trained it was told of what was never observed
        self.failures, self.total_failures = state["failures"], state["total_failures"]
        self.rejected = torch.tensor(state["rejected"], device=self.rejected.device)
