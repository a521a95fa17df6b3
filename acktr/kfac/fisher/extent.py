"""How large a batch is, and how much of it stands for it in an estimate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from acktr.kfac.cadence import SPARSEST
from acktr.kfac.fisher.products import Curved
from acktr.kfac.losses.base import OutputLoss
from acktr.kfac.losses.sums import SumLoss, term_weights
from acktr.kfac.losses.terms import has_rows
from acktr.kfac.tensors import parts_of

_LEAST_TERMS, _LEAST_SAMPLES = 32, 8
"""What a part of a batch must have to stand for all of it."""
_LEAST_EFFECTIVE = 16
"""Terms of equal forms that a measured part must be worth."""
Sizes = Sequence[float | None]
"""Z of every part of a loss; None for a sum, which is not divided."""


class Forms(NamedTuple):
    """The exact forms of a part of a batch's samples."""

    grams: Tensor
    """(parts, k, k), each divided by its Z."""
    sizes: tuple[float | None, ...]
    """Z of every part of the loss."""
    samples: int
    moments: tuple[float, float]
    """Sums of the terms' forms and of their squares."""


class Estimate(NamedTuple):
    """The exact forms of a batch, estimated from a part of its samples."""

    grams: Tensor
    """(parts, k, k)."""
    sparsest: int
    """Every how many-th sample is enough for the next one, by :func:`next_sparsest`."""


def of_all(grams: Tensor, taken: Sizes, whole: Sizes, times: tuple[int, int]) -> Tensor:
    """The forms (parts, k, k) of a batch as those of some samples estimate them.

    Terms of weight zero are samples too: what is scaled is the sum over a part's terms, by one over
    the share of the samples that were taken (Horvitz & Thompson 1952).

    Args:
        grams: Of the samples taken, each part divided by its Z there.
        taken: Sizes there.
        whole: Those of the batch.
        times: Samples of the batch, and those taken.
    """
    count, some = times
    pairs = zip(taken, whole, strict=True)
    scales = [(part or 1.0) / (total or 1.0) * count / some for part, total in pairs]
    return grams * grams.new_tensor(scales)[:, None, None]


def stride(samples: int, terms: int, sparsest: int = SPARSEST) -> int:
    """Every how many-th of so many samples is enough to estimate a quadratic form."""
    return max(1, min(sparsest, terms // _LEAST_TERMS, samples // _LEAST_SAMPLES))


def term_moments(curved: Curved) -> tuple[float, float]:
    """Sums of q and q^2, q = sum_i t_i^T H t_i being what a term of the loss bears of the forms.

    Terms are samples, or the positions of every sample of an output (N, ..., K) in one part.
    """
    first = 1 if isinstance(curved.output, tuple) else -1
    forms: list[Tensor] = []
    for tangent, product in zip(curved.tangents, curved.products, strict=True):
        pairs = zip(parts_of(tangent), parts_of(product), strict=True)
        forms.extend((t * h).flatten(first).sum(-1) for t, h in pairs)
    each = torch.stack(forms).sum(0)
    return float(each.sum()), float(each.square().sum())


def next_sparsest(samples: int, taken: int, forms: float, squares: float) -> int:
    """Every how many-th sample is enough, by what a measurement saw.

    Few terms may bear most of a form, as once a task is nearly solved: (sum q)^2 / sum q^2 terms of
    equal forms would scatter alike (Kish 1965, effective sample size), and sixteen are wanted.

    Args:
        samples: Of the whole batch.
        taken: Samples that were measured.
        forms: Sum of the forms q of their terms.
        squares: Sum of q^2.
    """
    effective = forms**2 / squares if 0 < squares < math.inf else 0.0
    return max(1, min(SPARSEST, int(samples * effective / (taken * _LEAST_EFFECTIVE))))


def sizes(loss: OutputLoss[Any], output: Any) -> tuple[float | None, ...]:
    """Z of every part of a loss, 0 without rows; None for a sum, which is not divided."""
    pairs: Any = [(loss, output)]
    if isinstance(loss, SumLoss):
        pairs = zip(loss.parts, output, strict=True)
    return tuple(
        part.normalizer(one) if len(one) else None if part.reduction == "sum" else 0.0
        for part, one in pairs
    )


def without_terms(loss: OutputLoss[Any], output: Any) -> bool:
    """Whether a batch has no row, or only terms of weight zero."""
    if not has_rows(output):
        return True
    weights = term_weights(loss)
    return all(weights) and not any(bool((w > 0).any()) for each in weights for w in each)
