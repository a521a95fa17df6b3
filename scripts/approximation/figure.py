"""Absolute values of matrices and inverses, side by side."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from scripts.approximation.study import Candidate, layer_means

_PIXELS = 210
_SHOWN = 0.995
"""Quantile of the exact matrix's pixels that is drawn black."""
_CORNERS = ("matrix", "inverse", "inverse, mean per layer pair")


def draw(found: Mapping[str, Candidate], sizes: Sequence[int], title: str) -> bytes:
    """A PNG with a column for every candidate: its matrix, its inverse, the inverse by layers.

    Every row has one grey scale, set by the first candidate (the exact matrices).

    Args:
        found: Candidates by name, the exact one first.
        sizes: Parameters of each layer.
        title: Title of the figure.
    """
    figure = Figure(figsize=(2.35 * len(found), 7.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, len(found), squeeze=False)
    pictures = [
        [pooled(candidate.matrix) for candidate in found.values()],
        [pooled(candidate.inverse) for candidate in found.values()],
        [_between(layer_means(candidate.inverse, sizes)) for candidate in found.values()],
    ]
    for row, (line, images) in enumerate(zip(panels, pictures, strict=True)):
        exact = images[0].flatten()
        black = float(
            exact.nan_to_num(0).quantile(_SHOWN) if row < 2 else exact.nan_to_num(0).max()
        )
        for axis, name, image in zip(line, found, images, strict=True):
            edges = list(accumulate(sizes)) if row < 2 else [i + 1 for i in range(len(sizes))]
            _panel(axis, image, black, edges)
            if row == 0:
                axis.set_title(name, fontsize=9)
        line[0].set_ylabel(_CORNERS[row], fontsize=9)
    figure.suptitle(title.replace("$", r"\$"), fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def pooled(matrix: Tensor) -> Tensor:
    """Absolute values, averaged over squares of entries where there are too many to show."""
    step = max(1, len(matrix) // _PIXELS)
    return functional.avg_pool2d(matrix.abs()[None, None], step, ceil_mode=True)[0, 0]


def _between(means: Tensor) -> Tensor:
    """Means of different layers; NaN, drawn brown, for a layer with itself."""
    return means.masked_fill(torch.eye(len(means), dtype=torch.bool), torch.nan)


def _panel(axis: Axes, image: Tensor, black: float, edges: Sequence[int]) -> None:
    end = edges[-1]
    axis.set_facecolor("#d8c9a8")
    axis.imshow(
        image.numpy(),
        cmap="gray_r",
        vmin=0,
        vmax=black or 1.0,
        extent=(0, end, end, 0),
        interpolation="nearest",
    )
    for edge in edges[:-1]:
        axis.axhline(edge, color="#0072B2", linewidth=0.4)
        axis.axvline(edge, color="#0072B2", linewidth=0.4)
    axis.set_xticks([])
    axis.set_yticks([])
