"""Factors of the linear maps inside of attention and recurrent modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from acktr.kfac.blocks import rows
from acktr.kfac.blocks.linear import LinearLayout, Shapes, as_matrix, as_parts
from acktr.kfac.config import Sharing
from acktr.kfac.statistics.uses import Use
from acktr.kfac.tensors import accumulation_type, positions

_SQUARES = WeakIdKeyDictionary()
"""Products g g^T by gradient and number of parts, while that lives: two maps may share it."""


@dataclass(frozen=True)
class ProjectionLayout:
    """k linear maps of one input width whose weights are stacked in one; a pair of factors each."""

    linear: LinearLayout
    """The layout of one of them."""
    groups: int
    """Number of maps k."""
    apart: bool = True
    """Whether the maps have uses of their own, as ``part`` says; else each takes its part of all
    outputs."""

    @property
    def sharing(self) -> Sharing:
        """How positions share the weight."""
        return self.linear.sharing

    @property
    def shapes(self) -> Shapes:
        """([k,] in [+ 1]) and ([k,] out) square."""
        lead = () if self.groups == 1 else (self.groups,)
        a, g = self.linear.shapes
        return (*lead, *a), (*lead, *g)

    def _by_map(self, uses: Sequence[Use]) -> list[list[Use]]:
        """The uses of each map."""
        if self.groups == 1:
            return [list(uses)]
        if self.apart:
            return [[use for use in uses if use.part == place] for place in range(self.groups)]
        return [[_part(use, place, self.groups) for use in uses] for place in range(self.groups)]

    def _stacked(self, parts: Sequence[Tensor | None]) -> Tensor:
        """One tensor for all maps; zeros for a map that was not used."""
        blank = torch.zeros_like(next(part for part in parts if part is not None))
        filled = [blank if part is None else part for part in parts]
        return filled[0] if self.groups == 1 else torch.stack(filled)

    def input_factor(self, uses: Sequence[Use], diagonal: bool) -> tuple[Tensor, float]:
        """Factor A as (sum, divisor), the maps' sums scaled to one divisor; or the diagonal of it.

        Diagonals are for one map alone.
        """
        made: dict[object, tuple[Tensor, float]] = {}  # maps of one input have one factor
        maps = self._by_map(uses)
        keys = [tuple((id(use.call), id(use.weights)) for use in mine) for mine in maps]
        for key, mine in zip(keys, maps, strict=True):
            if mine and key not in made:
                made[key] = rows.input_factor(self.linear, mine, diagonal)
        divisor = max(count for _, count in made.values())
        scaled = {key: total * (divisor / (count or 1.0)) for key, (total, count) in made.items()}
        return self._stacked([scaled.get(key) for key in keys]), divisor

    def output_factor(self, uses: Sequence[Use], index: int, diagonal: bool) -> Tensor:
        """Sum over samples for factor G, or for its diagonal."""
        if len(uses) > 1 or diagonal or self.sharing == "reduce":
            return self._output_factor(uses, index, diagonal)
        gradient = uses[0].gradients[index]
        if gradient not in _SQUARES:
            _SQUARES[gradient] = {}
        made: dict[int, Tensor] = _SQUARES[gradient]
        if self.groups not in made:
            made[self.groups] = self._output_factor(uses, index, diagonal)
        return made[self.groups]

    def _output_factor(self, uses: Sequence[Use], index: int, diagonal: bool) -> Tensor:
        maps = self._by_map(uses)
        linear = self.linear
        return self._stacked(
            [linear.output_factor(m, index, diagonal) if m else None for m in maps]
        )

    def squares(
        self,
        uses: Sequence[Use],
        index: int,
        a_vectors: Tensor | None,
        g_vectors: Tensor | None,
        apart: bool,
    ) -> Tensor:
        """Sum over samples, if they are apart, of (Q_G^T (sum_t g a^T) Q_A)^2."""
        parts: list[Tensor | None] = []
        for place, mine in enumerate(self._by_map(uses)):
            a, g = (
                v if v is None or self.groups == 1 else v[place] for v in (a_vectors, g_vectors)
            )
            parts.append(rows.squares(self.linear, mine, index, a, g, apart) if mine else None)
        return self._stacked(parts)

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """([k,] out, in [+ 1])."""
        return as_matrix(weight, bias, self.groups)

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight ([k] out, in) and bias ([k] out)."""
        return as_parts(matrix, self.linear.bias, self.groups)


def _part(use: Use, place: int, groups: int) -> Use:
    """The use with one part of the outputs."""
    return replace(use, gradients=tuple(g.chunk(groups, -1)[place] for g in use.gradients))


@dataclass(frozen=True)
class ProjectionBiasRows:
    """Per-sample gradients of the biases of k maps, sum_t g, each in its part of the vector."""

    groups: int

    def rows(self, use: Use, index: int) -> Tensor:
        """Gradients (N, k out)."""
        gradients = positions(use.gradients[index])
        total = gradients.sum(1, dtype=accumulation_type(gradients))
        if self.groups == 1:
            return total
        spread = total.new_zeros(len(total), self.groups, total.shape[1])
        spread[:, use.part or 0] = total
        return spread.flatten(1)
