"""Learning curves of runs, beside published ones."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from acktr.files import reason, write_atomic
from acktr.log import RunFolder
from acktr.tables import read_table

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

WINDOW = 100
"""Episodes over which returns are averaged."""

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ((0, (5, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)), (0, (1, 1)))
_GREY = "#6e6e6e"
_CSV_HEADER = ("env", "algo", "kind", "name", "step", "return")
_GRID = 300
_MAX_POINTS = 2000
_PUBLISHED = Path(__file__).with_name("published") / "acktr_paper.csv"
_SOURCES = {
    "paper": ("Wu et al. 2017", "NoFrameskip-v3", "-v1"),
    "baselines": ("OpenAI Baselines", "NoFrameskip-v4", "-v2"),
}
_ATARI = frozenset(
    {"BeamRider", "Breakout", "Enduro", "Pong", "Qbert", "Seaquest", "SpaceInvaders"}
)


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
class PublishedCurve:
    """A learning curve that somebody published."""

    env: str
    """Name of the environment without version, for example HalfCheetah."""
    algo: str
    """acktr, a2c or trpo."""
    label: str
    """Algorithm, source and the version of the environment it was measured on."""
    steps: Ints
    """Environment steps, shape (points,)."""
    returns: Floats
    """Mean returns, shape (points,)."""


@dataclass(frozen=True)
class _Line:
    """What is drawn: one line of one panel."""

    env: str
    algo: str
    kind: str
    name: str
    steps: Floats
    returns: Floats


def load_monitor(run: Path) -> Monitor:
    """Read the episodes of a run from its monitor.csv (Baselines' format).

    Without a ``step`` column the lengths are summed up instead.

    Raises:
        ValueError: if the file is missing, damaged or without episodes; one line that names it.
    """
    path = run / "monitor.csv"
    try:
        content = read_table(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {reason(error)}") from error
    if not {"r", "l", "t"} <= set(content.columns):
        raise ValueError(f"{path}: columns r, l and t are needed")
    if not content.rows:
        raise ValueError(f"{path}: no episode has ended yet")
    try:
        returns = np.array([float(row["r"]) for row in content.rows])
        lengths = np.array([int(row["l"]) for row in content.rows], dtype=np.int64)
        seconds = np.array([float(row["t"]) for row in content.rows])
        steps = np.cumsum(lengths)
        if "step" in content.columns:
            steps = np.array([int(row["step"]) for row in content.rows], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not np.isfinite(returns).all() or (np.diff(steps, prepend=0) < 0).any():
        raise ValueError(f"{path}: returns must be finite and steps must not decrease")
    return Monitor(steps, returns, lengths, seconds)


def curve(run: Path, window: int = WINDOW) -> tuple[Ints, Floats]:
    """The learning curve of a run.

    Returns:
        Steps at which at least one episode ended, increasing, and the mean return of the last
        ``window`` episodes until then (of all of them while there are fewer); shapes (points,).

    Raises:
        ValueError: as ``load_monitor``.
    """
    monitor = load_monitor(run)
    sums = np.concatenate([[0.0], np.cumsum(monitor.returns)])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - window, 0)
    means = (sums[ends] - sums[starts]) / (ends - starts)
    last = np.append(np.diff(monitor.steps) > 0, True)
    return monitor.steps[last], means[last]


def environment_name(env_id: str) -> str:
    """Name of an environment without namespace, frame skip and version: Pong, HalfCheetah."""
    name = env_id.rpartition("/")[2]
    return re.sub(r"((NoFrameskip|Deterministic)?-v\d+)$", "", name)


def published_curves(env_id: str, algos: Sequence[str] = ("acktr",)) -> list[PublishedCurve]:
    """Published curves of an environment, on whichever version of it they were measured.

    Args:
        env_id: For example HalfCheetah-v5 or PongNoFrameskip-v4.
        algos: Of acktr, a2c and trpo.
    """
    env = environment_name(env_id)
    rows = []
    lines = (line for line in _PUBLISHED.read_text("utf-8").splitlines() if line[:1] != "#")
    for row in csv.DictReader(lines):
        if row["env"] == env and row["algo"] in algos:
            rows.append(row)
    found = []
    for (algo, source), points in groupby(rows, key=lambda row: (row["algo"], row["source"])):
        of_curve = list(points)
        name, atari, mujoco = _SOURCES[source]
        measured_on = env + (atari if env in _ATARI else mujoco)
        older = "" if measured_on == env_id else ", older version"
        found.append(
            PublishedCurve(
                env=env,
                algo=algo,
                label=f"{algo.upper()}, {name} ({measured_on}{older})",
                steps=np.array([int(row["step"]) for row in of_curve], dtype=np.int64),
                returns=np.array([float(row["return"]) for row in of_curve]),
            )
        )
    return found


def plot_runs(
    runs: Sequence[Path],
    out: Path,
    *,
    published: Sequence[PublishedCurve] = (),
    title: str | None = None,
) -> Path:
    """Draw the learning curves of runs: a panel per environment, a colour per algorithm.

    Every run is a thin line; the mean over runs of an algorithm, where all of them have data, is
    bold. Published curves are dashed grey, in the panel of their environment.

    Args:
        runs: Run folders.
        out: Picture, .png or .svg. The plotted numbers go into a .csv of the same name.
        published: Curves to compare with.
        title: Title of the figure.

    Returns:
        The .csv file.

    Raises:
        ValueError: on an unknown suffix, no runs, a run without episodes, or if a file cannot be
            written or the .csv would replace something else; one line.
        RunError: if a folder is not a run's.
    """
    numbers = out.with_suffix(".csv")
    if out.suffix not in (".png", ".svg"):
        raise ValueError(f"{out}: the name of a plot must end in .png or .svg")
    if not runs:
        raise ValueError("no runs to plot")
    lines = [*_run_lines(runs)]
    envs = sorted({line.env for line in lines})
    lines += [
        _Line(env, ref.algo, "published", ref.label, ref.steps.astype(np.float64), ref.returns)
        for env in envs
        for ref in published
        if ref.env == environment_name(env)
    ]
    _refuse_other_csv(numbers)
    picture = _draw(lines, envs, out.suffix[1:], title)
    try:
        write_atomic(numbers, _as_csv(lines))
        write_atomic(out, picture)
    except OSError as error:
        raise ValueError(f"{out}: cannot write: {reason(error)}") from error
    return numbers


def _run_lines(runs: Sequence[Path]) -> Iterator[_Line]:
    """The line of every run, then the mean of every group of runs."""
    groups: dict[tuple[str, str], list[tuple[Floats, Floats]]] = {}
    for run in runs:
        config = RunFolder.open(run).read_config()
        env, algo = _text(config, "env", run), _text(config, "algo", run)
        steps, returns = curve(run)
        points = (steps.astype(np.float64), returns)
        groups.setdefault((env, algo), []).append(points)
        yield _Line(env, algo, "run", f"seed {config.get('seed', '?')!s:.20}", *_thin(*points))
    for (env, algo), curves in groups.items():
        count = "1 run" if len(curves) == 1 else f"mean of {len(curves)} runs"
        yield _Line(env, algo, "mean", f"{algo}, {count}", *_mean_curve(curves))


def _text(config: Mapping[str, object], key: str, run: Path) -> str:
    value = config.get(key)
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= 100:
        raise ValueError(f"{run / 'config.json'}: {key} must be a printable name")
    return value


def _thin(steps: Floats, returns: Floats) -> tuple[Floats, Floats]:
    """Evenly chosen points, first and last included, so that pictures stay small."""
    if len(steps) <= _MAX_POINTS:
        return steps, returns
    chosen = np.linspace(0, len(steps) - 1, _MAX_POINTS).round().astype(np.int64)
    return steps[chosen], returns[chosen]


def _mean_curve(curves: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """Mean of curves, linearly interpolated on a grid over the range that all of them cover."""
    if len(curves) == 1:
        return _thin(*curves[0])
    start = max(steps[0] for steps, _ in curves)
    end = min(steps[-1] for steps, _ in curves)
    if end < start:
        return np.empty(0), np.empty(0)
    grid = np.linspace(start, end, _GRID) if end > start else np.array([start])
    return grid, np.mean([np.interp(grid, steps, returns) for steps, returns in curves], axis=0)


def _refuse_other_csv(path: Path) -> None:
    """Replace earlier plotted numbers, but never a run's own or anybody's file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        if file.read(200).split(b"\n")[0] != ",".join(_CSV_HEADER).encode():
            raise ValueError(
                f"{path}: would be replaced by the plotted numbers; choose another name"
            )


def _as_csv(lines: Sequence[_Line]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_HEADER)
    for line in lines:
        for step, value in zip(line.steps, line.returns, strict=True):
            writer.writerow(
                [line.env, line.algo, line.kind, line.name, f"{step:.10g}", f"{value:.8g}"]
            )
    return text.getvalue().encode()


def _draw(lines: Sequence[_Line], envs: Sequence[str], kind: str, title: str | None) -> bytes:
    columns = min(len(envs), 3)
    rows = math.ceil(len(envs) / columns)
    figure = Figure(figsize=(max(6.4, 5.0 * columns), 4.5 * rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    algos = sorted({line.algo for line in lines if line.kind != "published"})
    colours = {algo: _COLOURS[i % len(_COLOURS)] for i, algo in enumerate(algos)}
    for axis, env in zip(axes, envs, strict=False):
        _draw_panel(axis, [line for line in lines if line.env == env], env, colours)
    for axis in axes[::columns]:
        axis.set_ylabel(f"return (mean of the last {WINDOW} episodes)")
    for axis in axes[len(envs) :]:
        axis.set_visible(False)
    if title is not None:
        figure.suptitle(_plain(title), fontweight="bold")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _draw_panel(axis: Axes, lines: Sequence[_Line], env: str, colours: Mapping[str, str]) -> None:
    references = 0
    for line in lines:
        x, y = line.steps, line.returns
        if line.kind == "published":
            dash = _DASHES[references % len(_DASHES)]
            references += 1
            axis.plot(x, y, color=_GREY, linewidth=1.3, linestyle=dash, label=_plain(line.name))
        elif line.kind == "run":
            axis.plot(x, y, color=colours[line.algo], linewidth=0.8, alpha=0.4)
        else:
            marker = "o" if len(x) == 1 else None
            colour = colours[line.algo]
            axis.plot(x, y, color=colour, linewidth=2.2, marker=marker, label=_plain(line.name))
    axis.set_title(_plain(env))
    axis.set_xlabel("environment steps")
    axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    # Below the panel the legend covers no curve.
    axis.legend(fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15))


def _plain(text: str) -> str:
    """Text that Matplotlib does not take for a formula."""
    return text.replace("$", r"\$")
