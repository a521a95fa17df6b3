"""How large a batch is, and how much of it stands for it in an estimate."""

from __future__ import annotations

from typing import Any

from acktr.kfac.losses.likelihoods import OutputLoss
from acktr.kfac.losses.sums import SumLoss

_LEAST_TERMS, _LEAST_SAMPLES, _SPARSEST = 32, 8, 8
"""What a part of a batch must have to stand for all of it, and one over the least part."""


def stride(samples: int, terms: int) -> int:
    """Every how many-th of so many samples is enough to estimate a quadratic form."""
    return max(1, min(_SPARSEST, terms // _LEAST_TERMS, samples // _LEAST_SAMPLES))


def sizes(loss: OutputLoss[Any], output: Any) -> tuple[float | None, ...]:
    """Z of every part of a loss; None for a sum, which is not divided."""
    if isinstance(loss, SumLoss):
        pairs = zip(loss.parts, output, strict=True)
        return tuple(part.normalizer(one) for part, one in pairs)
    return (loss.normalizer(output),)
