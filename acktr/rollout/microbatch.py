"""A batch in micro-batches: what the whole one gives, with the activations of one in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from acktr import tree
from acktr.tree import Tree


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


def add_means(totals: dict[str, Tensor], means: Mapping[str, Tensor], share: float) -> None:
    """Add a micro-batch's means to those of the batch, without their graph."""
    for name, mean in means.items():
        part = mean.detach() * share
        totals[name] = totals[name] + part if name in totals else part


@torch.no_grad()
def outputs_of(forward: Callable[[Tree], Tensor], observations: Tree, limit: int | None) -> Tensor:
    """Outputs (B, ...) for all observations, at most ``limit`` of them at once."""
    parts = micro_batches(tree.length(observations), limit)
    return torch.cat([forward(tree.rows(observations, part.rows)) for part in parts])
