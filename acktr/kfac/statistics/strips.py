"""Second moments of convolution patches, without most of the work that patches repeat.

Output positions p and p + 1 along an axis see nearly the same pixels, so that most blocks of the
patches' second moment are equal up to the ends of the axis. With stride s and kernel k the input is
cut into cells of s pixels, m = ceil(k / s) of which make a patch. With c_r the strip of row r of
cells (its s pixel rows by the kernel's other axes) and P output rows the block of cells i and j is

    S_ij = sum_{r = i}^{i + P - 1} c_r c_{r + j - i}^T = middle_{j - i} + (m - 1 - (j - i)) end rows

whose middle is shared by all blocks of one diagonal: m products of strips instead of the m^2 of
whole patches, and patches 1/m as wide are in memory. The sums are the same numbers in another
order; nothing is subtracted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from acktr.kfac.tensors import accumulation_type

MIN_CELLS = 2
"""Cells m per patch from which the method saves anything."""


def saves(kernel: int, stride: int, dilation: int, outputs: int) -> bool:
    """Whether :func:`patch_moments` applies to an axis and does less work than whole patches."""
    cells = -(-kernel // stride)
    return dilation == 1 and MIN_CELLS <= cells <= outputs


def cut(pixels: Tensor, kernel: int, stride: int, outputs: int) -> Tensor:
    """Strips of cells, (rows, samples and other positions, width), row r holding the r-th cells.

    Args:
        pixels: (N, H, *positions, *kernel of the other axes, C), a view.
        kernel: Kernel size k along H.
        stride: Stride s along H.
        outputs: Output positions P along H.
    """
    rows = outputs + -(-kernel // stride) - 1
    missing = rows * stride - pixels.shape[1]
    if missing > 0:
        end = pixels.new_zeros(()).expand(pixels.shape[0], missing, *pixels.shape[2:])
        pixels = torch.cat([pixels, end], dim=1)
    cells = torch.unflatten(pixels[:, : rows * stride], 1, (rows, stride))
    spots = (cells.dim() - 4) // 2
    cells = cells.movedim(1, 0).movedim(2, 2 + spots)
    kind = accumulation_type(pixels)
    strips = torch.empty(cells.shape, dtype=kind, device=pixels.device)
    return strips.copy_(cells).flatten(2 + spots).flatten(1, -2)


def patch_moments(strips: Tensor, cells: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Sums of p p^T and of p over all patches p of ``cells`` cells, (cells * width) square.

    Args:
        strips: What :func:`cut` gives, (rows, M, width).
        cells: m.
        outputs: P >= m.
    """
    width = strips.shape[-1]
    moments = strips.new_empty(cells, width, cells, width)
    for apart in range(cells):
        ends = cells - apart - 1
        far = strips[apart:]
        shared = strips[ends:outputs].flatten(0, 1).mT @ far[ends:outputs].flatten(0, 1)
        low = strips[:ends].mT @ far[:ends]
        high = strips[outputs : outputs + ends].mT @ far[outputs : outputs + ends]
        for first in range(ends + 1):
            block = shared + low[first:].sum(0) + high[:first].sum(0)
            moments[first, :, first + apart] = block
            if apart:
                moments[first + apart, :, first] = block.mT
    sums = strips.sum(1)
    total = torch.cat([sums[first : first + outputs].sum(0) for first in range(cells)])
    return moments.reshape(cells * width, -1), total
