"""What all figures share: colours, panels, axes of returns over steps, and reproducible files."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context, ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""One per algorithm, used again from the first when there are more."""
DASHES = ((0, (5, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)), (0, (1, 1)))
"""Of published curves."""
GREY = "#6e6e6e"
"""Of published curves."""


def panels(
    count: int, columns: int, height: float = 4.5
) -> tuple[Figure, NDArray[np.object_], NDArray[np.object_]]:
    """A figure with ``count`` panels in rows of at most ``columns``.

    Returns:
        The figure, the axes of its panels, and those of the first column.
    """
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    size = (max(6.4, 5.0 * columns), height * rows)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count], axes[::columns]


def legend_below(figure: Figure, handles: Sequence[Line2D]) -> None:
    """One legend for all panels, below them, in as many columns as there is room for, at most 4."""
    for columns in range(4, 0, -1):
        legend = figure.legend(
            handles=handles, loc="outside lower center", ncols=columns, frameon=False
        )
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def step_axis(axis: Axes, title: str) -> None:
    """Label a panel of returns over environment steps."""
    axis.set_title(plain(title))
    axis.set_xlabel("environment steps")
    axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    bare(axis)


def bare(axis: Axes) -> None:
    """A light grid, and no frame at the top and on the right."""
    axis.set_axisbelow(True)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def picture(figure: Figure, kind: str) -> bytes:
    """The file of a figure, png or svg: the same bytes for the same figure."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "acktr"}):
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def plain(text: str) -> str:
    """Text that Matplotlib does not take for a formula."""
    return text.replace("$", r"\$")
