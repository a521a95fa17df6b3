"""Where a layer's output holds the samples of a batch, and what its rows weigh.

Blocks see uses with the samples in the first dimension. :func:`placed` brings them there:

1. The first dimension has the length of the loss's output: it is that of the samples.
2. Another dimension alone has that length: it is moved to the front.
3. Otherwise, where a block adds rows up sample by sample, two backward passes name the sample of
   every row (:mod:`acktr.kfac.statistics.owners`). Rows that are vectors are brought together as
   (N, T, ...); others (pictures) stay, and ``Use.owners`` names the samples of the first dimension.
4. Samples meet in a row: ``Use.batched`` is False, and the sum over the batch is squared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from acktr.kfac.statistics.owners import Rows, by_owner, in_order, shared_out
from acktr.kfac.statistics.projections import FUSED
from acktr.kfac.statistics.uses import Use

_ROWS = (nn.Linear, nn.Embedding, *FUSED)
"""Modules of linear maps, whose outputs have one vector for each position."""
_DIMENSIONS: dict[type[nn.Module], int] = {
    nn.Linear: 2,
    nn.Embedding: 2,
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
    nn.ConvTranspose1d: 3,
    nn.ConvTranspose2d: 4,
    nn.ConvTranspose3d: 5,
    nn.InstanceNorm1d: 3,
    nn.InstanceNorm2d: 4,
    nn.InstanceNorm3d: 5,
}
"""Least number of dimensions of an output over a batch."""


@dataclass(frozen=True)
class Samples:
    """What is known of the samples of one batch."""

    sizes: frozenset[int] = frozenset()
    """Numbers of samples of the outputs, one as a rule; none if nothing is known."""
    apart: bool = False
    """Whether samples must not meet in a row of a gradient, as for Exact() and Empirical()."""
    owners: Mapping[str, Sequence[Rows]] = field(default_factory=dict)
    """By layer the samples of the rows of every use, where they were looked for."""
    count: int = 0
    """Number of samples, where they were looked for."""
    weights: Sequence[Tensor] = ()
    """Weights (N, ...) of the loss's terms, for each of its parts that has some."""
    own_weights: Mapping[str, Sequence[Sequence[Tensor] | None]] = field(default_factory=dict)
    """By layer those of the one part that a use is for; None where that is not one alone."""
    present: Sequence[Tensor] = ()
    """Masks (N, T, ...) of positions that are no padding, in layers that see as many."""

    def of_use(self, path: str, place: int) -> Samples:
        """What is known of the samples for one use of a layer."""
        weights = self.own_weights[path][place] if self.own_weights else None
        return self if weights is None else replace(self, weights=weights)

    def dimension(self, module: nn.Module, shape: torch.Size) -> int | None:
        """Dimension of a layer's output that holds the samples; None if it cannot be seen.

        It is the first one if that has their number. Otherwise it is another one that alone has it,
        as in a layer that sees (T, N, D), unless the first is a multiple of it, as in windows
        (k N, T, D).
        """
        if not self.sizes or shape[0] in self.sizes:
            return 0
        if any(shape[0] % size == 0 for size in self.sizes):
            return None
        places = [d for d in range(1, leading(module, shape)) if shape[d] in self.sizes]
        return places[0] if len(places) == 1 else None

    def row_weights(self, use: Use, depth: int | None = None) -> Tensor | None:
        """Weights of a layer's inputs in its factor A, for the first of the leading dimensions.

        A row counts as its term does, and not at all if it is absent. One whose term has the weight
        zero, or that is absent, counts with the mean weight if a gradient reaches it, as a token
        without a label that others attend to.

        Args:
            use: A use of the layer, whose own weights, of padding, are kept.
            depth: Number of dimensions to look at; None for all.

        Returns:
            None for 1.
        """
        if use.owners is not None:
            chosen = [w for w in self.weights if len(w) == self.count][:1]
            return _reduced(chosen[0], 1)[use.owners] if chosen else use.weights
        shape = use.gradients[0].shape[: leading(use.module, use.gradients[0].shape)][:depth]
        result = use.weights
        for each in (self.weights, self.present):
            depths = [_common(weights.shape, shape) for weights in each]
            deepest = max(depths, default=0)
            if deepest == 0:
                continue
            weights = _reduced(each[depths.index(deepest)], deepest)
            reached = torch.stack([(g != 0).flatten(deepest).any(-1) for g in use.gradients]).any(0)
            counted = weights[weights > 0]
            usual = counted.mean() if len(counted) else 1.0  # a rank may have no term of a part
            weights = weights.where(weights > 0, reached * usual)
            result = weights if result is None else _times(weights, result)
        return result


