"""The loss of a network with several outputs: a weighted sum of losses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acktr.kfac.checks import check_number
from acktr.kfac.losses.base import OutputLoss, with_weights
from acktr.kfac.losses.terms import Reduction, check_tuple


@dataclass(frozen=True, init=False)
class SumLoss:
    """h = sum_k w_k h_k for a network with several outputs, such as a policy and a value.

    Output and target are tuples with one tensor for each part. Everything that is not divided by Z
    is scaled to the normalizer Z_0 of the first part: H_k counts w_k Z_0 / Z_k times, so that
    dividing by Z_0 gives the curvature of h.

    Args:
        parts: The losses, all with the same reduction; each an argument, or together a tuple.
        weights: A finite number > 0 for each part; None means 1 for all of them.

    Raises:
        ValueError: No parts, different reductions, or weights that do not fit.
    """

    parts: tuple[OutputLoss[Tensor], ...]
    weights: tuple[float, ...] | None

    def __init__(
        self,
        *losses: OutputLoss[Tensor] | tuple[OutputLoss[Tensor], ...],
        parts: tuple[OutputLoss[Tensor], ...] | None = None,
        weights: tuple[float, ...] | None = None,
    ) -> None:
        if losses and parts is not None:
            raise ValueError("SumLoss: give the losses as arguments or as parts, not both")
        given: Any = losses[0] if len(losses) == 1 and isinstance(losses[0], tuple) else losses
        object.__setattr__(self, "parts", given if parts is None else parts)
        object.__setattr__(self, "weights", weights)
        whole = isinstance(self.parts, tuple) and all(isinstance(p, OutputLoss) for p in self.parts)
        if not self.parts or not whole:
            raise ValueError(f"SumLoss: parts must be a tuple of losses, got {self.parts!r}")
        reductions = [part.reduction for part in self.parts]
        if len(set(reductions)) > 1:
            raise ValueError(f"SumLoss: parts must share one reduction, got {reductions}")
        if self.weights is not None:
            check_tuple(self, "weights", self.weights, len(self.parts), "numbers")
            for index, weight in enumerate(self.weights):
                check_number(f"SumLoss: weights[{index}]", weight, open_low=True)

    @property
    def reduction(self) -> Reduction:
        """The reduction of the parts."""
        return self.parts[0].reduction

    def weighted(
        self,
        output: tuple[Tensor, ...],
        weights: Tensor | tuple[Tensor | None, ...] | None = None,
        target: tuple[Tensor, ...] | None = None,
        *,
        empty: bool = False,
    ) -> SumLoss:
        """This loss with weights for the terms of one batch, see :class:`Likelihood`.

        Args:
            output: The network's outputs.
            weights: One tensor for all parts, or a tuple with one, or None, for each part.
            target: The targets.
            empty: Whether the parts may have no terms, as in the share of one of several ranks.

        Raises:
            ValueError: Something does not fit.
        """
        count = len(self.parts)
        check_tuple(self, "output", output, count)
        each = (weights,) * count if weights is None or isinstance(weights, Tensor) else weights
        check_tuple(self, "weights of the terms", each, count, "tensors or None")
        targets = (None,) * count if target is None else target
        check_tuple(self, "target", targets, count)
        given = zip(self.parts, output, each, targets, strict=True)
        bound = copy(self)
        each_bound = (with_weights(p, o, w, t, empty=empty) for p, o, w, t in given)
        object.__setattr__(bound, "parts", tuple(each_bound))
        return bound

    def __call__(
        self,
        output: tuple[Tensor, ...],
        target: tuple[Tensor, ...],
        weights: Tensor | tuple[Tensor | None, ...] | None = None,
    ) -> Tensor:
        """Sum of w_k h_k."""
        check_tuple(self, "output", output, len(self.parts))
        check_tuple(self, "target", target, len(self.parts))
        bound = self if weights is None else self.weighted(output, weights, target)
        losses = zip(self.part_weights, bound.parts, output, target, strict=True)
        return torch.stack([weight * part(o, t) for weight, part, o, t in losses]).sum()

    def normalizer(self, output: tuple[Tensor, ...]) -> float | None:
        """Z_0, that of the first part."""
        check_tuple(self, "output", output, len(self.parts))
        return self.parts[0].normalizer(output[0])

    def sampled(self, output: tuple[Tensor, ...], generator: torch.Generator | None) -> Tensor:
        """Sum of the parts' samples times sqrt(w_k Z_0 / Z_k), drawn one part after another."""
        scaled = zip(self.scales(output), self.parts, output, strict=True)
        sums = [math.sqrt(scale) * part.sampled(o, generator) for scale, part, o in scaled]
        return torch.stack(sums).sum()

    def empirical(self, output: tuple[Tensor, ...], target: tuple[Tensor, ...]) -> Tensor:
        """Sum of the parts' terms times sqrt(w_k Z_0 / Z_k), by which part k counts in g g^T."""
        check_tuple(self, "target", target, len(self.parts))
        scaled = zip(self.scales(output), self.parts, output, target, strict=True)
        sums = [math.sqrt(scale) * part.empirical(o, t) for scale, part, o, t in scaled]
        return torch.stack(sums).sum()

    def roots(self, output: tuple[Tensor, ...]) -> Iterator[Tensor]:
        """The parts' columns times sqrt(w_k Z_0 / Z_k), each part with columns of its own."""
        scaled = zip(self.scales(output), self.parts, output, strict=True)
        columns = [(math.sqrt(scale), part.roots(o)) for scale, part, o in scaled]
        return (root * column for root, part in columns for column in part)

    def hessian_product(
        self, output: tuple[Tensor, ...], tangent: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """w_k Z_0 / Z_k H_k t_k for each part."""
        check_tuple(self, "tangent", tangent, len(self.parts))
        scaled = zip(self.scales(output), self.parts, output, tangent, strict=True)
        return tuple(scale * part.hessian_product(o, t) for scale, part, o, t in scaled)

    def kl(self, output: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> Tensor:
        """The KL of each part (K,), without its weight w_k."""
        check_tuple(self, "output", output, len(self.parts))
        check_tuple(self, "other", other, len(self.parts))
        each = []
        for part, old, new in zip(self.parts, output, other, strict=True):
            divergence = getattr(part, "kl", None)
            if divergence is None:
                raise ValueError(f"SumLoss: {type(part).__name__} has no kl(output, other)")
            each.append(divergence(old, new))
        return torch.cat(each)

    @property
    def part_weights(self) -> tuple[float, ...]:
        """w_k of every part."""
        return self.weights or (1.0,) * len(self.parts)

    def scales(self, output: tuple[Tensor, ...]) -> list[float]:
        """w_k Z_0 / Z_k of every part, which must not differ between micro-batches."""
        check_tuple(self, "output", output, len(self.parts))
        sizes = [p.normalizer(o) or 1.0 for p, o in zip(self.parts, output, strict=True)]
        return [w * sizes[0] / size for w, size in zip(self.part_weights, sizes, strict=True)]


def term_weights(loss: OutputLoss[Any]) -> list[list[Tensor]]:
    """The weights of the terms of every part of a loss; none for a part where all are 1."""
    parts = loss.parts if isinstance(loss, SumLoss) else (loss,)
    return [getattr(part, "term_weights", []) for part in parts]
