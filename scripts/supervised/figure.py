"""Training loss against updates and against seconds."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scripts.supervised.runs import Row
from scripts.supervised.settings import OPTIMIZERS

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = dict(zip(OPTIMIZERS, ("#0072B2", "#009E73", "#D55E00", "#CC79A7"), strict=True))


def draw(
    runs: Mapping[tuple[str, int], Sequence[Row]],
    labels: Mapping[str, str],
    threshold: float | None,
    title: str,
) -> bytes:
    """A PNG with a line per run, a colour per optimizer.

    Args:
        runs: Evaluations by optimizer and seed; those that are not finite are left out.
        labels: Legend by optimizer.
        threshold: Training loss to mark, if any.
        title: Title of the figure.
    """
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axis, field, name in zip(
        panels, ("update", "seconds"), ("updates", "seconds of training"), strict=True
    ):
        _draw_panel(axis, runs, labels, field)
        if threshold is not None:
            axis.axhline(threshold, color="#6e6e6e", linewidth=1, linestyle="--")
        axis.set_xlabel(name)
    panels[0].set_ylabel("training loss")
    panels[0].legend(frameon=False)
    figure.suptitle(title.replace("$", r"\$"), fontweight="bold")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_panel(
    axis: Axes,
    runs: Mapping[tuple[str, int], Sequence[Row]],
    labels: Mapping[str, str],
    field: str,
) -> None:
    shown: set[str] = set()
    for (name, _), rows in runs.items():
        x = np.array([getattr(row, field) for row in rows], dtype=np.float64)
        y = np.array([row.train_loss for row in rows])
        label = None if name in shown else labels[name]
        shown.add(name)
        good = np.isfinite(y)
        marker = "." if good.sum() <= 30 else None
        axis.plot(
            x[good],
            y[good],
            color=_COLOURS[name],
            linewidth=1.3,
            alpha=0.8,
            label=label,
            marker=marker,
        )
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(ticker.LogFormatter(minor_thresholds=(2, 0.4)))
    axis.yaxis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(2, 0.4)))
    axis.grid(alpha=0.25, which="both")
    axis.spines[["top", "right"]].set_visible(False)
