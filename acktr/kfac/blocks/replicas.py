"""Many linear layers of one shape side by side, each for inputs of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor, nn

from acktr.kfac.blocks.linear import Shapes
from acktr.kfac.config import Sharing
from acktr.kfac.statistics.factors import append_one
from acktr.kfac.statistics.uses import Use
from acktr.kfac.tensors import accumulation_type


class Replicas(nn.Module):
    """S linear layers, y_s = W_s x_s + b_s, for inputs (N, S, in) and outputs (N, S, out).

    It trains S independent networks at once, such as those of S splits of the data or S seeds. It
    computes what ``nn.Conv1d(S * in, S * out, 1, groups=S)`` does, in a third of the time on a CPU,
    and each of the layers has Kronecker factors of its own. Weights begin as those of nn.Linear.

    Args:
        replicas: S.
        in_features: Size of an input.
        out_features: Size of an output.
        bias: Whether there is b.
    """

    def __init__(
        self, replicas: int, in_features: int, out_features: int, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(replicas, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(replicas, out_features)) if bias else None
        bound = 1 / math.sqrt(in_features)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (N, S, out) for inputs (N, S, in)."""
        rows, weight = inputs.transpose(0, 1), self.weight.mT
        if self.bias is None:
            return torch.bmm(rows, weight).transpose(0, 1)
        return torch.baddbmm(self.bias[:, None], rows, weight).transpose(0, 1)


@dataclass(frozen=True)
class ReplicaLayout:
    """S pairs of factors, of inputs (N, S, in) and gradients (N, S, out)."""

    shape: tuple[int, int, int]
    """Shape of the weight, (S, out, in)."""
    bias: bool
    sharing: ClassVar[Sharing] = "expand"
    """There are no positions."""

    @property
    def shapes(self) -> Shapes:
        """(S, in [+ 1]) and (S, out) square."""
        count, out, width = self.shape
        width += self.bias
        return (count, width, width), (count, out, out)

    def input_factor(self, uses: Sequence[Use], diagonal: bool) -> tuple[Tensor, float]:
        """Factor A as (sum, divisor)."""
        moments = [_moment(self._inputs(use)) for use in uses]
        return reduce(torch.add, moments), sum(len(use.input) for use in uses)

    def output_factor(self, uses: Sequence[Use], index: int, diagonal: bool) -> Tensor:
        """Sum over samples for factor G."""
        return reduce(torch.add, (_moment(_rows(use.gradients[index])) for use in uses))

    def rows(self, use: Use, index: int) -> tuple[Tensor, Tensor]:
        """Rows a (S, N, 1, in [+ 1]) and g (S, N, 1, out)."""
        return self._inputs(use)[:, :, None], _rows(use.gradients[index])[:, :, None]

    def _inputs(self, use: Use) -> Tensor:
        rows = _rows(use.input)
        return append_one(rows) if self.bias else rows

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(S, out, in [+ 1])."""
        return weight if bias is None else torch.cat([weight, bias[..., None]], dim=-1)

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight (S, out, in) and bias (S, out)."""
        if not self.bias:
            return matrix, None
        return matrix[..., :-1], matrix[..., -1].contiguous()


def _rows(tensor: Tensor) -> Tensor:
    """(S, N, d) of (N, S, d), in the type of the statistics."""
    return tensor.to(accumulation_type(tensor)).transpose(0, 1)


def _moment(rows: Tensor) -> Tensor:
    return rows.mT @ rows
