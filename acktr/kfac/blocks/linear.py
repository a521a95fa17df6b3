"""The layout of a linear map, in which those of other layers end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acktr.kfac.config import Sharing
from acktr.kfac.statistics import factors
from acktr.kfac.statistics.uses import Use
from acktr.kfac.tensors import accumulation_type, positions

Shapes = tuple[tuple[int, ...], tuple[int, ...]]
"""Shapes of the factors A and G; a diagonal one is a vector."""


def as_matrix(weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    """A weight ([k] out, in) with its bias as the last column, ([k,] out, in [+ 1])."""
    flat = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
    return flat if groups == 1 else flat.reshape(groups, -1, flat.shape[1])


def as_parts(matrix: Tensor, bias: bool, groups: int = 1) -> tuple[Tensor, Tensor | None]:
    """Inverse of :func:`as_matrix`."""
    flat = matrix if groups == 1 else matrix.flatten(0, 1)
    return (flat[:, :-1], flat[:, -1].contiguous()) if bias else (flat, None)


@dataclass(frozen=True)
class LinearLayout:
    """A linear map g = W a + b, over any number of leading dimensions."""

    shape: tuple[int, int]
    """Shape of the weight, (out, in)."""
    bias: bool
    sharing: Sharing

    @property
    def shapes(self) -> Shapes:
        """(in [+ 1]) and (out) square."""
        out, width = self.shape[0], self.shape[1] + self.bias
        return (width, width), (out, out)

    def input_factor(self, uses: Sequence[Use], diagonal: bool) -> tuple[Tensor, float]:
        """Factor A, or its diagonal, as (sum, divisor)."""
        inputs = [use.input for use in uses]
        return factors.linear_input_factor(inputs, self.bias, self.sharing, diagonal)

    def output_factor(self, uses: Sequence[Use], index: int, diagonal: bool) -> Tensor:
        """Sum over samples for factor G, or for its diagonal."""
        gradients = [use.gradients[index] for use in uses]
        return factors.output_factor(gradients, -1, self.sharing, diagonal=diagonal)

    def rows(self, use: Use, index: int) -> tuple[Tensor, Tensor]:
        """Rows a (N, T, in [+ 1]) and g (N, T, out)."""
        inputs = positions(use.input)
        inputs = inputs.to(accumulation_type(inputs))
        gradients = positions(use.gradients[index]).to(inputs.dtype)
        return (factors.append_one(inputs) if self.bias else inputs), gradients

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(out, in [+ 1])."""
        return as_matrix(weight, bias)

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias (out)."""
        return as_parts(matrix, self.bias)
