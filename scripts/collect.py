"""Copy the small files of runs into a results folder and write a table and figures.

Usage: python -m scripts.collect RUN [RUN ...] --out results/FOLDER

Everything is read before anything is written, and files are replaced as a whole.

With --compact RUNs may be folders of runs; they are copied to OUT/ENV/LABEL/seedN, small enough to
be kept by the hundred, and ``acktr report`` makes the tables and figures: the same from the copies
as from the runs. Of a run with more than 1,000 episodes monitor.csv keeps the last 100, and
moving_mean.csv has its learning curve at 1,000 equidistant steps; progress.csv keeps 25 rows.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from acktr.files import read_limited, reason, safe_name, write_atomic
from acktr.report.curves import (
    MOVING_MEAN,
    WINDOW,
    Curve,
    load_monitor,
    moving_mean_csv,
    published_curves,
)
from acktr.report.plot import plot_runs
from acktr.report.results import Result, find_runs, read_results
from acktr.runs.folder import RunError
from acktr.runs.tables import SIZE_CAP, read_table
from scripts.arguments import parsed

MAX_PROGRESS_ROWS = 400
COMPACT_PROGRESS_ROWS = 25
COMPACT_EPISODES = 1000
COPIED = ("config.json", "versions.json", "monitor.csv", "eval.csv")
COMPACT_COPIED = ("config.json", "versions.json", "protocol.json", "eval.csv")
NAMES = (*COMPACT_COPIED, "monitor.csv", MOVING_MEAN, "progress.csv", "command.txt")

Copies = dict[Path, dict[str, bytes]]
"""By the folder of a copy, its files."""


def thinned(path: Path, most: int) -> bytes:
    """A CSV with at most ``most`` of its rows, first and last included."""
    content = read_table(path)
    rows = content.rows
    if len(rows) > most:
        keep = np.unique(np.linspace(0, len(rows) - 1, most).round().astype(int))
        rows = [rows[i] for i in keep]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([content.columns, *(row.values() for row in rows)])
    return text.getvalue().encode()


def small_files(run: Path, names: Sequence[str], progress_rows: int) -> dict[str, bytes]:
    """Whole files, a thinned progress.csv and the command without its paths, if they are there."""
    found = {name: read_limited(run / name, SIZE_CAP) for name in names if (run / name).exists()}
    if (run / "progress.csv").exists():
        found["progress.csv"] = thinned(run / "progress.csv", progress_rows)
    if (run / "command.txt").exists():
        command = read_limited(run / "command.txt", SIZE_CAP).decode("utf-8", "replace")
        shown = re.sub(r" --(run-dir|resume)[ =]\S+", r" --\1 ...", command)
        found["command.txt"] = shown.encode()
    return found


def compact_files(result: Result) -> dict[str, bytes]:
    """What a report needs of a run, so that a report of the copy is that of the run."""
    run = result.folder
    found = small_files(run, COMPACT_COPIED, COMPACT_PROGRESS_ROWS)
    if result.curve is None:  # no episode has ended yet
        return found
    if len(load_monitor(run).steps) <= COMPACT_EPISODES and not (run / MOVING_MEAN).exists():
        found["monitor.csv"] = read_limited(run / "monitor.csv", SIZE_CAP)
    else:
        found[MOVING_MEAN] = moving_mean_csv(known(result.curve, result))
        found["monitor.csv"] = last_episodes(run, result.env)
    return found


def known(curve: Curve, result: Result) -> Curve:
    """The curve of an unfinished run only as far as the run has got."""
    there = slice(None) if result.finished else curve.steps <= result.steps
    return replace(
        curve,
        steps=curve.steps[there],
        episodes=curve.episodes[there],
        returns=curve.returns[there],
    )


def last_episodes(run: Path, env: str) -> bytes:
    """The last 100 rows of monitor.csv, with a comment that says so."""
    monitor = load_monitor(run)
    text = io.StringIO()
    kept = f"last {WINDOW} episodes; the learning curve is in {MOVING_MEAN}"
    text.write("#" + json.dumps({"env_id": env, "kept": kept}) + "\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["r", "l", "t", "step"])
    columns = (monitor.returns, monitor.lengths, monitor.seconds, monitor.steps)
    writer.writerows(zip(*(column[-WINDOW:].tolist() for column in columns), strict=True))
    return text.getvalue().encode()


def add(copies: Copies, target: Path, run: Path, files: dict[str, bytes]) -> None:
    """Take note of a copy to make.

    Raises:
        ValueError: The folder is that of another copy, or a run itself.
    """
    if target in copies:
        raise ValueError(f"{run}: another run goes to {target} too; collect them apart")
    if target.exists() and (target.samefile(run) or (target / "checkpoints").exists()):
        raise ValueError(f"{target}: is a run, not a copy of one; choose another --out")
    copies[target] = files


def write(copies: Copies) -> int:
    """Write all copies, remove what an older copy had besides; returns the bytes."""
    for target, files in copies.items():
        target.mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            if name in files:
                write_atomic(target / name, files[name])
            else:
                (target / name).unlink(missing_ok=True)
    return sum(len(data) for files in copies.values() for data in files.values())


def table(results: Sequence[Result]) -> str:
    """Markdown table of the runs.

    Raises:
        ValueError: A run has no episodes.
    """
    head = "| env | seed | steps | last 100 training episodes | final evaluation | minutes |"
    lines = [head, "|---|---:|---:|---:|---:|---:|"]
    for run in results:
        if run.last100 is None or run.minutes is None:
            raise ValueError(f"{run.folder}: no episode has ended yet")
        evaluation = "unfinished" if run.final is None else f"{run.final.mean:.1f}"
        lines.append(
            f"| {run.env} | {run.seed} | {run.steps:,} | {run.last100:.1f}"
            f" | {evaluation} | {run.minutes:.1f} |"
        )
    return "\n".join(lines) + "\n"


def collect(runs: Sequence[Path], out: Path) -> str:
    """Copy the runs to OUT/ENV/seedN; returns the table of them, which is in OUT too."""
    missing = [run for run in runs if not (run / "config.json").is_file()]
    if missing:
        raise ValueError(f"not a run folder: {missing[0]}")
    results = read_results(runs)
    text = table(results)
    copies: Copies = {}
    figures: dict[str, list[Path]] = {}
    for result in results:
        target = out / safe_name(result.env) / f"seed{result.seed}"
        add(copies, target, result.folder, small_files(result.folder, COPIED, MAX_PROGRESS_ROWS))
        figures.setdefault(result.env, []).append(target)
    write(copies)
    for env, folders in figures.items():
        plot_runs(folders, out / f"{safe_name(env)}.png", published=published_curves(env))
    write_atomic(out / "table.md", text.encode())
    return text


def collect_compact(paths: Sequence[Path], out: Path) -> str:
    """Copy all runs below the paths to OUT/ENV/LABEL/seedN; returns a line that sums it up."""
    results = read_results(find_runs(paths))
    copies: Copies = {}
    for result in results:
        target = out / safe_name(result.env) / result.label / f"seed{result.seed}"
        add(copies, target, result.folder, compact_files(result))
    size = write(copies)
    return f"{out}: {len(results)} runs, {size / 1e6:.2f} MB\n"


def main(argv: Sequence[str]) -> int:
    """Collect the runs named on the command line; 2 with one line if that cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument(
        "--compact", action="store_true", help="copy to OUT/ENV/LABEL/seedN for acktr report"
    )
    try:
        options = parsed(parser, argv)
        make = collect_compact if options.compact else collect
        sys.stdout.write(make(options.runs, options.out))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"collect: error: {where}{reason(error)}\n")
        return 2
    except (RunError, ValueError) as error:
        sys.stderr.write(f"collect: error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
