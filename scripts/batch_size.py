"""Speed and sample efficiency against the batch size, for ACKTR and A2C.

Usage: python scripts/batch_size.py RUNS [RUNS ...] --speed results/performance/batch.json --out DIR

RUNS are run folders, or folders with runs, of one environment, where every run is of acktr or a2c;
its batch is num_envs * num_steps of its config.json. --speed is the report of ``bench.py --suite
batch``. Writes batch_size.png and batch_size.csv. Everything is read before anything is written.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arguments import parsed
from matplotlib import ticker

from acktr.config import ConfigError, from_dict
from acktr.figures import COLOURS, bare, panels, picture, step_axis
from acktr.files import read_object, reason, write_atomic
from acktr.log import RunError
from acktr.results import Result, find_runs, read_results

ALGOS = ("acktr", "a2c")
_NAMES = {"acktr": "ACKTR", "a2c": "A2C"}
_MARKS = (":", "--", "-")


@dataclass(frozen=True)
class Point:
    """A run of one algorithm with one batch size."""

    algo: str
    batch: int
    run: Result


def read_points(paths: Sequence[Path]) -> list[Point]:
    """The runs, ordered by algorithm and batch.

    Raises:
        RunError: A run cannot be read, is unfinished, or they are of several environments.
    """
    points = []
    for run in read_results(find_runs(paths)):
        if run.algo not in ALGOS:
            raise RunError(f"{run.folder}: a run of {run.algo}, not of {' or '.join(ALGOS)}")
        if not run.finished:
            raise RunError(f"{run.folder}: not finished")
        config = from_dict(read_object(run.folder / "config.json"))
        points.append(Point(config.algo, config.num_envs * config.num_steps, run))
    if len({point.run.env for point in points}) != 1:
        raise RunError("the runs must be of one environment")
    return sorted(points, key=lambda point: (ALGOS.index(point.algo), point.batch, point.run.seed))


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
        raise ValueError(f"{path}: no report of bench.py --suite batch") from error


def table(points: Sequence[Point], speeds: Mapping[tuple[str, int], float]) -> bytes:
    """A row per run as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("algo", "batch", "seed", "steps", "last100", "evaluation", "steps_per_second"))
    for point in points:
        run = point.run
        assert run.last100 is not None and run.final is not None
        speed = speeds.get((point.algo, point.batch))
        row: tuple[Any, ...] = (point.algo, point.batch, run.seed, run.steps)
        row += (round(run.last100, 2), round(run.final.mean, 2))
        writer.writerow((*row, "" if speed is None else round(speed, 1)))
    return text.getvalue().encode()


def figure(points: Sequence[Point], speeds: Mapping[tuple[str, int], float]) -> bytes:
    """Learning curves over steps and over updates, final return and speed over the batch."""
    made, (over_steps, over_updates, final, speed), _ = panels(4, 2)
    batches = sorted({point.batch for point in points})
    for algo, colour in zip(ALGOS, COLOURS, strict=False):
        mine = [point for point in points if point.algo == algo]
        for point in mine:
            curve = point.run.curve
            assert curve is not None
            look: dict[str, Any] = {"color": colour, "linewidth": 1.5}
            look["linestyle"] = _MARKS[batches.index(point.batch) % len(_MARKS)]
            label = f"{_NAMES[algo]} {point.batch}"
            over_steps.plot(curve.steps, curve.returns, label=label, **look)
            over_updates.plot(curve.steps / point.batch, curve.returns, **look)
        sizes = sorted({point.batch for point in mine})
        means = [_mean([point.run.last100 for point in mine if point.batch == b]) for b in sizes]
        final.plot(sizes, means, "o-", color=colour, label=_NAMES[algo])
        timed = [size for size in batches if (algo, size) in speeds]
        speed.plot(timed, [speeds[algo, size] for size in timed], "o-", color=colour)
    step_axis(over_steps, points[0].run.env)
    step_axis(over_updates, "the same over updates")
    over_updates.set_xlabel("updates")
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


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


def main(argv: Sequence[str]) -> int:
    """Run a command line; 0, or 2 on bad input."""
    parser = argparse.ArgumentParser(prog="batch_size", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--speed", type=Path, required=True, help="report of bench.py")
    parser.add_argument("--out", type=Path, required=True)
    try:
        asked = parsed(parser, argv)
        points, speeds = read_points(asked.runs), read_speeds(asked.speed)
        files = {"batch_size.csv": table(points, speeds), "batch_size.png": figure(points, speeds)}
        asked.out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomic(asked.out / name, content)
    except (RunError, ConfigError, ValueError) as error:
        sys.stderr.write(f"batch_size: error: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"batch_size: error: cannot write: {reason(error)}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
