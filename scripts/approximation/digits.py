"""Digits drawn from a small font, as a data set that needs no download."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

SIDE = 16
"""Images are SIDE x SIDE."""

_FONT = (
    ("01110", "10001", "10011", "10101", "11001", "10001", "01110"),
    ("00100", "01100", "00100", "00100", "00100", "00100", "01110"),
    ("01110", "10001", "00001", "00110", "01000", "10000", "11111"),
    ("01110", "10001", "00001", "00110", "00001", "10001", "01110"),
    ("00010", "00110", "01010", "10010", "11111", "00010", "00010"),
    ("11111", "10000", "11110", "00001", "00001", "10001", "01110"),
    ("00110", "01000", "10000", "11110", "10001", "10001", "01110"),
    ("11111", "00001", "00010", "00100", "01000", "01000", "01000"),
    ("01110", "10001", "10001", "01110", "10001", "10001", "01110"),
    ("01110", "10001", "10001", "01111", "00001", "00010", "01100"),
)


def digits(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Digits turned, slanted, scaled and moved at random, with some noise.

    Args:
        count: N.
        generator: Source of everything random.

    Returns:
        Images (N, 256) in float64 with brightness about 0 to 1, and classes (N,).
    """
    rows = [[[float(c) for c in line] for line in glyph] for glyph in _FONT]
    font = functional.pad(torch.tensor(rows, dtype=torch.float64), (2, 2, 1, 1))[:, None]
    labels = torch.randint(10, (count,), generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)

    angle, slant = uniform(-0.2, 0.2) * math.pi / 2, uniform(-0.3, 0.3)
    wide, high = uniform(0.9, 1.3), uniform(0.9, 1.3)
    left, up = uniform(-0.25, 0.25), uniform(-0.2, 0.2)
    first = torch.stack([wide * angle.cos(), -wide * (angle.sin() + slant), left], 1)
    second = torch.stack([high * angle.sin(), high * angle.cos(), up], 1)
    grid = functional.affine_grid(
        torch.stack([first, second], 1), [count, 1, SIDE, SIDE], align_corners=False
    )
    images = functional.grid_sample(font[labels], grid, align_corners=False).flatten(1)
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    return images + 0.1 * noise, labels
