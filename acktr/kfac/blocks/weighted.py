"""Factor A of inputs whose rows have weights v, such as the mask of padded positions.

    expand   A = sum_{n,t} v a a^T / sum_{n,t} v
    reduce   A = sum_n v_n abar abar^T / sum_n v_n,   abar = sum_t v a / sum_t v

with v_n the mean of a sample's positive weights. With weights w of the loss's terms G is
1/Z sum w g g^T, and A (x) G is exact wherever that with repeated terms is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from acktr.kfac.blocks.projections import ProjectionLayout
from acktr.kfac.statistics.factors import accumulation_type
from acktr.kfac.statistics.inputs import Inputs
from acktr.kfac.statistics.uses import Use


def input_factor(layout: Any, uses: Sequence[Use], diagonal: bool) -> tuple[Tensor, float]:
    """Factor A, or its diagonal, as (sum, divisor).

    Args:
        layout: The layout of a layer; in the projections of fused modules weights are a mask.
        uses: The uses, whose rows of inputs may have weights.
        diagonal: Whether the diagonal alone is wanted.
    """
    found: tuple[Tensor, float]
    given = [use.weights for use in uses if use.weights is not None]
    graded = any(bool(((v != 0) & (v != 1)).any()) for v in given)
    if isinstance(layout, ProjectionLayout):
        return layout.input_factor([_masked(use) for use in uses], diagonal)
    if not given or (layout.sharing == "expand" and not graded):
        found = layout.input_factor([kept(use) for use in uses], diagonal)
        return found
    tables = [use.module for use in uses if isinstance(use.module, nn.Embedding)]
    rows = [use.gradients[0] for use in uses] if tables else [layout.rows(u, 0)[0] for u in uses]
    rows = [row.to(accumulation_type(row)) for row in rows]
    rows = [row.reshape(len(row), -1, row.shape[-1]) for row in rows] if tables else rows
    pairs = zip(uses, rows, strict=True)
    weights = [spread(use.weights, len(use.gradients[0]), row) for use, row in pairs]
    if layout.sharing == "reduce":
        return reduced(rows, weights, diagonal)
    if tables:
        tokens = [use.input for use in uses]
        parts = [token_counts(*each) for each in zip(tokens, weights, tables, strict=True)]
    else:
        parts = [expanded(row, v, diagonal) for row, v in zip(rows, weights, strict=True)]
    return reduce(torch.add, (total for total, _ in parts)), sum(count for _, count in parts)


def spread(weights: Tensor | None, samples: int, rows: Tensor) -> Tensor:
    """Weights of rows ([k,] N, T, d) as (N, T); None for 1.

    Args:
        weights: For the first of the dimensions (N, ...) that the rows' positions are made of.
        samples: N.
        rows: The rows, whose type the weights get.
    """
    positions = rows.shape[-2]
    if weights is None:
        return rows.new_ones(samples, positions)
    flat = weights.to(rows.dtype).reshape(samples, -1)
    return flat.repeat_interleave(positions // flat.shape[1], dim=1)


def expanded(rows: Tensor, weights: Tensor, diagonal: bool) -> tuple[Tensor, float]:
    """Sum of v a a^T, ([k,] d, d), or of its diagonal, and of v.

    Args:
        rows: a, ([k,] N, T, d).
        weights: v (N, T).
        diagonal: Whether the diagonal alone is wanted.
    """
    scaled = (weights.sqrt()[..., None] * rows).flatten(-3, -2)
    total = scaled.square().sum(-2) if diagonal else scaled.mT @ scaled
    return total, float(weights.sum())


def reduced(
    rows: Sequence[Tensor], weights: Sequence[Tensor], diagonal: bool
) -> tuple[Tensor, float]:
    """Sum of v_n abar abar^T, or of its diagonal, and of v_n; one entry for every use."""
    every, v = torch.cat(list(rows), dim=-2), torch.cat(list(weights), dim=-1)
    counts = (v > 0).sum(-1).clamp(min=1)
    own = v.sum(-1) / counts
    mean = (v[..., None] * every).sum(-2) / torch.where(own > 0, own * counts, 1)[:, None]
    return expanded(mean[..., None, :], own[:, None], diagonal)


def token_counts(tokens: Tensor, weights: Tensor, module: nn.Embedding) -> tuple[Tensor, float]:
    """Sum of the weights of every token (V,), without a padding index, and of all.

    Args:
        tokens: (N, T).
        weights: v (N, T).
        module: The embedding of V tokens.
    """
    counts = weights.new_zeros(module.num_embeddings)
    counts.index_add_(0, tokens.flatten(), weights.flatten())
    if module.padding_idx is not None:
        counts[module.padding_idx] = 0
    return counts, float(weights.sum())


def kept(use: Use) -> Use:
    """The use without its rows of weight zero, in which no gradient is."""
    if use.weights is None:
        return use
    counted = use.weights > 0
    call = Inputs.of((use.input[counted],))
    return replace(use, call=call, gradients=tuple(g[counted] for g in use.gradients))


def _masked(use: Use) -> Use:
    """The use with rows of weight zero marked as padding."""
    if use.weights is None:
        return use
    counted, valid = use.weights > 0, use.call.kwargs.get("valid")
    counted = counted.reshape(*counted.shape, *[1] * (use.input.dim() - 1 - counted.dim()))
    counted = counted.expand(use.input.shape[:-1])
    both = counted if valid is None else counted & valid.reshape(counted.shape)
    return replace(use, call=Inputs.of(use.call.args, {"valid": both}))
