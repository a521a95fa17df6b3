"""Where the mean curve of one label lies beside the spread of another label's runs.

Usage: python -m scripts.band RUNS [RUNS ...] --label final --within float32 --out DIR

RUNS are run folders, folders with runs, or archives; in each environment all runs of both labels
must be finished and of one length. At equidistant steps (--points) the mean over the runs of
--label of the return (mean of the last 100 episodes) is compared with the least and the greatest
return among the runs of --within; steps at which a run has no return yet are left out. Writes
band.csv, a row per step, with the mean's distance outside them, negative below and 0 between;
prints the counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from acktr.report.archives import unpacked
from acktr.report.curves import GRID_POINTS, Curve, Floats, Ints, grid, on_grid
from acktr.report.results import Result, find_runs, read_results
from acktr.report.tables import as_csv
from acktr.runs.folder import RunError
from scripts.common import ScriptError, integer, on_files, parsed, save


@dataclass(frozen=True)
class Band:
    """A mean and a spread over the steps of one environment; all arrays have shape (points,)."""

    env: str
    steps: Ints
    mean: Floats
    """Mean return of the runs that are compared."""
    least: Floats
    """Least return of the runs they are compared with."""
    greatest: Floats
    """Greatest return of those."""

    @property
    def distance(self) -> Floats:
        """How far the mean is above the greatest or, negative, below the least; 0 between."""
        above, below = self.mean - self.greatest, self.mean - self.least
        return np.maximum(above, 0.0) + np.minimum(below, 0.0)

    def __str__(self) -> str:
        outside = self.distance
        above, below = outside[outside > 0], -outside[outside < 0]
        parts = [f"between at {len(outside) - len(above) - len(below)} of {len(outside)} points"]
        for word, found in (("above", above), ("below", below)):
            most = f", by at most {found.max():.3g}" if len(found) else ""
            parts.append(f"{word} at {len(found)}{most}")
        return f"{self.env}: {'; '.join(parts)}"


def band(runs: Sequence[Result], label: str, within: str, points: int) -> Band:
    """Compare the mean of one label with the spread of another in one environment.

    Raises:
        RunError: A label has no run, or a run is unfinished or of another length.
    """
    env = runs[0].env
    runs = [run for run in runs if run.label in (label, within)]
    for name in (label, within):
        if not any(run.label == name for run in runs):
            raise RunError(f"{env}: no run of {name}")
    curves: dict[str, list[Curve]] = {label: [], within: []}
    for run in runs:
        if not run.finished or run.curve is None:
            raise RunError(f"{run.folder}: not finished")
        if run.total_steps != runs[0].total_steps:
            raise RunError(f"{env}: the runs must be of one length")
        curves[run.label].append(run.curve)
    steps = grid(runs[0].total_steps, points)
    steps = steps[steps >= max(curve.steps[0] for curve in (*curves[label], *curves[within]))]
    ours, theirs = (
        np.stack([on_grid(curve, steps).returns for curve in curves[name]])
        for name in (label, within)
    )
    return Band(env, steps, ours.mean(axis=0), theirs.min(axis=0), theirs.max(axis=0))


def table(bands: Sequence[Band]) -> bytes:
    """A row per environment and step as CSV."""
    rows = (
        [one.env, step, *(round(value, 4) for value in values)]
        for one in bands
        for step, *values in zip(
            *(c.tolist() for c in (one.steps, one.mean, one.least, one.greatest, one.distance)),
            strict=True,
        )
    )
    return as_csv(["env", "steps", "mean", "least", "greatest", "outside"], rows)


def work(argv: Sequence[str]) -> None:
    """Do what a command line says."""
    parser = argparse.ArgumentParser(prog="band", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--label", required=True, help="label whose mean is compared")
    parser.add_argument("--within", required=True, help="label whose runs it is compared with")
    parser.add_argument("--points", type=integer(1, GRID_POINTS), default=40)
    parser.add_argument("--out", type=Path, required=True)
    asked = parsed(parser, argv)
    if asked.label == asked.within:
        raise ScriptError("--label and --within must be two labels")
    with unpacked(asked.runs) as folders:
        runs = read_results(find_runs(folders))
    compared = [
        band([run for run in runs if run.env == env], asked.label, asked.within, asked.points)
        for env in sorted({run.env for run in runs})
    ]
    save(asked.out, {"band.csv": table(compared)})
    for one in compared:
        sys.stdout.write(f"{one}\n")


def main(argv: Sequence[str]) -> int:
    """Run a command line; 0, or 2 on bad input."""
    return on_files("band", lambda: work(argv))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
