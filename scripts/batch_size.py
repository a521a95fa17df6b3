"""Speed and sample efficiency against the batch size, for ACKTR and A2C.

Usage: python -m scripts.batch_size RUNS [RUNS ...] --speed results/performance/batch.json --out DIR

RUNS are run folders, folders with runs, or archives of one environment and length, where every run
is of acktr or a2c; its batch is num_envs * num_steps of its config.json. --speed is the report of
``scripts.bench --suite batch``; --threshold RETURN adds a column with the steps to that mean return
of the last 100 episodes. Writes batch_size.png, whose curves are means over seeds, and
batch_size.csv, a row per run. Everything is read before anything is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import ticker

from acktr.config import from_dict
from acktr.files import read_object
from acktr.report.archives import unpacked
from acktr.report.curves import Curve, aligned
from acktr.report.figures import COLOURS, bare, panels, picture, step_axis
from acktr.report.results import Result, find_runs, read_results
from acktr.report.statistics import steps_to_threshold
from acktr.report.tables import as_csv
from acktr.runs.folder import RunError
from acktr.runs.tables import WINDOW
from scripts.common import finite, on_files, parsed, save

ALGOS = ("acktr", "a2c")
_NAMES = {"acktr": "ACKTR", "a2c": "A2C"}
_WIDTHS = (1.0, 1.8, 2.8)


@dataclass(frozen=True)
class Point:
    """A finished run with one batch size."""

    batch: int
    run: Result
    curve: Curve
    last100: float
    evaluation: float


def read_points(paths: Sequence[Path]) -> list[Point]:
    """The runs, ordered by algorithm and batch.

    Raises:
        RunError: A run cannot be read, is unfinished, or they are of several environments or
            lengths.
        ConfigError: A run's configuration cannot be used.
        ValueError: Another file of a run is damaged.
    """
    points = []
    for run in read_results(find_runs(paths)):
        if run.algo not in ALGOS:
            raise RunError(f"{run.folder}: a run of {run.algo}, not of {' or '.join(ALGOS)}")
        if run.final is None or run.last100 is None or run.curve is None:
            raise RunError(f"{run.folder}: not finished")
        config = from_dict(read_object(run.folder / "config.json"))
        batch = config.num_envs * config.num_steps
        points.append(Point(batch, run, run.curve, run.last100, run.final.mean))
    if len({point.run.env for point in points}) != 1:
        raise RunError("the runs must be of one environment")
    lengths = sorted({point.run.total_steps for point in points})
    if len(lengths) != 1:
        raise RunError(
            f"the runs must be of one length, not of {', '.join(map(str, lengths))} steps"
        )
    return sorted(
        points, key=lambda point: (ALGOS.index(point.run.algo), point.batch, point.run.seed)
    )


def read_speeds(path: Path) -> dict[tuple[str, int], float]:
    """Environment steps per second by algorithm and batch, of cases that are not in parts.

    Raises:
        ValueError: It is no report of the suite batch.
    """
    try:
        rows = read_object(path)["rows"]
        return {
            (row["settings"]["algo"], row["settings"]["num_envs"] * row["settings"]["num_steps"]): (
                float(row["steps_per_second"]["median"])
            )
            for row in rows
            if row["settings"]["micro_batch"] is None
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: no report of scripts.bench --suite batch") from error


def table(
    points: Sequence[Point], speeds: Mapping[tuple[str, int], float], threshold: float | None
) -> bytes:
    """A row per run as CSV; where the threshold is never reached the cell is empty."""
    head = ["algo", "batch", "seed", "steps", "last100", "evaluation", "steps_per_second"]
    if threshold is not None:
        head.append(f"steps_to_{threshold:g}")
    rows = []
    for point in points:
        run, speed = point.run, speeds.get((point.run.algo, point.batch))
        row = [run.algo, point.batch, run.seed, run.steps]
        row += [round(point.last100, 2), round(point.evaluation, 2)]
        row.append(None if speed is None else round(speed, 1))
        if threshold is not None:
            row.append(steps_to_threshold(point.curve, threshold))
        rows.append(row)
    return as_csv(head, rows)


def figure(points: Sequence[Point], speeds: Mapping[tuple[str, int], float]) -> bytes:
    """Learning curves over steps and over updates, final return and speed over the batch."""
    made, (over_steps, over_updates, final, speed), _ = panels(4, 2)
    batches = sorted({point.batch for point in points})
    for algo, colour in zip(ALGOS, COLOURS, strict=False):
        mine = [point for point in points if point.run.algo == algo]
        means = {}
        for size in sorted({point.batch for point in mine}):
            of = [point for point in mine if point.batch == size]
            means[size] = float(np.mean([point.last100 for point in of]))
            steps, returns = aligned([point.curve for point in of])
            # Dashes run together where updates are few, so that width and depth tell the sizes.
            place = batches.index(size) % len(_WIDTHS)
            look: dict[str, Any] = {"color": colour, "linewidth": _WIDTHS[place]}
            look["alpha"] = (0.45, 0.7, 1.0)[place]
            over_steps.plot(steps, returns.mean(axis=0), label=f"{_NAMES[algo]} {size}", **look)
            over_updates.plot(steps / size, returns.mean(axis=0), **look)
        final.plot([*means], [*means.values()], "-", color=colour, label=_NAMES[algo])
        ends = [point.last100 for point in mine]
        final.plot([point.batch for point in mine], ends, "o", color=colour, markersize=4)
        timed = [size for size in batches if (algo, size) in speeds]
        speed.plot(timed, [speeds[algo, size] for size in timed], "o-", color=colour)
    step_axis(over_steps, points[0].run.env)
    step_axis(over_updates, "the same over updates")
    over_updates.set_xlabel("updates")
    over_steps.set_ylabel(f"return (mean of the last {WINDOW} episodes)")
    for axis, title in ((final, "return at the end"), (speed, "environment steps per second")):
        axis.set_title(title)
        axis.set_xscale("log")
        axis.set_xticks(batches)
        axis.xaxis.set_major_formatter(ticker.ScalarFormatter())
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.set_xlabel("samples per update")
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        bare(axis)
    over_steps.legend(fontsize=8, frameon=False)
    final.legend(frameon=False)
    return picture(made, "png")


def work(argv: Sequence[str]) -> None:
    """Do what a command line says."""
    parser = argparse.ArgumentParser(prog="batch_size", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--speed", type=Path, required=True, help="report of scripts.bench")
    parser.add_argument("--threshold", type=finite, help="return to count the steps to")
    parser.add_argument("--out", type=Path, required=True)
    asked = parsed(parser, argv)
    with unpacked(asked.runs) as folders:
        points = read_points(folders)
    speeds = read_speeds(asked.speed)
    rows, image = table(points, speeds, asked.threshold), figure(points, speeds)
    save(asked.out, {"batch_size.csv": rows, "batch_size.png": image})


def main(argv: Sequence[str]) -> int:
    """Run a command line; 0, or 2 on bad input."""
    return on_files("batch_size", lambda: work(argv))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
