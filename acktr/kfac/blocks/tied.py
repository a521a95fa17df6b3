"""A table that is the weight of embeddings and of the linear head: one block over unlike uses.

In the orientation of the table (V, D) the embedding's part of the Fisher is F_1 = A_1 (x) G_1 with
A_1 the diagonal of token frequencies (V) and G_1 (D) the gradients with respect to its output; the
head's is F_2 = G_2 (x) A_2 with G_2 (V) the gradients with respect to the logits and A_2 (D) the
hidden units. The sum L_1 (x) R_1 + L_2 (x) R_2 is no Kronecker product; the block is the one with
the same partial traces,

    L = sum_u tr(R_u) L_u,   R = sum_u tr(L_u) R_u,   F = L (x) R / tau,   tau = tr L = tr R,

the nearest Kronecker product in relative entropy (of positive matrices with trace tau it is the
product of the marginals). With shares p_u = tr(F_u) / tau and L_u, R_u of trace 1 its error is

    F - F_1 - F_2 = -tau p_1 p_2 (L_1 - L_2) (x) (R_1 - R_2),

nothing where one use has all of the trace. The inverse of the sum itself, solved densely, trained a
small language model no better. As with every weight of several uses the products of an
embedding's gradient and a head's are left out. Above ``max_factor_size`` the diagonal of L or R
is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor, nn

from acktr.kfac.blocks.linear import LinearLayout
from acktr.kfac.blocks.rows import input_factor, token_factor
from acktr.kfac.config import Sharing
from acktr.kfac.statistics import factors
from acktr.kfac.statistics.uses import Use
from acktr.kfac.tensors import accumulation_type, positions


class TiedLayout:
    """The table of embeddings and linear heads.

    Args:
        module: One of these layers.
    """

    sharing: ClassVar[Sharing] = "expand"
    """Tokens have no mean."""

    def __init__(self, module: nn.Module) -> None:
        self.words, self.width = module.get_parameter("weight").shape

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(V) and (D) square."""
        return (self.words, self.words), (self.width, self.width)

    def moments(
        self, uses: Sequence[Use], weights: Sequence[float], diagonals: tuple[bool, bool]
    ) -> tuple[Tensor, float, Tensor]:
        """L with trace 1 as (sum, divisor), and the sum over samples of R.

        Args:
            uses: Of all layers.
            weights: w_c of each scalar.
            diagonals: Whether only the diagonal of L, and of R, is wanted.
        """
        tables = [use for use in uses if isinstance(use.module, nn.Embedding)]
        heads = [use for use in uses if not isinstance(use.module, nn.Embedding)]
        pairs, tokens = [], 0.0
        if tables:
            module = tables[0].module
            assert isinstance(module, nn.Embedding)
            total, count = token_factor(module, tables)
            mean = total / (count or 1.0)  # a rank may have no term of a part
            frequencies = mean if diagonals[0] else mean.diag()
            pairs.append((frequencies, _gradient_factor(tables, weights, diagonals[1])))
            tokens += count
        if heads:
            layout = LinearLayout((self.words, self.width), False, "expand")
            total, count = input_factor(layout, heads, diagonals[1])
            pairs.append((_gradient_factor(heads, weights, diagonals[0]), total / (count or 1.0)))
            tokens += count
        traces = [(_trace(left), _trace(right)) for left, right in pairs]
        left = _sum([x * right for (x, _), (_, right) in zip(pairs, traces, strict=True)])
        right = _sum([x * left for (_, x), (left, _) in zip(pairs, traces, strict=True)])
        tau = _trace(right).clamp(min=torch.finfo(right.dtype).tiny)  # no gradient gives zeros
        return left / tau * tokens, tokens, right

    def rows(self, use: Use, index: int) -> tuple[Tensor, Tensor]:
        """Rows of the words (N, T, V) and of the width (N, T, D), whose products are gradients."""
        gradients = factors.output_rows(use.gradients[index], -1)
        gradients = gradients.to(accumulation_type(gradients))
        if not isinstance(use.module, nn.Embedding):
            return gradients, positions(use.input).to(gradients.dtype)
        tokens = use.input.reshape(gradients.shape[:2])
        hot = gradients.new_zeros(*tokens.shape, self.words)
        seen = (
            torch.ones_like(tokens)
            if use.module.padding_idx is None
            else tokens.ne(use.module.padding_idx)
        )
        return hot.scatter_(-1, tokens[..., None], seen[..., None].to(hot.dtype)), gradients

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(D, V), the transposed table."""
        return weight.mT

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """The table (V, D)."""
        return matrix.mT.contiguous(), None


def _gradient_factor(uses: Sequence[Use], weights: Sequence[float], diagonal: bool) -> Tensor:
    parts = []
    for index, weight in enumerate(weights):
        gradients = [use.gradients[index] for use in uses]
        parts.append(weight * factors.output_factor(gradients, -1, "expand", diagonal=diagonal))
    return _sum(parts)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of at least one tensor."""
    return reduce(torch.add, tensors)


def _trace(factor: Tensor) -> Tensor:
    return factor.sum() if factor.dim() == 1 else factor.trace()
