"""What every block with statistics is made of: what it sees, running averages, and its history."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acktr.kfac.linalg import FactorError, Parts, all_finite
from acktr.kfac.statistics.inputs import Inputs

Moments = tuple[Tensor, Tensor]
"""Running mean and variance."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Use:
    """One use of a layer in a forward pass."""

    module: nn.Module
    """The layer (tied layers share a block)."""
    call: Inputs
    """Inputs of the layer."""
    gradients: tuple[Tensor, ...]
    """Gradient of each curvature scalar with respect to the output (N, ...)."""
    part: int | None
    """Place of the output in the tuple that the module returned; None outside of a tuple."""
    moments: Moments | None
    """Running mean and variance that a batch normalisation used; None for those of the batch."""

    @property
    def args(self) -> tuple[Tensor, ...]:
        """The layer's input tensors (N, ...)."""
        return self.call.tensors()


@dataclass(frozen=True)
class Observation:
    """What a block sees of one batch, or of a part of one.

    The gradients belong to scalars s_c with weights w_c; the curvature of the objective is
    1/Z sum_n sum_c w_c g g^T.
    """

    uses: Sequence[Use]
    """Uses of the block's layers; none in a part of a batch that passed them by."""
    weights: Sequence[float]
    """w_c, one per curvature scalar."""
    count: float
    """What this part adds to the divisor Z; 0 for a sum over the batch, which has no divisor."""


def check_sizes(uses: Sequence[Use], name: str) -> None:
    """Raise ValueError unless all uses, whose samples are added up, have one batch size."""
    sizes = [len(use.gradients[0]) for use in uses]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"K-FAC layer {name!r} was used with different batch sizes in one pass: {sizes}; its"
            " uses are added up sample by sample and must have the same one"
        )


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

    def update(self, new: Tensor, decay: float, valid: Tensor | None = None) -> None:
        """S <- decay S + (1 - decay) S_new, and the same for the weight with 1 in place of S."""
        finite = all_finite(new) if valid is None else valid
        old_weight = self.weight
        target = torch.where(finite, new, self.value)
        self.value = self.value.lerp(target, 1 - decay)
        grown = old_weight + (1 - decay) * (1 - old_weight)
        self.weight = torch.where(finite, grown, old_weight)

    def mean(self) -> Tensor:
        """The corrected average S / weight; NaN before the first finite batch."""
        return self.value / self.weight

    def load(self, value: Tensor, weight: Tensor) -> None:
        """Restore value and weight; parts of an unfinished batch are dropped."""
        self.value, self.weight = value, weight
        self.drop()


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
        self.failures = 0
        """Failed refreshes in a row."""
        self.total_failures = 0
        self.rejected = torch.zeros((), dtype=torch.int64, device=device)
        """Batches of NaN or Inf in a row."""

    def judge(self, valid: Tensor) -> None:
        """Count a batch; one whose statistics are finite starts the count of others again."""
        self.started = True
        self.rejected = torch.where(valid, 0, self.rejected + 1)

    def check_rejected(self) -> None:
        """Raise FactorError after ``limit`` batches of NaN or Inf in a row."""
        rejected = int(self.rejected)
        if rejected >= self.limit:
            raise FactorError(
                f"K-FAC {self.what}: the statistics of {rejected} batches in a row were"
                " NaN or Inf (lower lr or kl_clip, or normalise rewards)"
            )

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
        self.failures, self.total_failures = state["failures"], state["total_failures"]
        self.rejected = torch.tensor(state["rejected"], device=self.rejected.device)
