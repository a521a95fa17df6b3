"""Where the curvature's output gradients come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acktr.kfac.checks import check_integer
from acktr.kfac.losses.likelihoods import OutputLoss


@dataclass(frozen=True)
class Sampled:
    """The true Fisher by Monte Carlo: targets drawn from the model's own distribution."""

    samples: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError unless samples is a positive integer."""
        check_integer("samples", self.samples, 1)


@dataclass(frozen=True)
class Exact:
    """The exact Fisher, which is the generalised Gauss-Newton matrix: one pass per output column.

    With positions in the output there is a column for every position and every output entry.
    """


@dataclass(frozen=True)
class Empirical:
    """The empirical Fisher: gradients at the real targets. It is not the Fisher information."""

    target: Any


Source = Sampled | Exact | Empirical


def curvature_scalars(
    source: Source, loss: OutputLoss[Any], output: Any, generator: torch.Generator
) -> Iterator[tuple[Tensor, float]]:
    """Scalars s_c and weights w_c with sum_c w_c E[g_c g_c^T] = H, g the gradient by the output.

    Args:
        source: Which curvature.
        loss: The output loss.
        output: The model's output, with its graph.
        generator: Source of sampled targets.

    Raises:
        ValueError: The source is none of the three.
    """
    if isinstance(source, Sampled):
        for _ in range(source.samples):
            yield loss.sampled(output, generator), 1 / source.samples
    elif isinstance(source, Exact):
        for scalar in loss.roots(output):
            yield scalar, 1.0
    elif isinstance(source, Empirical):
        yield loss.empirical(output, source.target), 1.0
    else:
        raise ValueError(
            f"source must be Sampled(n), Exact() or Empirical(target), got {source!r:.100}"
        )
