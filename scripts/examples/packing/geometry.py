"""Geometry of packing from above: pure functions of the heights (L, W) of what lies in a bin.

An item comes down over its cells until it meets something, so that it rests at the greatest height
beneath it: its landing. What lies under an overhang is out of reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Heights = NDArray[np.int16]
Bools = NDArray[np.bool_]
Sides = tuple[int, int, int]
"""Length, width and height of an item, along x, y and z."""


@cache
def turned(item: Sides, orientations: int) -> tuple[Sides, ...]:
    """The different sides that an item can show.

    Args:
        item: Its sides as it arrives.
        orientations: 1 as it arrives, 2 with a quarter turn about the vertical, 6 any.
    """
    order = [(0, 1, 2), (1, 0, 2), (0, 2, 1), (1, 2, 0), (2, 0, 1), (2, 1, 0)][:orientations]
    return tuple(dict.fromkeys((item[x], item[y], item[z]) for x, y, z in order))


class _Base(NamedTuple):
    """What landings need to know of an item's base in a bin; F cells of the base, P places."""

    beneath: NDArray[np.intp]
    """Numbers of the cells beneath each place (F, P)."""
    weights: NDArray[np.float32]
    """1, and for corner cells 1024 for each corner that they are, (F,)."""
    stable: Bools
    """Whether an item is stable whose carried cells have this sum of weights."""


@cache
def _base(rows: int, columns: int, length: int, width: int) -> _Base:
    cells = np.arange(rows * columns).reshape(rows, columns)
    places = cells[: rows - length + 1, : columns - width + 1]
    beneath = np.add.outer(cells[:length, :width].ravel(), places.ravel())
    weights = np.ones((length, width), np.float32)
    for x in (0, -1):
        for y in (0, -1):
            weights[x, y] += 1024  # a cell may be several corners
    base = length * width
    corners, carried = np.divmod(np.arange(4 * 1024 + base + 1), 1024)
    percent = 100 * carried
    stable = percent > 95 * base
    stable |= (percent > 80 * base) & (corners >= 3)
    stable |= (percent > 60 * base) & (corners == 4)
    return _Base(beneath, weights.ravel(), stable)


def landings(heights: Heights, length: int, width: int) -> tuple[Heights, Bools]:
    """Where an item lands for each place of its corner, and whether it is stable there.

    The rule of stability (Zhao et al., AAAI 2021): the cells that carry the item are those beneath
    it whose height is its landing. It is stable on more than 95 % of its base, on more than 80 % if
    three of its corner cells are carried, and on more than 60 % if all four are. An item of one
    cell's width has corners that share a cell: each of them counts.

    Args:
        heights: Heights (L, W).
        length: Cells of the item along x.
        width: Cells of the item along y.

    Returns:
        Landings and stability (L - length + 1, W - width + 1).
    """
    rows, columns = heights.shape
    base = _base(rows, columns, length, width)
    under = heights.take(base.beneath)
    tops = np.maximum.reduce(under)
    carried = base.weights @ (under == tops).astype(np.float32)
    shape = (rows - length + 1, columns - width + 1)
    return tops.reshape(shape), base.stable[carried.astype(np.intp)].reshape(shape)


@cache
def _intervals(cells: int) -> Bools:
    """Whether first <= last, for cells (first, last)."""
    return np.triu(np.ones((cells, cells), np.bool_))


def rectangle_tops(heights: Heights) -> Heights:
    """Greatest heights of all rectangles of cells (first x, last x, first y, last y)."""
    along_x, along_y = (_intervals(cells) for cells in heights.shape)
    tops = np.maximum.accumulate(heights * along_x[:, :, None], axis=1)
    return np.maximum.accumulate(tops[:, :, None, :] * along_y, axis=3)


def maximal_spaces(tops: Heights, ceiling: int) -> NDArray[np.int64]:
    """Empty boxes that reach from a floor up to the ceiling and cannot grow.

    The floor of a rectangle of cells is its greatest height. The box over it is maximal if one more
    row of cells on any side would raise the floor.

    Args:
        tops: :func:`rectangle_tops`.
        ceiling: Height of the bin.

    Returns:
        Rows (first x, last x, first y, last y); their floors are ``tops`` at these places.
    """
    along_x, along_y = _intervals(tops.shape[0]), _intervals(tops.shape[2])
    maximal = (tops < ceiling) & along_x[:, :, None, None] & along_y
    maximal[1:] &= tops[:-1] > tops[1:]
    maximal[:, :-1] &= tops[:, 1:] > tops[:, :-1]
    maximal[:, :, 1:] &= tops[:, :, :-1] > tops[:, :, 1:]
    maximal[..., :-1] &= tops[..., 1:] > tops[..., :-1]
    return np.stack(np.unravel_index(np.flatnonzero(maximal), tops.shape), axis=-1)


def corner_placements(
    heights: Heights, ceiling: int, ways: Sequence[Sides], stable: bool
) -> NDArray[np.int64]:
    """Placements of an item in the corners of the maximal spaces, the lowest first.

    If an item fits anywhere (by its sides alone), it fits in a corner of some space: it can be
    pushed along x and y within the space that holds it, without rising.

    Args:
        heights: Heights (L, W).
        ceiling: Height of the bin.
        ways: Sides that the item can show.
        stable: Whether to ask for stability as well (:func:`landings`).

    Returns:
        Rows (x, y, z, length, width, height), each once, in order of z, x, y.
    """
    tops = rectangle_tops(heights)
    spaces = maximal_spaces(tops, ceiling)
    found = []
    for length, width, height in ways:
        first_x, last_x, first_y, last_y = spaces.T
        fits = (last_x - first_x >= length - 1) & (last_y - first_y >= width - 1)
        first_x, last_x, first_y, last_y = spaces[fits].T
        corner = np.zeros(heights.shape, np.bool_)
        for x in (first_x, last_x - length + 1):
            for y in (first_y, last_y - width + 1):
                corner[x, y] = True
        if stable:
            good = landings(heights, length, width)[1]
            corner[: len(good), : good.shape[1]] &= good
        x, y = corner.nonzero()
        z = tops[x, x + length - 1, y, y + width - 1]
        rows = np.empty((len(x), 6), np.int64)
        rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3:] = x, y, z, (length, width, height)
        found.append(rows[z + height <= ceiling])
    placements = np.concatenate(found)
    return placements[np.lexsort(placements.T[[1, 0, 2]])]


def wasted(heights: Heights, placement: NDArray[Any]) -> int:
    """Empty cells that an item would shut in beneath it."""
    x, y, z, length, width, _ = placement.tolist()
    under = heights[x : x + length, y : y + width]
    return int(z * under.size - under.sum())
