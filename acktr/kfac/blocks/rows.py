"""What all layouts make of rows: factor A of those with weights, and squares of gradients.

Rows of the inputs have weights v, such as the mask of padded positions:

    expand   A = sum_{n,t} v a a^T / sum_{n,t} v
    reduce   A = sum_n v_n abar abar^T / sum_n v_n,   abar = sum_t v a / sum_t v

with v_n the mean of a sample's positive weights. With weights w of the loss's terms G is
1/Z sum w g g^T, and A (x) G is exact wherever that with repeated terms is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor, nn

from acktr.kfac.config import Sharing
from acktr.kfac.statistics import factors
from acktr.kfac.statistics.owners import slots
from acktr.kfac.statistics.uses import Use
from acktr.kfac.tensors import accumulation_type


class Rows(Protocol):
    """A layout whose uses are rows a and g of a linear map."""

    def rows(self, use: Use, index: int) -> tuple[Tensor, Tensor]:
        """Rows a ([k,] N, T, in [+ 1]) and g ([k,] N, T, out)."""


class RowLayout(Rows, Protocol):
    """One that also makes factor A of them."""

    @property
    def sharing(self) -> Sharing:
        """How positions share the weight."""

    def input_factor(self, uses: Sequence[Use], diagonal: bool) -> tuple[Tensor, float]:
        """Factor A, or its diagonal, of rows without weights, as (sum, divisor)."""


def input_factor(layout: RowLayout, uses: Sequence[Use], diagonal: bool) -> tuple[Tensor, float]:
    """Factor A, or its diagonal, as (sum, divisor), of uses whose rows may have weights."""
    if not _to_weigh(layout.sharing, uses):
        return layout.input_factor([kept(use) for use in uses], diagonal)
    rows = [layout.rows(use, 0)[0] for use in uses]
    pairs = zip(uses, rows, strict=True)
    weights = [spread(use.weights, len(use.gradients[0]), row) for use, row in pairs]
    if layout.sharing == "reduce":
        return reduced(rows, weights, diagonal)
    parts = [expanded(row, v, diagonal) for row, v in zip(rows, weights, strict=True)]
    return reduce(torch.add, (total for total, _ in parts)), sum(count for _, count in parts)


def token_factor(module: nn.Embedding, uses: Sequence[Use]) -> tuple[Tensor, float]:
    """Diagonal factor A of an embedding as (sum, divisor), of tokens that may have weights.

    The input of an embedding is one-hot, so that A is diagonal: the frequencies of tokens (V,). A
    padding index has no gradient and counts as a zero input.
    """
    kind, divisor = accumulation_type(uses[0].gradients[0]), 0.0
    counts = uses[0].gradients[0].new_zeros(module.num_embeddings, dtype=kind)
    for use in uses:
        like = use.gradients[0].reshape(len(use.gradients[0]), -1, module.embedding_dim)
        weights = spread(use.weights, len(like), like[..., :1].to(kind))
        counts.index_add_(0, use.input.flatten(), weights.flatten())
        divisor += weights.numel() if use.weights is None else float(weights.sum())
    if module.padding_idx is not None:
        counts[module.padding_idx] = 0
    return counts, divisor


def _to_weigh(sharing: Sharing, uses: Sequence[Use]) -> bool:
    """Whether more is to be done for weights than to leave rows out, some but not all of a use."""
    given = [use.weights for use in uses if use.weights is not None]
    graded = any(bool(((v != 0) & (v != 1)).any() | ~v.any()) for v in given)
    return graded or (sharing == "reduce" and bool(given))


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


def kept(use: Use) -> Use:
    """The use without its rows of weight zero, in which no gradient is."""
    if use.weights is None:
        return use
    counted = use.weights > 0
    return use.seen_as(use.input[counted], (gradient[counted] for gradient in use.gradients))


def squares(
    layout: Rows,
    uses: Sequence[Use],
    index: int,
    a_vectors: Tensor | None,
    g_vectors: Tensor | None,
    apart: bool,
) -> Tensor:
    """Sum over samples of (Q_G^T (sum_t g a^T) Q_A)^2, ([k,] out, in [+ 1]).

    Args:
        layout: The layout of a layer.
        uses: Its uses, whose rows are added up sample by sample.
        index: Number of the scalar.
        a_vectors: Q_A; None for the identity.
        g_vectors: Q_G.
        apart: Whether the samples of the rows are known; else all are those of one.
    """
    pairs = [_by_sample(use, *layout.rows(use, index)) for use in uses]
    inputs = torch.cat([pair[0] for pair in pairs], dim=-2)
    inputs = inputs if a_vectors is None else _turned(inputs, a_vectors)
    gradients = torch.cat([pair[1] for pair in pairs], dim=-2)
    gradients = gradients if g_vectors is None else _turned(gradients, g_vectors)
    if not apart:
        inputs, gradients = (rows.flatten(-3, -2).unsqueeze(-3) for rows in (inputs, gradients))
    return factors.squared_gradients(inputs, gradients)


def _turned(rows: Tensor, vectors: Tensor) -> Tensor:
    """Rows ([k,] N, T, d) in the basis of vectors ([k,] d, d), in one product for all samples."""
    turned: Tensor = rows.flatten(-3, -2) @ vectors
    return turned.reshape(*rows.shape[:-1], vectors.shape[-1])


def _by_sample(use: Use, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ([k,] N, T, d) brought together by the samples that own entries of a first dimension."""
    if use.owners is None:
        return inputs, gradients
    order, place, most = slots(use.owners, use.count)

    def put(rows: Tensor) -> Tensor:
        filled = rows.new_zeros(*rows.shape[:-3], use.count * most, *rows.shape[-2:])
        filled[..., place, :, :] = rows[..., order, :, :]
        return filled.reshape(*rows.shape[:-3], use.count, -1, rows.shape[-1])

    return put(inputs), put(gradients)
