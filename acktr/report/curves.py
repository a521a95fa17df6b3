"""Episodes and learning curves of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from acktr.files import reason
from acktr.runs.tables import WINDOW, Content, read_table

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Number = TypeVar("Number", np.float64, np.int64)

GRID_POINTS = 1000
"""Points of ``grid``."""
MOVING_MEAN = "moving_mean.csv"
"""File of a thinned copy of a run with its learning curve on the grid."""

_DECIMALS = 4


@dataclass(frozen=True)
class Monitor:
    """The episodes of a run, in the order they ended; all arrays have shape (episodes,)."""

    steps: Ints
    """Environment steps of the run at the end of the update in which the episode ended."""
    returns: Floats
    """Sums of rewards."""
    lengths: Ints
    """Steps of the episodes."""
    seconds: Floats
    """Wall-clock seconds since the run began."""


@dataclass(frozen=True)
class Curve:
    """A learning curve; all arrays have shape (points,)."""

    steps: Ints
    """Environment steps, increasing."""
    episodes: Ints
    """Episodes over which the return is the mean, at most the window."""
    returns: Floats
    """Mean return of the last episodes until then."""


def load_monitor(run: Path) -> Monitor:
    """Read the episodes of a run, of which there may be none, from its monitor.csv.

    The format is Baselines'. Without a ``step`` column the lengths are summed up instead. Of a
    thinned copy only the last episodes are there; ``curve`` reads the rest.

    Raises:
        ValueError: if the file is missing or damaged; one line that names it.
    """
    path = run / "monitor.csv"
    content = read_columns(path, "r", "l", "t")
    returns, seconds = (_numbers(path, content, name, np.float64) for name in "rt")
    lengths = _numbers(path, content, "l", np.int64)
    steps = np.cumsum(lengths)
    if "step" in content.columns:
        steps = _numbers(path, content, "step", np.int64)
    if not (np.isfinite(returns).all() and np.isfinite(seconds).all()):
        raise ValueError(f"{path}: r and t must be finite")
    if (np.diff(steps, prepend=0) < 0).any():
        raise ValueError(f"{path}: step must not decrease")
    return Monitor(steps, returns, lengths, seconds)


def has_episodes(run: Path) -> bool:
    """Whether an episode of a run has ended, as far as its files say."""
    stored, path = run / MOVING_MEAN, run / "monitor.csv"
    if stored.exists() or not path.exists():
        return stored.exists()
    with path.open("rb") as file:
        return len(file.read(4096).splitlines()) > 2


def curve(run: Path, monitor: Monitor | None = None) -> Curve:
    """The learning curve of a run: of a thinned copy the stored one, else from its episodes.

    ``monitor`` holds those if they have been read already.

    Raises:
        ValueError: as ``load_monitor``, and if there are no episodes.
    """
    if (run / MOVING_MEAN).exists():
        return _load_moving_mean(run / MOVING_MEAN)
    if monitor is None and not (run / "monitor.csv").exists():
        raise ValueError(f"{run / 'monitor.csv'}: no episode has ended yet")
    monitor = load_monitor(run) if monitor is None else monitor
    if not len(monitor.steps):
        raise ValueError(f"{run / 'monitor.csv'}: no episode has ended yet")
    return moving_mean(monitor)


def minutes(run: Path, found: Curve) -> Floats:
    """Minutes of training (points,) at the points of a run's whole learning curve.

    Raises:
        ValueError: They are not known, as of a thinned copy; one line.
    """
    monitor = load_monitor(run)
    last = np.append(np.diff(monitor.steps) > 0, True)[: len(monitor.steps)]
    if not np.array_equal(monitor.steps[last], found.steps):
        raise ValueError(f"{run}: a thinned copy, of which the times are not known")
    return np.asarray(monitor.seconds[last] / 60, np.float64)


def moving_mean(monitor: Monitor, window: int = WINDOW) -> Curve:
    """Mean return of the last ``window`` episodes, of all of them while there are fewer.

    Its steps are those at which at least one episode ended.
    """
    sums = np.concatenate([[0.0], np.cumsum(monitor.returns)])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - window, 0)
    means = (sums[ends] - sums[starts]) / (ends - starts)
    last = np.append(np.diff(monitor.steps) > 0, True)
    return Curve(monitor.steps[last], (ends - starts)[last], means[last])


def grid(total_steps: int, points: int = GRID_POINTS) -> Ints:
    """At most ``points`` equidistant steps at which curves of runs of equal length are compared."""
    points = min(total_steps, points)
    return np.array([-(-total_steps * k // points) for k in range(1, points + 1)], dtype=np.int64)


def on_grid(found: Curve, steps: Ints) -> Curve:
    """A curve at given steps: what its latest point was then, rounded to 1e-4.

    Steps before the first point are left out; one that lies behind all of them, as the last update
    of a run may, counts at the last. A curve that is on the grid already stays as it is.
    """
    kept = steps[steps >= min(found.steps[0], steps[-1])]
    at = np.maximum(np.searchsorted(found.steps, kept, side="right") - 1, 0)
    return Curve(kept, found.episodes[at], found.returns[at].round(_DECIMALS))


def aligned(curves: Sequence[Curve]) -> tuple[Ints, Floats]:
    """The steps at which all runs have a return, shape (points,), and returns (runs, points).

    The curves are on one grid, so that they have the same points but at the start.
    """
    shortest = min(len(curve.steps) for curve in curves)
    return curves[0].steps[-shortest:], np.stack([c.returns[-shortest:] for c in curves])


def evenly(count: int, most: int) -> Ints:
    """Indices of at most ``most`` of ``count`` points, evenly spaced, first and last included."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def until(end: float, steps: Floats, returns: Floats) -> tuple[Floats, Floats]:
    """The part of a curve up to step ``end``, where it is interpolated."""
    if not len(steps) or end >= steps[-1]:
        return steps, returns
    part = np.append(steps[steps < end], end)
    part = part[part >= steps[0]]
    return part, np.interp(part, steps, returns)


def _load_moving_mean(path: Path) -> Curve:
    content = read_columns(path, "step", "episodes", "return")
    steps, episodes = (_numbers(path, content, name, np.int64) for name in ("step", "episodes"))
    returns = _numbers(path, content, "return", np.float64)
    if not len(steps) or not np.isfinite(returns).all() or (np.diff(steps, prepend=0) <= 0).any():
        raise ValueError(f"{path}: needs points, finite returns and increasing steps")
    return Curve(steps, episodes, returns)


def read_columns(path: Path, *needed: str) -> Content:
    """A CSV file that has the columns.

    Raises:
        ValueError: if it cannot be read or is not such a file; one line that names it.
    """
    try:
        content = read_table(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {reason(error)}") from error
    if not {*needed} <= {*content.columns}:
        raise ValueError(f"{path}: columns {', '.join(needed)} are needed")
    return content


def _numbers(path: Path, content: Content, column: str, dtype: type[Number]) -> NDArray[Number]:
    kind = int if dtype is np.int64 else float
    try:
        return np.array([kind(row[column]) for row in content.rows], dtype=dtype)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error
