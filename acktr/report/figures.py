"""The figures of a report, and what all figures share: colours, panels and axes."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import rc_context, rcdefaults, ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from acktr.report import statistics as stats
from acktr.report.curves import aligned, evenly, until
from acktr.report.references import published_curves
from acktr.report.results import PIXELS
from acktr.report.study import BOOTSTRAP_SEED, METRICS, Study
from acktr.runs.tables import WINDOW

Dash = tuple[int, tuple[float, ...]]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""One per label; more of them have them again, with other dashes."""
DASHES: tuple[Dash, ...] = ((0, (5, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)), (0, (1, 1)))
"""Of published curves."""
GREY = "#6e6e6e"
"""Of published curves."""

_KINDS = ("png", "svg")
_POINTS = 100
_TAUS = 101


@contextmanager
def own_style() -> Iterator[None]:
    """Matplotlib's defaults, whatever a matplotlibrc says (LaTeX, fonts); also as a decorator."""
    with rc_context():
        rcdefaults()
        yield


@own_style()
def curves_figure(study: Study, published: bool) -> dict[str, bytes]:
    """Learning curves by environment: mean over runs with its interval, published ones in grey.

    Returns:
        File endings to contents.
    """
    figure, axes, first_column = panels(len(study.envs), columns=3 if len(study.envs) < 7 else 4)
    dashes: dict[str, Dash] = {}
    algos = sorted({result.algo for result in study.results})
    for axis, env in zip(axes, study.envs, strict=True):
        total = max(r.total_steps for r in study.results if r.env == env)
        for curve in published_curves(env, algos) if published else ():
            name = f"{curve.algo.upper()}, {curve.source}"
            dash = dashes.setdefault(name, DASHES[len(dashes) % len(DASHES)])
            seen = until(total, curve.steps, curve.returns)  # so that the axes fit the runs
            axis.plot(*seen, color=GREY, linewidth=1.3, linestyle=dash, zorder=1)
        for label, look in looks(study.labels).items():
            _draw_curve(axis, study, env, label, look)
        step_axis(axis, env)
        axis.set_xlim(0, total)
    for axis in first_column:
        axis.set_ylabel(f"return (mean of the last {WINDOW} episodes)")
    grey = [
        Line2D([], [], color=GREY, linewidth=1.3, linestyle=dash, label=name)
        for name, dash in dashes.items()
    ]
    legend_below(figure, [*_handles(study), *grey])
    return {kind: picture(figure, kind) for kind in _KINDS}


@own_style()
def profiles_figure(study: Study, metric: str) -> dict[str, bytes]:
    """Performance profiles over scores of at least 0, and interquartile means with intervals.

    Returns:
        File endings to contents.
    """
    figure, (left, right), _ = panels(2, columns=2, height=max(4.5, 0.22 * len(study.labels)))
    scores = {label: study.scores(metric, label) for label in study.labels}
    best = max(float(np.max(of)) for by_env in scores.values() for of in by_env.values())
    taus = np.linspace(0, max(1.0, np.ceil(10 * best) / 10), _TAUS)
    for row, (label, look) in enumerate(looks(study.labels).items()):
        colour = look["color"]
        profile = study.interval(lambda of: stats.performance_profile(of, taus), scores[label])
        left.plot(taus, profile.value, linewidth=2, **look)
        left.fill_between(taus, profile.low, profile.high, color=colour, alpha=0.15, linewidth=0)
        iqm = study.interval(stats.iqm, scores[label])
        low, high = float(iqm.low), float(iqm.high)
        right.barh(row, high - low, left=low, height=0.5, color=colour, alpha=0.5)
        right.plot([float(iqm.value)] * 2, [row - 0.25, row + 0.25], color="black", linewidth=1.5)
    left.set_xlabel(f"normalised score tau ({METRICS[metric]})")
    left.set_ylabel("share of runs with a score above tau")
    left.set_ylim(0, 1)
    right.use_sticky_edges = False
    right.set_yticks(range(len(study.labels)), [plain(label) for label in study.labels])
    right.invert_yaxis()
    right.set_xlabel(f"IQM of normalised scores ({len(study.scored)} environments)")
    for axis in (left, right):
        bare(axis)
    legend_below(figure, _handles(study))
    return {kind: picture(figure, kind) for kind in _KINDS}


def looks(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and dashes of each label's line, by matplotlib's names: 35 pairs, solid ones first."""
    pairs = [{"color": colour, "linestyle": dash} for dash in ("-", *DASHES) for colour in COLOURS]
    return {label: pairs[place % len(pairs)] for place, label in enumerate(labels)}


def _handles(study: Study) -> list[Line2D]:
    return [
        Line2D([], [], linewidth=2, label=plain(label), **look)
        for label, look in looks(study.labels).items()
    ]


def _draw_curve(axis: Axes, study: Study, env: str, label: str, look: Mapping[str, Any]) -> None:
    """Over the steps at which all runs of the label have ended an episode."""
    curves = [r.curve for r in study.of(env, label) if r.curve is not None]
    if not curves:
        return
    steps, returns = aligned(curves)
    kept = evenly(len(steps), _POINTS)
    steps, returns = steps[kept], returns[:, kept]
    band = stats.curve_band(returns, resamples=study.resamples, seed=BOOTSTRAP_SEED)
    axis.plot(steps, band.value, linewidth=2, **look)
    axis.fill_between(steps, band.low, band.high, color=look["color"], alpha=0.2, linewidth=0)


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
    """One legend for all panels in as many columns as there is room for, at most 4.

    It is added below the panels, which stay as high as they were.
    """
    for columns in range(4, 0, -1):
        legend = figure.legend(
            handles=handles, loc="outside lower center", ncols=columns, frameon=False
        )
        size = legend.get_window_extent()
        if columns == 1 or size.width <= figure.bbox.width:
            figure.set_figheight(figure.get_figheight() + size.height / figure.dpi)
            return
        legend.remove()


def step_axis(axis: Axes, title: str) -> None:
    """Label a panel of returns over environment steps, which in a `Pixels/` one are the agent's."""
    axis.set_title(plain(title))
    axis.set_xlabel("agent steps" if PIXELS.search(title) else "environment steps")
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
