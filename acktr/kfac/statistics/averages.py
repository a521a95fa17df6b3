"""What blocks share: observations of one batch, running averages, checks of stored state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from acktr.kfac.linalg import FactorError, all_finite
from acktr.kfac.statistics.inputs import Inputs

Moments = tuple[Tensor, Tensor]
"""Running mean and variance."""


def check_shape(value: object, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> Tensor:
    """The value if it is a tensor of this shape and type; raises ValueError if not."""
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        raise ValueError(f"{what} does not fit {shape}")
    if value.dtype != dtype:
        raise ValueError(f"{what} must be finite {dtype}")
    return value


def check_tensor(value: object, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> None:
    """Raise ValueError unless value is a finite tensor of this shape and type."""
    if not bool(torch.isfinite(check_shape(value, shape, dtype, what)).all()):
        raise ValueError(f"{what} must be finite {dtype}")


def check_count(value: object, what: str) -> None:
    """Raise ValueError unless value is an integer >= 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{what} must be an integer >= 0, got {value!r}")


def check_positive(value: object, what: str) -> None:
    """Raise ValueError unless value is a finite number > 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{what} must be a finite number > 0, got {value!r}")


def check_list(
    found: object, shapes: Sequence[tuple[int, ...] | None], dtype: torch.dtype, what: str
) -> None:
    """Raise ValueError unless found is None or a list of such tensors (None where no shape is)."""
    if found is None:
        return
    if not isinstance(found, list) or len(found) != len(shapes):
        raise ValueError(f"{what} must be {len(shapes)} tensors")
    for tensor, shape in zip(found, shapes, strict=True):
        if shape is not None:
            check_tensor(tensor, shape, dtype, what)
        elif tensor is not None:
            raise ValueError(f"{what} has vectors for a diagonal factor")


@dataclass(frozen=True)
class Use:
    """One use of a layer in a forward pass."""

    module: nn.Module
    """The layer (tied layers share a block)."""
    call: Inputs
    """Inputs of the full batch."""
    gradients: tuple[Tensor, ...]
    """Gradient of each curvature scalar with respect to the output, for the samples ``kept``."""
    size: int
    """Number of samples of the full batch."""
    kept: slice
    """Which samples of the batch the statistics are made of."""
    part: int | None
    """Place of the output in the tuple that the module returned; None outside of a tuple."""
    moments: Moments | None
    """Running mean and variance that a batch normalisation used; None for those of the batch."""

    @property
    def whole(self) -> tuple[Tensor, ...]:
        """A layer's input tensors for the full batch."""
        return self.call.tensors()

    @property
    def args(self) -> tuple[Tensor, ...]:
        """A layer's input tensors (N, ...) for the samples ``kept``."""
        return tuple(tensor[self.kept] for tensor in self.whole)


def check_sizes(uses: Sequence[Use], name: str) -> None:
    """Raise ValueError unless all uses, whose samples are added up, have one batch size."""
    sizes = [use.size for use in uses]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"K-FAC layer {name!r} was used with different batch sizes in one pass: {sizes}; its"
            " uses are added up sample by sample and must have the same one"
        )


@dataclass(frozen=True)
class Observation:
    """What a block sees of one batch.

    The gradients belong to scalars s_c with weights w_c; the curvature of the objective is
    1/Z sum_n sum_c w_c g g^T. With a subsample of the batch the sum over it is scaled up.
    """

    uses: Sequence[Use]
    """None in a part of a batch without any, or that no sample of the subsample lies in."""
    weights: Sequence[float]
    """w_c, one per curvature scalar."""
    factor: float
    """What sums over samples are multiplied with (1 but for subsampled sum losses)."""
    count: float
    """What this batch adds to the divisor Z."""
    size: int
    """Number of samples of this part of the batch, the subsample or not; 0 without any use."""


class RunningAverage:
    """Bias-corrected exponential average of a matrix: value and weight decay together.

    A batch whose statistic is not finite leaves the average as it was; this is decided on the
    device, without a host synchronisation. A batch may come in parts (:meth:`add`), which
    :meth:`take` joins.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.weight: Tensor | None = None
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
        mean = None if self._total is None else self._total / self._count
        self.drop()
        return mean

    def drop(self) -> None:
        """Forget the parts of an unfinished batch."""
        self._total, self._count = None, 0.0

    def update(self, new: Tensor, decay: float, valid: Tensor | None = None) -> None:
        """S <- decay S + (1 - decay) S_new, and the same for the weight with 1 in place of S."""
        if self.value is None or self.weight is None:
            self.value = torch.zeros_like(new)
            self.weight = new.new_zeros(())
        finite = all_finite(new) if valid is None else valid
        old_weight = self.weight
        target = torch.where(finite, new, self.value)
        self.value = self.value.lerp(target, 1 - decay)
        grown = old_weight + (1 - decay) * (1 - old_weight)
        self.weight = torch.where(finite, grown, old_weight)

    def mean(self) -> Tensor:
        """The corrected average S / weight; NaN before the first finite batch."""
        if self.value is None or self.weight is None:
            raise FactorError("factor has no statistics yet")
        return self.value / self.weight

    def tensors(self) -> tuple[Tensor | None, Tensor | None]:
        """Value and weight, for a state."""
        return self.value, self.weight

    def load(self, value: Tensor | None, weight: Tensor | None, device: torch.device) -> None:
        """Restore :meth:`tensors`; parts of an unfinished batch are dropped."""
        self.value = None if value is None else value.to(device)
        self.weight = None if weight is None else weight.to(device)
        self.drop()
