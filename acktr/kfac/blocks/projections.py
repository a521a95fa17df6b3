"""Factors of the linear maps inside of attention and recurrent modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from acktr.kfac.config import Sharing
from acktr.kfac.statistics import factors
from acktr.kfac.statistics.uses import Use

Shapes = tuple[tuple[int, ...], tuple[int, ...]]
"""Shapes of the factors A and G; a diagonal one is a vector."""


_SQUARES = WeakIdKeyDictionary()
"""Products g g^T by gradient and number of parts, while that lives: two maps may share it."""


@dataclass(frozen=True)
class ProjectionLayout:
    """k linear maps of one input width whose weights are stacked in one; a pair of factors each.

    The part of a use says which of the maps it is of. Positions that are padding count nowhere.
    """

    shape: tuple[int, int]
    """Shape of the weight, (k out, in)."""
    groups: int
    """Number of maps k."""
    bias: bool
    sharing: Sharing
    apart: bool = True
    """Whether the maps have uses of their own; else each takes its part of all outputs."""

    @property
    def shapes(self) -> Shapes:
        """([k,] in [+ 1]) and ([k,] out) square."""
        lead = () if self.groups == 1 else (self.groups,)
        width, out = self.shape[1] + self.bias, self.shape[0] // self.groups
        return (*lead, width, width), (*lead, out, out)

    def _by_map(self, uses: Sequence[Use]) -> list[list[Use]]:
        """The uses of each map."""
        if not self.apart or self.groups == 1:
            return [list(uses)] * self.groups
        return [[use for use in uses if use.part == part] for part in range(self.groups)]

    def _stacked(self, parts: Sequence[Tensor | None]) -> Tensor:
        """One tensor for all maps; zeros for a map that was not used."""
        blank = torch.zeros_like(next(part for part in parts if part is not None))
        filled = [blank if part is None else part for part in parts]
        return filled[0] if self.groups == 1 else torch.stack(filled)

    def input_factor(self, uses: Sequence[Use], diagonal: bool) -> tuple[Tensor, int]:
        """Factor A as (sum, divisor), the maps' sums scaled to one divisor; or the diagonal of it.

        Diagonals are for one map alone.
        """
        made: dict[tuple[int, ...], tuple[Tensor, int]] = {}  # maps of one input have one factor
        keys = [tuple(id(use.call) for use in mine) for mine in self._by_map(uses)]
        for key, mine in zip(keys, self._by_map(uses), strict=True):
            if mine and key not in made:
                made[key] = factors.linear_input_factor(
                    [_inputs(mine, self.sharing)], self.bias, self.sharing, diagonal
                )
        divisor = max(count for _, count in made.values())
        scaled = {key: total * (divisor / count) for key, (total, count) in made.items()}
        return self._stacked([scaled.get(key) for key in keys]), divisor

    def output_factor(self, uses: Sequence[Use], index: int, diagonal: bool) -> Tensor:
        """Sum over samples for factor G, or for its diagonal."""
        if not self.apart:
            return self._square([use.gradients[index] for use in uses], diagonal, self.groups)
        parts: list[Tensor | None] = []
        for mine in self._by_map(uses):
            gradients = [use.gradients[index] for use in mine]
            parts.append(self._square(gradients, diagonal) if gradients else None)
        return self._stacked(parts)

    def _square(self, gradients: list[Tensor], diagonal: bool, groups: int = 1) -> Tensor:
        if not diagonal and len(gradients) == 1 and self.sharing == "expand":
            if gradients[0] not in _SQUARES:
                _SQUARES[gradients[0]] = {}
            made: dict[int, Tensor] = _SQUARES[gradients[0]]
            if groups not in made:
                made[groups] = factors.output_factor(gradients, -1, "expand", groups)
            return made[groups]
        rows = [factors.positions(gradient) for gradient in gradients]
        if self.sharing == "expand":
            rows = [part.flatten(0, 1)[:, None] for part in rows]
        joined = torch.cat(rows, 1 if self.sharing == "reduce" else 0)
        return factors.output_factor([joined], -1, self.sharing, groups, diagonal)

    def squares(
        self, uses: Sequence[Use], index: int, a_vectors: Tensor | None, g_vectors: Tensor | None
    ) -> Tensor:
        """Sum over samples of (Q_G^T (sum_t g a^T) Q_A)^2, ([k,] out, in [+ 1])."""
        parts: list[Tensor | None] = []
        for place, mine in enumerate(self._by_map(uses)):
            if not mine:
                parts.append(None)
                continue
            inputs = torch.cat([factors.positions(use.input) for use in mine], 1)
            inputs = inputs.to(factors.accumulation_type(inputs))
            inputs = factors.append_one(inputs) if self.bias else inputs
            rows = torch.cat([factors.positions(use.gradients[index]) for use in mine], 1)
            rows = rows.to(inputs.dtype)
            rows = rows if self.apart else rows.chunk(self.groups, -1)[place]
            if a_vectors is not None:
                inputs = inputs @ (a_vectors if self.groups == 1 else a_vectors[place])
            if g_vectors is not None:
                rows = rows @ (g_vectors if self.groups == 1 else g_vectors[place])
            parts.append(factors.squared_gradients(inputs, rows))
        return self._stacked(parts)

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """([k,] out, in [+ 1])."""
        flat = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
        return flat if self.groups == 1 else flat.reshape(self.groups, -1, flat.shape[1])

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight (k out, in) and bias (k out)."""
        flat = matrix if self.groups == 1 else matrix.flatten(0, 1)
        return (flat[:, :-1], flat[:, -1].contiguous()) if self.bias else (flat, None)


def _inputs(uses: Sequence[Use], sharing: Sharing) -> Tensor:
    """The inputs of uses as rows (M, 1, in) without padding, or (N, T, in) to be averaged over T.

    Where some are padding, the average over the others is taken here, (N, 1, in).
    """
    rows = [factors.positions(use.input) for use in uses]
    given = [use.call.kwargs.get("valid") for use in uses]
    if all(mask is None for mask in given):
        return (
            torch.cat(rows, 1)
            if sharing == "reduce"
            else torch.cat([r.flatten(0, 1) for r in rows])[:, None]
        )
    masks = [
        torch.ones_like(r[..., 0], dtype=torch.bool) if mask is None else mask.reshape(r.shape[:2])
        for r, mask in zip(rows, given, strict=True)
    ]
    if sharing == "expand":
        return torch.cat([r[mask] for r, mask in zip(rows, masks, strict=True)])[:, None]
    wide, mask = torch.cat(rows, 1), torch.cat(masks, 1)[..., None]
    wide = wide.to(factors.accumulation_type(wide))
    return (wide * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)


@dataclass(frozen=True)
class ProjectionBiasRows:
    """Per-sample gradients of the biases of k maps, sum_t g, each in its part of the vector."""

    groups: int

    def rows(self, use: Use, index: int) -> Tensor:
        """Gradients (N, k out)."""
        rows = factors.positions(use.gradients[index])
        total = rows.sum(1, dtype=factors.accumulation_type(rows))
        if self.groups == 1:
            return total
        spread = total.new_zeros(len(total), self.groups, total.shape[1])
        spread[:, use.part or 0] = total
        return spread.flatten(1)