def check_batched(path: str, module: nn.Module, gradient: Tensor) -> None:
    """Raise ValueError for a layer's output that has no leading dimension of samples."""
    least = next((least for kind, least in _DIMENSIONS.items() if isinstance(module, kind)), 1)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        least = 1 + len(module.normalized_shape)
    if gradient.dim() < least:
        raise ValueError(
            f"K-FAC layer {path!r} ({type(module).__name__}) must be called with a batch (N, ...):"
            f" its output has the shape {tuple(gradient.shape)} without N"
        )


def placed(use: Use, batch: Samples, rows: Rows, known: bool) -> Use:
    """The use with the samples in its first dimension, or with the note of where they are.

    Args:
        use: A use as it was recorded.
        batch: What is known of the samples.
        rows: The samples of its rows; None where samples meet in a row.
        known: Whether they were looked for.

    Raises:
        ValueError: Samples meet, and the curvature must take them apart.
    """
    place = batch.dimension(use.module, use.gradients[0].shape)
    if batch.apart and rows is None and (known or place is None):
        raise ValueError(
            f"K-FAC layer {use.name!r} ({type(use.module).__name__}): samples meet in its output"
            f" {tuple(use.gradients[0].shape)}, as in a layer called without the batch or before a"
            " batch normalisation in training; Exact() and Empirical() would take products between"
            " them: Sampled() is right there"
        )
    if place:
        gradients = tuple(gradient.movedim(place, 0) for gradient in use.gradients)
        weights = None if use.weights is None else use.weights.movedim(place, 0)
        use = use.seen_as(use.input.movedim(place, 0), gradients, weights)
        rows = rows if rows is None else rows.movedim(place, 0)
    depth = None
    if rows is not None and not in_order(rows, batch.count):
        depth = 1  # weights of positions would not be in this order
        if isinstance(use.module, (*_ROWS, nn.LayerNorm, nn.RMSNorm)):
            same = [mask for mask in batch.present if mask.shape == rows.shape]
            use = by_owner(use, rows, batch.count, same[0] if same else None)
        else:
            known_rows = bool((rows >= 0).all())
            owners = shared_out(rows, batch.count)
            use = replace(use, owners=owners, count=batch.count, complete=known_rows)
    elif place is None and rows is None:
        return replace(use, batched=False)
    if batch.weights or batch.present:
        use = replace(use, weights=batch.row_weights(use, depth))
    return use


def leading(module: nn.Module, shape: torch.Size) -> int:
    """Number of dimensions of a layer's output before those of one position."""
    if isinstance(module, _ROWS):
        return len(shape) - 1
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return len(shape) - len(module.normalized_shape)
    return 1


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of first dimensions that are the same."""
    pairs = list(zip(first, second, strict=False))
    return next((d for d, (a, b) in enumerate(pairs) if a != b), len(pairs))


def _reduced(weights: Tensor, depth: int) -> Tensor:
    """Mean of the positive weights over all dimensions from the given one on."""
    flat = weights.reshape(*weights.shape[:depth], -1)
    return flat.sum(-1) / (flat > 0).sum(-1).clamp(min=1)


def checked_masks(present: Tensor | Sequence[Tensor] | None, sizes: frozenset[int]) -> list[Tensor]:
    """Masks of positions that are no padding, as numbers.

    Args:
        present: One mask (N, T, ...), or several for layers that see other numbers of positions.
        sizes: Numbers of samples N of the outputs.

    Raises:
        ValueError: One is no such mask, or has no position.
    """
    masks = [] if present is None else [present] if isinstance(present, Tensor) else list(present)
    for mask in masks:
        fits = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.dim() > 0
        if not fits or (sizes and len(mask) not in sizes) or not mask.any():
            raise ValueError(
                "present: masks must be bool tensors (N, T, ...) with N ="
                f" {' or '.join(map(str, sorted(sizes)))}, True where a position is no padding"
            )
    return [mask.to(torch.get_default_dtype()) for mask in masks]


def _times(first: Tensor, second: Tensor) -> Tensor:
    """Product of weights of the first leading dimensions, of which one may have more."""
    count = max(first.dim(), second.dim())
    a, b = (t.reshape(*t.shape, *[1] * (count - t.dim())) for t in (first, second))
    return a * b
