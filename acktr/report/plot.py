"""Learning curves of runs, beside published ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from acktr.config import Config
from acktr.files import blanked, reason, write_together
from acktr.report.archives import unpacked
from acktr.report.curves import Floats, curve, evenly, has_episodes, minutes, until
from acktr.report.figures import (
    DASHES,
    GREY,
    looks,
    own_style,
    panels,
    picture,
    plain,
    step_axis,
)
from acktr.report.references import published_curves
from acktr.report.results import find_runs, label_of
from acktr.report.tables import as_csv
from acktr.runs.folder import RunFolder
from acktr.runs.tables import WINDOW

_HEADERS = tuple(("env", "algo", "kind", "name", x, "return") for x in ("step", "minute"))
_GRID = 300
_MAX_POINTS = 2000


class Plotted(NamedTuple):
    """What has been drawn."""

    numbers: Path
    """The .csv file."""
    left_out: list[str]
    """Runs, as ENV/LABEL/seedN, in which no episode has ended yet, where others have some."""


@dataclass(frozen=True)
class _Line:
    """One line of one panel."""

    env: str
    algo: str
    """Label of runs, algorithm of published curves."""
    kind: str
    name: str
    steps: Floats
    returns: Floats


def plot_runs(
    runs: Sequence[Path],
    out: Path,
    *,
    published: Sequence[str] = (),
    title: str | None = None,
    x: Literal["steps", "time"] = "steps",
) -> Plotted:
    """Draw the learning curves of runs: a panel per environment, a colour per label.

    Every run is a thin line; the mean over runs of a label, where all of them have data, is bold.
    Published curves are dashed grey, in the panel of their environment, as far as the runs go.

    Args:
        runs: Run folders, folders with runs anywhere below them, or archives of runs.
        out: Picture, .png or .svg. The numbers go into a .csv of the same name, published curves
            as a whole.
        published: Algorithms whose published curves are drawn: of acktr, a2c and trpo.
        title: Title of the figure.
        x: Environment steps, or minutes of training, over which no published curves are known.

    Raises:
        ValueError: on an unknown suffix, no runs, none with an episode, or if a file cannot be
            written or the .csv would replace something else; one line.
        RunError: if there is no run in a folder.
    """
    numbers = out.with_suffix(".csv")
    if out.suffix not in (".png", ".svg"):
        raise ValueError(f"{out}: the name of a plot must end in .png or .svg")
    if not runs:
        raise ValueError("no runs to plot")
    with unpacked(runs) as folders:
        found = find_runs(folders)
        drawn = [run for run in found if has_episodes(run)] or found
        lines = [*_run_lines(drawn, x)]
    envs = sorted({line.env for line in lines})
    lines += [
        _Line(env, ref.algo, "published", ref.label, ref.steps, ref.returns)
        for env in envs
        for ref in published_curves(env, published if x == "steps" else ())
    ]
    if numbers.exists():
        with numbers.open("rb") as file:  # of earlier plots, but never a run's own or anybody's
            if file.read(200).split(b"\n")[0].decode("latin-1") not in map(",".join, _HEADERS):
                raise ValueError(
                    f"{numbers}: would be replaced by the plotted numbers; choose another name"
                )
    image = _draw(lines, envs, out.suffix[1:], title, x)
    rows = (
        [line.env, line.algo, line.kind, line.name, f"{step:.10g}", f"{value:.8g}"]
        for line in lines
        for step, value in zip(line.steps, line.returns, strict=True)
    )
    try:
        write_together({numbers: as_csv(_HEADERS[x == "time"], rows), out: image})
    except OSError as error:
        raise ValueError(f"{out}: cannot write: {reason(error)}") from error
    return Plotted(numbers, ["/".join(run.parts[-3:]) for run in found if run not in drawn])


def draw_curve(folder: RunFolder, config: Config) -> str | None:
    """Draw the learning curve of a run beside the published ones; returns why there is none."""
    try:
        plot_runs([folder.path], folder.curve, published=(config.algo,))
    except (ValueError, OSError) as error:
        return str(error)
    except Exception as error:  # the run is worth more than its picture
        return f"{type(error).__name__}: {blanked(str(error)):.200}"
    return None


def _run_lines(runs: Sequence[Path], x: Literal["steps", "time"]) -> Iterator[_Line]:
    """The line of every run, then the mean of every group of runs."""
    groups: dict[tuple[str, str], list[tuple[Floats, Floats]]] = {}
    for run in runs:
        folder = RunFolder.open(run)
        config = folder.read_config()
        env = folder.name_in(config, "env")
        algo = label_of(run, env, folder.name_in(config, "algo"))
        whole = curve(run)
        at = minutes(run, whole) if x == "time" else whole.steps.astype(np.float64)
        points = (at, whole.returns)
        groups.setdefault((env, algo), []).append(points)
        yield _Line(env, algo, "run", f"seed {config.get('seed', '?')!s:.20}", *_thin(*points))
    for (env, algo), curves in groups.items():
        count = "1 run" if len(curves) == 1 else f"mean of {len(curves)} runs"
        yield _Line(env, algo, "mean", f"{algo}, {count}", *_mean_curve(curves))


def _thin(steps: Floats, returns: Floats) -> tuple[Floats, Floats]:
    """Fewer points, so that pictures stay small."""
    kept = evenly(len(steps), _MAX_POINTS)
    return steps[kept], returns[kept]


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


@own_style()
def _draw(
    lines: Sequence[_Line], envs: Sequence[str], kind: str, title: str | None, x: str
) -> bytes:
    figure, axes, first_column = panels(len(envs), columns=3)
    algos = sorted({line.algo for line in lines if line.kind != "published"})
    by_algo = looks(algos)
    for axis, env in zip(axes, envs, strict=True):
        _draw_panel(axis, [line for line in lines if line.env == env], env, by_algo)
        if x == "time":
            axis.set_xlabel("minutes of training")
    for axis in first_column:
        axis.set_ylabel(f"return (mean of the last {WINDOW} episodes)")
    if title is not None:
        figure.suptitle(plain(title), fontweight="bold")
    return picture(figure, kind)


def _draw_panel(
    axis: Axes, lines: Sequence[_Line], env: str, by_algo: Mapping[str, Mapping[str, Any]]
) -> None:
    end = max(line.steps[-1] for line in lines if line.kind == "run")
    dashes = iter(DASHES * len(lines))
    for line in lines:
        look: dict[str, Any] = {**by_algo.get(line.algo, {}), "label": plain(line.name)}
        if line.kind == "published":
            look |= {"color": GREY, "linewidth": 1.3, "linestyle": next(dashes)}
        elif line.kind == "run":
            look |= {"label": None, "linewidth": 0.8, "alpha": 0.4}
        else:
            look |= {"linewidth": 2.2, "marker": "o" if len(line.steps) == 1 else None}
        axis.plot(*until(end, line.steps, line.returns), **look)
    step_axis(axis, env)
    # Below the panel the legend covers no curve.
    axis.legend(fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15))
