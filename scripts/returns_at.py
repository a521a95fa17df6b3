"""What runs returned on their way: a table by environment, label and steps.

Usage: python -m scripts.returns_at RUNS [RUNS ...] --steps N [N ...] --out DIR [--labels LABEL ...]

RUNS are run folders, folders with runs, or archives; runs may have stopped early. A cell is the
mean over the runs of a label of the mean return of the last 100 episodes at that step, with its
95 % bootstrap interval where there are at least two runs. It is empty where one of the runs has not
passed the step, or had ended no episode by then. Writes returns_at.md and returns_at.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from acktr.report.archives import unpacked
from acktr.report.curves import on_grid
from acktr.report.results import Result, find_runs, read_results
from acktr.report.statistics import Interval, interval, mean
from acktr.report.tables import as_csv, cell, markdown, ranged
from acktr.runs.folder import RunError
from scripts.common import given_once, integer, on_files, parsed, save

RESAMPLES = 2000


@dataclass(frozen=True)
class Row:
    """The runs of one label on one environment."""

    env: str
    label: str
    runs: int
    at: tuple[Interval | None, ...]
    """At each step the mean over the runs; None where not all of them have a return there."""


def returned_at(run: Result, step: int) -> float | None:
    """Mean return of the last 100 episodes at a step; None behind a run's last, or before any."""
    if run.curve is None or not run.curve.steps[0] <= step <= run.steps:
        return None
    return float(on_grid(run.curve, np.array([step])).returns[0])


def row_of(runs: Sequence[Result], steps: Sequence[int]) -> Row:
    """The row of the runs of one label on one environment."""
    at: list[Interval | None] = []
    for step in steps:
        found = [value for run in runs if (value := returned_at(run, step)) is not None]
        scores = {runs[0].env: np.array(found)}
        whole = len(found) == len(runs)
        at.append(interval(mean, scores, resamples=RESAMPLES, seed=0) if whole else None)
    return Row(runs[0].env, runs[0].label, len(runs), tuple(at))


def rows_of(runs: Sequence[Result], steps: Sequence[int], labels: Sequence[str]) -> list[Row]:
    """A row for each environment and label; the labels in the order given, or as they are found.

    Raises:
        RunError: There is no run of a label, or a step is behind the schedule of a run.
    """
    labels = labels or list(dict.fromkeys(run.label for run in runs))
    missing = [label for label in labels if label not in {run.label for run in runs}]
    if missing:
        raise RunError(f"no run of {missing[0]}; there are {sorted({r.label for r in runs})}")
    kept = [run for run in runs if run.label in labels]
    for run in kept:
        if max(steps) > run.total_steps:
            raise RunError(f"{run.folder}: {run.total_steps:,} steps; asked for {max(steps):,}")
    rows = []
    for env in sorted({run.env for run in kept}):
        for label in labels:
            mine = [run for run in kept if (run.env, run.label) == (env, label)]
            rows += [row_of(mine, steps)] if mine else []
    return rows


def table(rows: Sequence[Row], steps: Sequence[int]) -> bytes:
    """The rows as CSV, a line for each step that has a value."""
    body = []
    for row in rows:
        for step, at in zip(steps, row.at, strict=True):
            if at is not None:
                values = [round(float(x), 4) for x in (at.value, at.low, at.high)]
                body.append([row.env, row.label, row.runs, step, *values])
    return as_csv(["env", "label", "runs", "step", "mean", "mean_low", "mean_high"], body)


def words(rows: Sequence[Row], steps: Sequence[int]) -> bytes:
    """The same as Markdown."""
    head = ["environment", "label", "runs", *(f"{step:,}" for step in steps)]
    body = [
        [
            *(cell(row.env), cell(row.label), str(row.runs)),
            *("" if at is None else ranged(at, row.runs) for at in row.at),
        ]
        for row in rows
    ]
    return markdown(head, body, left=2).encode()


def work(argv: Sequence[str]) -> None:
    """Do what a command line says."""
    parser = argparse.ArgumentParser(prog="returns_at", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--steps", nargs="+", type=integer(1), required=True)
    parser.add_argument("--labels", nargs="+", default=[])
    parser.add_argument("--out", type=Path, required=True)
    asked = parsed(parser, argv)
    given_once(asked, "labels")
    steps = sorted(set(asked.steps))
    with unpacked(asked.runs) as folders:
        rows = rows_of(read_results(find_runs(folders)), steps, asked.labels)
    save(asked.out, {"returns_at.csv": table(rows, steps), "returns_at.md": words(rows, steps)})


def main(argv: Sequence[str]) -> int:
    """Run a command line; 0, or 2 on bad input."""
    return on_files("returns_at", lambda: work(argv))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
