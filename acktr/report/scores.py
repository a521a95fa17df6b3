"""The figures of a report."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from acktr.report import statistics as stats
from acktr.report.curves import WINDOW, PublishedCurve, published_curves
from acktr.report.figures import (
    COLOURS,
    DASHES,
    GREY,
    bare,
    legend_below,
    panels,
    picture,
    plain,
    step_axis,
)
from acktr.report.study import METRICS, Study

_KINDS = ("png", "svg")
_POINTS = 100
_TAUS = 101


def curves_figure(study: Study, published: bool) -> dict[str, bytes]:
    """Learning curves by environment: mean over runs with its interval, published ones in grey.

    Returns:
        File endings to contents.
    """
    figure, axes, first_column = panels(len(study.envs), columns=3 if len(study.envs) < 7 else 4)
    colours, dashes = _colours(study), dict[tuple[str, str], int]()
    algos = sorted({result.algo for result in study.results})
    for axis, env in zip(axes, study.envs, strict=True):
        for curve in published_curves(env, algos) if published else ():
            _draw_published(axis, curve, dashes)
        for label in study.labels:
            _draw_curve(axis, study, env, label, colours[label])
        step_axis(axis, env)
        total = max(r.total_steps for r in study.results if r.env == env)
        axis.set_xlim(0, total)
    for axis in first_column:
        axis.set_ylabel(f"return (mean of the last {WINDOW} episodes)")
    handles = [Line2D([], [], color=c, linewidth=2, label=plain(x)) for x, c in colours.items()]
    for (algo, source), index in dashes.items():
        name = f"{algo.upper()}, {source}"
        dash = DASHES[index % len(DASHES)]
        handles.append(Line2D([], [], color=GREY, linewidth=1.3, linestyle=dash, label=name))
    legend_below(figure, handles)
    return {kind: picture(figure, kind) for kind in _KINDS}


def profiles_figure(study: Study, metric: str) -> dict[str, bytes]:
    """Performance profiles over scores of at least 0, and interquartile means with intervals.

    Returns:
        File endings to contents.
    """
    figure, (left, right), _ = panels(2, columns=2)
    colours = _colours(study)
    scores = {label: study.scores(metric, label) for label in study.labels}
    best = max(float(np.max(of)) for by_env in scores.values() for of in by_env.values())
    taus = np.linspace(0, max(1.0, np.ceil(10 * best) / 10), _TAUS)
    for row, (label, colour) in enumerate(colours.items()):
        profile = study.profile(metric, label, taus)
        left.plot(taus, profile.value, color=colour, linewidth=2, label=plain(label))
        left.fill_between(taus, profile.low, profile.high, color=colour, alpha=0.15, linewidth=0)
        iqm = study.interval(stats.iqm, scores[label])
        low, high = float(iqm.low), float(iqm.high)
        right.barh(row, high - low, left=low, height=0.5, color=colour, alpha=0.5)
        right.plot([float(iqm.value)] * 2, [row - 0.25, row + 0.25], color="black", linewidth=1.5)
    left.set_xlabel(f"normalised score tau ({METRICS[metric]})")
    left.set_ylabel("share of runs with a score above tau")
    left.set_ylim(0, 1)
    left.legend(fontsize="small", frameon=False)
    right.use_sticky_edges = False
    right.set_yticks(range(len(colours)), [plain(label) for label in colours])
    right.invert_yaxis()
    right.set_xlabel(f"interquartile mean of normalised scores ({len(study.scored)} environments)")
    for axis in (left, right):
        bare(axis)
    return {kind: picture(figure, kind) for kind in _KINDS}


def _colours(study: Study) -> dict[str, str]:
    return {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(study.labels)}


def _draw_curve(axis: Axes, study: Study, env: str, label: str, colour: str) -> None:
    """Over the steps at which all runs of the label have ended an episode."""
    curves = [r.curve for r in study.of(env, label) if r.curve is not None and len(r.curve.steps)]
    if not curves:
        return
    shortest = min(len(curve.steps) for curve in curves)
    steps = curves[0].steps[-shortest:]
    chosen = np.unique(np.linspace(0, shortest - 1, min(_POINTS, shortest)).round().astype(int))
    returns = np.stack([curve.returns[-shortest:][chosen] for curve in curves])
    band = stats.curve_band(returns, resamples=study.resamples, seed=study.seed)
    axis.plot(steps[chosen], band.value, color=colour, linewidth=2)
    axis.fill_between(steps[chosen], band.low, band.high, color=colour, alpha=0.2, linewidth=0)


def _draw_published(axis: Axes, curve: PublishedCurve, dashes: dict[tuple[str, str], int]) -> None:
    dash = dashes.setdefault((curve.algo, curve.source), len(dashes))
    style = DASHES[dash % len(DASHES)]
    axis.plot(curve.steps, curve.returns, color=GREY, linewidth=1.3, linestyle=style, zorder=1)
