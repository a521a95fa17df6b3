"""A batch in micro-batches: what the whole one gives, with the activations of one in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from acktr import tree
from acktr.tree import Observed, Sequences


@dataclass(frozen=True)
class MicroBatch:
    """Consecutive samples of a batch."""

    rows: slice
    """Their place in the batch."""
    share: float
    """Their part of the batch: means over the batch are sums of share times mean."""
    last: bool
    """Whether the batch ends with them."""


def micro_batches(samples: int, limit: int | None) -> list[MicroBatch]:
    """The fewest micro-batches of at most ``limit`` samples, in order and of even sizes.

    Args:
        samples: Size of the batch.
        limit: Most samples of a micro-batch; None: the whole batch is the only one.
    """
    count = 1 if limit is None else max(1, -(-samples // limit))
    edges = [samples * index // count for index in range(count + 1)]
    return [
        MicroBatch(slice(start, stop), (stop - start) / max(samples, 1), stop == samples)
        for start, stop in pairwise(edges)
    ]


def parts_of(
    observations: Observed, limit: int | None, sample: slice | None = None
) -> list[MicroBatch]:
    """The micro-batches of a batch, or of some of its samples; sequences stay whole.

    Args:
        observations: Those of the batch.
        limit: Most samples of a micro-batch, unless one sequence has more; None: there is one.
        sample: The samples; None for all.
    """
    if isinstance(observations, Sequences):
        some = observations if sample is None else observations.rows(sample)
        first = 0 if sample is None else sample.start
        return [
            MicroBatch(slice(first + a, first + b), (b - a) / len(some), b == len(some))
            for a, b in pairwise(some.split(limit))
        ]
    numbers = range(tree.length(observations))[sample or slice(None)]
    parts = micro_batches(len(numbers), limit)
    if sample is None:
        return parts
    mine = (numbers[part.rows] for part in parts)
    return [
        replace(part, rows=slice(some.start, some.stop, some.step))
        for part, some in zip(parts, mine, strict=True)
    ]


def add_means(totals: dict[str, Tensor], means: Mapping[str, Tensor], share: float) -> None:
    """Add a micro-batch's means to those of the batch, without their graph."""
    for name, mean in means.items():
        part = mean.detach() if share == 1 else mean.detach() * share
        totals[name] = totals[name] + part if name in totals else part


@torch.no_grad()
def outputs_of(
    forward: Callable[[Any], Tensor], observations: Observed, limit: int | None
) -> Tensor:
    """Outputs (B, ...) for all observations, at most ``limit`` of them at once."""
    parts = parts_of(observations, limit)
    return torch.cat([forward(tree.rows(observations, part.rows)) for part in parts])
