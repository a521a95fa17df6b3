"""Dense truth for whole steps: networks written out once more, every layer as rows times a matrix.

A reference computes a network's output from its parameters with :class:`Taps`, in which a layer is
s = a M^T with rows a (N, T, in) and the matrix M of its weight and bias. Jacobians of every output
entry with respect to s and to the parameters then give, with a root L of the output's Fisher H,

    A = mean of a a^T,   G = 1/Z sum J_s^T H J_s,   F = 1/Z sum J^T H J.

Nothing of the library is in it; that the output is the module's proves rows and matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Key = tuple[str, int]
"""A layer, and which of the matrices that its weight stacks."""


@dataclass
class Taps:
    """Rows that layers took, and zeros added to what they gave, by use."""

    rows: dict[Key, list[Tensor]] = field(default_factory=dict)
    zeros: dict[Key, list[Tensor]] = field(default_factory=dict)

    def __call__(
        self, name: str, rows: Tensor, weight: Tensor, bias: Tensor | None = None, part: int = 0
    ) -> Tensor:
        """Outputs (N, T, out) of rows (N, T, in), with T = 1 where a sample has one row."""
        if bias is not None:
            rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
            weight = torch.cat([weight, bias[:, None]], 1)
        output = rows @ weight.mT
        zero = torch.zeros_like(output, requires_grad=True)
        self.rows.setdefault((name, part), []).append(rows.detach())
        self.zeros.setdefault((name, part), []).append(zero)
        return output + zero


Reference = Callable[[Mapping[str, Tensor], Tensor, Taps], tuple[Tensor, ...]]
Hessian = Callable[[Tensor], Tensor]
"""The Fisher (..., D, D) of terms with outputs (..., D)."""


def softmax(output: Tensor) -> Tensor:
    p = output.softmax(-1)
    return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]


def bernoulli(output: Tensor) -> Tensor:
    return torch.diag_embed(output.sigmoid() * (1 - output.sigmoid()))


def gaussian(std: float) -> Hessian:
    return lambda output: torch.diag_embed(torch.full_like(output, std**-2))


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt()[..., None, :]


@dataclass
class Dense:
    """The factors of every layer and the whole Fisher of a network at one batch.

    Args:
        outputs: Tensors (N, ..., D), one for each part of the loss, whose terms have means.
        taps: What gave them.
        named: The parameters.
        hessians: Of each part.
        weights: Of each part.
    """

    outputs: Sequence[Tensor]
    taps: Taps
    named: Mapping[str, Tensor]
    hessians: Sequence[Hessian]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        zeros = [zero for uses in self.taps.zeros.values() for zero in uses]
        wanted = [*self.named.values(), *zeros]
        self.scores: list[Tensor] = []
        """Gradients (P,) by all parameters, of each root of each sample; their squares sum to F."""
        pulls: list[list[Tensor]] = []
        for output, hessian, weight in zip(self.outputs, self.hessians, self.weights, strict=True):
            root = _root(hessian(output.detach())) * (weight / output[..., 0].numel()) ** 0.5
            for scalar in torch.einsum("...d,...dk->...k", output, root).flatten():
                given = torch.autograd.grad(scalar, wanted, retain_graph=True, allow_unused=True)
                pairs = zip(wanted, given, strict=True)
                filled = [torch.zeros_like(x) if g is None else g for x, g in pairs]
                self.scores.append(torch.cat([g.flatten() for g in filled[: len(self.named)]]))
                pulls.append(filled[len(self.named) :])
        self.fisher = torch.stack(self.scores).mT @ torch.stack(self.scores)
        columns = iter(zip(*pulls, strict=True))
        self.gradients = {
            key: [torch.stack(next(columns)) for _ in uses] for key, uses in self.taps.zeros.items()
        }
        """Of every use, (scalars, N, T, out)."""

    def factors(self, key: Key, sharing: str) -> tuple[Tensor, Tensor]:
        """A and G of a layer."""
        rows, gradients = torch.cat(self.taps.rows[key], 1), torch.cat(self.gradients[key], 2)
        if sharing == "reduce":
            rows, gradients = rows.mean(1, keepdim=True), gradients.sum(2, keepdim=True)
        a, g = rows.flatten(0, -2), gradients.flatten(0, -2)
        return a.mT @ a / len(a), g.mT @ g
