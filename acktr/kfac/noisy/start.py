"""Curvature before the first batch: F = c I, as if it were an average that began long ago."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from acktr.kfac.blocks.kronecker import Corrected, KroneckerBlock
from acktr.kfac.blocks.registry import StatBlock
from acktr.kfac.blocks.tridiagonal import TridiagonalBlock
from acktr.kfac.statistics.averages import RunningAverage


def start(block: StatBlock, curvature: float) -> None:
    """Let the averages of a block begin at c I, with the full weight of an average.

    Kronecker factors begin at sqrt(c) I each, moments between layers at zero. In a batch's average
    S <- (1 - beta) S + beta S_new it fades as (1 - beta)^t.

    Args:
        block: The block.
        curvature: c.
    """
    if isinstance(block, TridiagonalBlock):
        for average in (*block.a_cross, *block.g_cross):
            average.load(torch.zeros_like(average.value), torch.ones_like(average.weight))
        factors = [factor for layer in block.layers for factor in (layer.a, layer.g)]
    elif isinstance(block, KroneckerBlock):
        factors = block.factors
    else:
        (moment,) = block.averages
        whole = moment.value.dim() == 2 and bool(block.factors)
        _begin(moment, curvature, matrix=whole)
        factors = []
    for factor in factors:
        _begin(factor, curvature**0.5, matrix=factor.value.dim() > 1)
    block.history.started = True


def keep_scales(blocks: Iterable[StatBlock]) -> None:
    """Give corrected eigenvalues, which a first refresh has set, the full weight as well."""
    for block in blocks:
        if isinstance(block, KroneckerBlock) and isinstance(block.inverse, Corrected):
            scales = block.inverse.scales
            scales.load(scales.mean(), torch.ones_like(scales.weight))


def _begin(average: RunningAverage, size: float, *, matrix: bool) -> None:
    value: Tensor = torch.full_like(average.value, size)
    if matrix:
        value = torch.diag_embed(value[..., 0])
    average.load(value, torch.ones_like(average.weight))
