"""Minutes of training until a score, as a user feels them: ACKTR beside PPO.

Usage: python -m scripts.time_to_score RUNS [RUNS ...] --speed FILE --out DIR

RUNS are run folders, folders with runs, or archives; what is not a run of acktr or sb3-ppo with its
own label on one of the four tasks is left out. FILE is the report of `python -m scripts.bench
--suite score`. A run's minutes are the steps until the mean of its last 100 training episodes is at
the score (Pong 18, Breakout 300, HalfCheetah 4000, Walker2d 3000), over the steps per second that
were measured; so they are of one machine and one day, whatever machine made the runs. Runs that end
below it count as infinite in the median. So that no run counts because of how it went, those that
have stopped early all do: of one below the score nobody knows whether it gets there, and a median
that depends on that is not told. Writes time_to_score.md and time_to_score.csv.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from acktr.files import read_object
from acktr.report.archives import unpacked
from acktr.report.results import Result, find_runs, read_results
from acktr.report.statistics import median_steps, steps_to_threshold
from acktr.report.tables import as_csv, markdown
from scripts.common import on_files, parsed, save

SCORES = {
    "PongNoFrameskip-v4": 18.0,
    "BreakoutNoFrameskip-v4": 300.0,
    "HalfCheetah-v5": 4000.0,
    "Walker2d-v5": 3000.0,
}
"""Returns by environment."""
LABELS = {"acktr": "ACKTR", "sb3-ppo": "PPO of stable-baselines3"}


@dataclass(frozen=True)
class Row:
    """One algorithm on one environment."""

    env: str
    label: str
    runs: int
    reached: int
    """How many runs get there."""
    stopped: int
    """How many runs have stopped early."""
    steps: float
    """Median over the runs; infinite where more than half of them never get there, NaN where it
    depends on what would have become of runs that have stopped early."""
    speed: float
    """Environment steps per second; NaN where they were not measured."""

    @property
    def minutes(self) -> float:
        """Of training."""
        return self.steps / self.speed / 60


def read_speeds(path: Path) -> dict[tuple[str, str], float]:
    """Environment steps per second by environment and label.

    Raises:
        ValueError: It is no report of the suite score.
    """
    try:
        return {
            (row["env"], row["settings"].get("peer") or row["settings"]["algo"]): (
                float(row["steps_per_second"]["median"])
            )
            for row in read_object(path)["rows"]
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no report of scripts.bench --suite score") from error


def rows_of(runs: Sequence[Result], speeds: Mapping[tuple[str, str], float]) -> list[Row]:
    """A row for each task and algorithm of which there are runs."""
    rows = []
    for env, score in SCORES.items():
        for label in LABELS:
            mine = [run for run in runs if (run.env, run.label) == (env, label)]
            if len({run.total_steps for run in mine}) > 1:
                raise ValueError(f"{env}: the runs of {label} must be of one length")
            pairs = [(r, steps_to_threshold(r.curve, score) if r.curve else None) for r in mine]
            if pairs:
                reached = sum(step is not None for _, step in pairs)
                stopped = sum(not run.finished for run in mine)
                speed = speeds.get((env, label), math.nan)
                rows.append(Row(env, label, len(mine), reached, stopped, _median(pairs), speed))
    return rows


def _median(pairs: Sequence[tuple[Result, int | None]]) -> float:
    """Of the steps of runs; NaN if it differs by when those that have stopped early get there."""
    most = median_steps([step for _, step in pairs])
    soon = [run.steps if step is None and not run.finished else step for run, step in pairs]
    return most if median_steps(soon) == most else math.nan


def table(rows: Sequence[Row]) -> bytes:
    """A row per task and algorithm as CSV; what is infinite or not known is empty."""
    head = ["env", "score", "label", "runs", "reached", "stopped"]
    head += ["steps", "steps_per_second", "minutes"]
    body = [
        [
            *(row.env, SCORES[row.env], row.label, row.runs, row.reached, row.stopped),
            *(round(x, 2) if math.isfinite(x) else None for x in (row.steps, row.speed)),
            round(row.minutes, 2) if math.isfinite(row.minutes) else None,
        ]
        for row in rows
    ]
    return as_csv(head, body)


def words(rows: Sequence[Row]) -> bytes:
    """The same as Markdown."""
    head = ["task and score", "algorithm", "runs that reach it", "steps, median", "steps/s"]
    body = []
    for row in rows:
        cells = [f"{row.env}, {SCORES[row.env]:g}", LABELS[row.label]]
        stopped = f" ({row.stopped} stopped early)" if row.stopped else ""
        cells += [f"{row.reached} of {row.runs}{stopped}"]
        unknown = "not known" if math.isnan(row.steps) else "more than the run"
        cells += [f"{row.steps:,.0f}" if math.isfinite(row.steps) else unknown]
        cells += [f"{row.speed:,.0f}" if math.isfinite(row.speed) else "not measured"]
        cells += [f"{row.minutes:.1f}" if math.isfinite(row.minutes) else ""]
        body.append(cells)
    return markdown([*head, "minutes"], body, left=2).encode()


def work(argv: Sequence[str]) -> None:
    """Do what a command line says."""
    parser = argparse.ArgumentParser(prog="time_to_score", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--speed", type=Path, required=True, help="report of scripts.bench")
    parser.add_argument("--out", type=Path, required=True)
    asked = parsed(parser, argv)
    with unpacked(asked.runs) as folders:
        runs = read_results(find_runs(folders))
    rows = rows_of(runs, read_speeds(asked.speed))
    if not rows:
        raise ValueError(f"no run of {' or '.join(LABELS)} on {', '.join(SCORES)}")
    save(asked.out, {"time_to_score.csv": table(rows), "time_to_score.md": words(rows)})


def main(argv: Sequence[str]) -> int:
    """Run a command line; 0, or 2 on bad input."""
    return on_files("time_to_score", lambda: work(argv))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
