"""Which spaces hold pictures, and how: where the channels are, and what the numbers mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from gymnasium import spaces

from acktr.envs.nested import parts

Channels = Literal["auto", "first", "last", "none"]
"""Where pictures have their channels: see :func:`picture`."""

Axis = Literal["first", "last", "absent"]

_BOARD = 8
"""Least height and width of what is taken for a picture if it is not of bytes."""
_GREY = 16
"""Least height and width of bytes without an axis of channels that are taken for a picture."""


@dataclass(frozen=True)
class Picture:
    """How a Box holds pictures; numbers x of it become ``(x - low) * scale``."""

    shape: tuple[int, int, int]
    """(C, H, W)."""
    axis: Axis
    """Where the channels are: (C, H, W), (H, W, C) or, absent, (H, W)."""
    low: float
    scale: float
    floats: bool
    """Whether its numbers are floats."""
    sure: bool
    """Whether shape or setting tell where the channels are."""


def picture(space: spaces.Space[Any], channels: Channels = "auto") -> Picture | None:
    """How a space holds pictures, None if it does not.

    Pictures are Boxes with three axes: of bytes, or of other numbers within bounds if height and
    width are at least 8. Bytes with two axes of at least 16 are grey pictures. Numbers outside of
    [-1, 1] are scaled to [0, 1] by the bounds of the space.

    Args:
        space: The space of one environment, without parts.
        channels: Where they are if there are three axes. auto: where two axes are equal it is the
            third; else the last if it is the shortest, else the first. first or last: there, in
            every Box of three axes. none: nothing is a picture.
    """
    if not isinstance(space, spaces.Box) or channels == "none" or 0 in space.shape:
        return None
    shape, kind = space.shape, np.dtype(space.dtype)
    if len(shape) not in (2, 3):
        return None
    scaling = _scaling(space)
    if kind == np.uint8 and len(shape) == 2 and min(shape) >= _GREY:
        return Picture((1, *shape), "absent", *(scaling or (0.0, 1.0)), floats=False, sure=True)
    if len(shape) != 3:
        return None
    last, sure = _order(shape)
    if channels != "auto":
        last, sure = channels == "last", True
    ordered = (shape[2], shape[0], shape[1]) if last else (shape[0], shape[1], shape[2])
    bounded = scaling is not None and min(ordered[1:]) >= _BOARD
    if channels == "auto" and kind != np.uint8 and not bounded:
        return None
    low, scale = scaling or (0.0, 1.0)
    return Picture(ordered, "last" if last else "first", low, scale, kind.kind == "f", sure)


def pictures(space: spaces.Space[Any], channels: Channels = "auto") -> dict[str, Picture]:
    """The pictures among the parts of a space, by name."""
    found = {name: picture(part, channels) for name, part in parts(space).items()}
    return {name: each for name, each in found.items() if each is not None}


def _order(shape: tuple[int, ...]) -> tuple[bool, bool]:
    """Whether the channels are the last of three axes, and whether that is certain.

    Pictures are often square and have fewer channels than rows and columns.
    """
    first, second, third = shape
    if (first == second) != (second == third):
        return first == second, True
    last = third < min(first, second)
    few, least = (third, min(first, second)) if last else (first, min(second, third))
    return last, few < least and (few <= 4 or 2 * few <= least)


def _scaling(space: spaces.Box) -> tuple[float, float] | None:
    """(low, scale) by the bounds of a Box; None if it has none."""
    low, high = float(np.min(space.low)), float(np.max(space.high))
    if low >= -1 and high <= 1:
        return 0.0, 1.0
    if not np.isfinite(high - low) or high <= low:
        return None
    return low, 1 / (high - low)
