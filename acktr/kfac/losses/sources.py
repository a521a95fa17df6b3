"""Where the curvature's output gradients come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from acktr.kfac.checks import check_integer
from acktr.kfac.losses.base import OutputLoss


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
    source: Source,
    loss: OutputLoss[Any],
    output: Any,
    generator: torch.Generator,
    *,
    apart: bool = False,
) -> Iterator[tuple[Tensor, float]]:
    """Scalars s_c and weights w_c with sum_c w_c E[g_c g_c^T] = H, g the gradient by the output.

    Args:
        source: Which curvature.
        loss: The output loss.
        output: The model's output, with its graph.
        generator: Source of sampled targets.
        apart: Give every sample's part of a scalar a random sign, so that products of gradients of
            different samples have the expectation zero also for Exact and Empirical; those of
            sampled targets have it as they are.

    Raises:
        ValueError: The source is none of the three.
    """
    if isinstance(source, Sampled):
        for _ in range(source.samples):
            yield loss.sampled(output, generator), 1 / source.samples
        return
    if not isinstance(source, Exact | Empirical):
        raise ValueError(
            f"source must be Sampled(n), Exact() or Empirical(target), got {source!r:.100}"
        )
    given = tree_map(_copy, output) if apart else output
    scalars: Iterable[Tensor]
    if isinstance(source, Exact):
        scalars = loss.roots(given)
    else:
        scalars = [loss.empirical(given, source.target)]
    for scalar in scalars:
        yield (_signed(scalar, given, output, generator) if apart else scalar), 1.0


def _copy(part: Any) -> Any:
    """A part of the output without its graph."""
    return part.detach().requires_grad_(part.requires_grad) if isinstance(part, Tensor) else part


def _signed(scalar: Tensor, given: Any, output: Any, generator: torch.Generator) -> Tensor:
    """sum_n e_n r_n z_n with random signs e_n, where r is the gradient of a scalar by the output.

    Args:
        scalar: Computed from the copy.
        given: A detached copy of the output, whose parts do not lead to one another.
        output: The output z, with its graph; parts of one length have the same samples and signs.
        generator: Source of the signs.
    """
    pairs = zip(tree_flatten(given)[0], tree_flatten(output)[0], strict=True)
    trained = [(copy, part) for copy, part in pairs if getattr(copy, "requires_grad", False)]
    copies = [copy for copy, _ in trained]
    roots = torch.autograd.grad(scalar, copies, retain_graph=True, allow_unused=True)
    signs: dict[int, Tensor] = {}
    terms = []
    for root, (_, part) in zip(roots, trained, strict=True):
        if len(part) not in signs:
            drawn = torch.rand(len(part), generator=generator, device=part.device)
            signs[len(part)] = drawn.round().mul_(2).sub_(1)
        if root is not None:
            sign = signs[len(part)].to(root.dtype).reshape(-1, *[1] * (part.dim() - 1))
            terms.append((sign * root * part).sum())
    return torch.stack(terms).sum()
