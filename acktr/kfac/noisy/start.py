"""Where averages begin: at F = c I before the first batch, and in a new eigenbasis."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from acktr.kfac.blocks.kronecker import Corrected, KroneckerBlock
from acktr.kfac.blocks.registry import StatBlock
from acktr.kfac.blocks.tridiagonal import TridiagonalBlock
from acktr.kfac.statistics.averages import RunningAverage

PRODUCTS = 100
"""Batches that the products of eigenvalues count as in a new basis."""


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


def restart_scales(blocks: Iterable[StatBlock], decay: float) -> None:
    """Let corrected eigenvalues begin anew at the products of those of the factors.

    They count as ``PRODUCTS`` batches in the average over those that follow (Bae et al. 2018 do so
    every 50 steps). Averages of a long memory that are carried from basis to basis are blurred: a
    network that trained well with the products alone did no better than with a diagonal.

    Args:
        blocks: Blocks, of which others are left alone.
        decay: Of the averages.
    """
    for block in blocks:
        if isinstance(block, KroneckerBlock) and isinstance(block.inverse, Corrected):
            scales, products = block.inverse.scales, block.inverse.basis.damped(0.0)
            weight = torch.full_like(scales.weight, min(1.0, PRODUCTS * (1 - decay)))
            scales.load(products * weight, weight)


def _begin(average: RunningAverage, size: float, *, matrix: bool) -> None:
    value: Tensor = torch.full_like(average.value, size)
    if matrix:
        value = torch.diag_embed(value[..., 0])
    average.load(value, torch.ones_like(average.weight))
