"""Copy the small files of runs into a results folder and write a table and figures.

Usage: python scripts/collect.py RUN [RUN ...] --out results/FOLDER

With --compact RUNs may be folders of runs; they are copied to OUT/ENV/LABEL/seedN, small enough to
be kept by the hundred, and ``acktr report`` makes the tables and figures: the same from the copies
as from the runs. Of a run with more than 1,000 episodes monitor.csv keeps the last 100, and
moving_mean.csv has its learning curve at 1,000 equidistant steps; progress.csv keeps 100 rows.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from acktr.curves import (
    MOVING_MEAN,
    WINDOW,
    Curve,
    load_monitor,
    moving_mean_csv,
    published_curves,
)
from acktr.files import safe_name, write_atomic
from acktr.log import RunError
from acktr.plot import plot_runs
from acktr.results import Result, find_runs, read_results

MAX_PROGRESS_ROWS = 400
COMPACT_PROGRESS_ROWS = 100
COMPACT_EPISODES = 1000
COPIED = ("config.json", "versions.json", "monitor.csv", "eval.csv")
COMPACT_COPIED = ("config.json", "versions.json", "protocol.json", "eval.csv")


def thin(source: Path, target: Path, most: int = MAX_PROGRESS_ROWS) -> None:
    """Copy a CSV with at most ``most`` rows, first and last included."""
    with source.open(newline="") as handle:
        header, *rows = list(csv.reader(handle))
    if len(rows) > most:
        keep = np.unique(np.linspace(0, len(rows) - 1, most).round().astype(int))
        rows = [rows[i] for i in keep]
    with target.open("w", newline="") as handle:
        csv.writer(handle).writerows([header, *rows])


def copy_run(run: Path, out: Path) -> Path:
    """Copy one run's files to OUT/ENV/seedN."""
    target = out / run.parent.parent.name / run.name
    copy_files(run, target, COPIED, MAX_PROGRESS_ROWS)
    return target


def copy_files(run: Path, target: Path, names: tuple[str, ...], progress_rows: int) -> None:
    """Copy whole files, a thinned progress.csv and the command without its paths."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (run / name).exists():
            shutil.copyfile(run / name, target / name)
    if (run / "progress.csv").exists():
        thin(run / "progress.csv", target / "progress.csv", progress_rows)
    if (run / "command.txt").exists():
        command = (run / "command.txt").read_text()
        shown = re.sub(r" --(run-dir|resume)[ =]\S+", r" --\1 ...", command)
        (target / "command.txt").write_text(shown)


def copy_compact(result: Result, out: Path) -> Path:
    """Copy one run to OUT/ENV/LABEL/seedN so that a report of the copy is that of the run."""
    run = result.folder
    target = out / safe_name(result.env) / result.label / f"seed{result.seed}"
    copy_files(run, target, COMPACT_COPIED, COMPACT_PROGRESS_ROWS)
    if result.curve is None:  # no episode has ended yet
        return target
    whole = len(load_monitor(run).steps) <= COMPACT_EPISODES and not (run / MOVING_MEAN).exists()
    if whole:
        shutil.copyfile(run / "monitor.csv", target / "monitor.csv")
        (target / MOVING_MEAN).unlink(missing_ok=True)
    else:
        write_atomic(target / MOVING_MEAN, moving_mean_csv(known(result.curve, result)))
        write_atomic(target / "monitor.csv", last_episodes(run, result.env))
    return target


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


def summary(run: Path) -> dict[str, object]:
    """Last-100-episode return, final evaluation, steps and wall-clock of a run."""
    monitor = load_monitor(run)
    evaluation = ""
    if (run / "eval.csv").exists():  # an unfinished run has none yet
        with (run / "eval.csv").open(newline="") as handle:
            evaluation = f"{float(list(csv.DictReader(handle))[-1]['mean_reward']):.1f}"
    config = json.loads((run / "config.json").read_text())
    return {
        "env": config["env"],
        "seed": config["seed"],
        "steps": int(monitor.steps[-1]),
        "last100": float(np.mean(monitor.returns[-100:])),
        "evaluation": evaluation or "unfinished",
        "minutes": float(monitor.seconds[-1]) / 60,
    }


def table(rows: list[dict[str, object]]) -> str:
    """Markdown table of the runs."""
    head = "| env | seed | steps | last 100 training episodes | final evaluation | minutes |"
    lines = [head, "|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        lines.append(
            f"| {row['env']} | {row['seed']} | {row['steps']:,} | {row['last100']:.1f}"
            f" | {row['evaluation']} | {row['minutes']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def collect_compact(paths: list[Path], out: Path) -> int:
    """Copy all runs below the paths; everything is read before anything is written."""
    try:
        results = read_results(find_runs(paths))
        size = 0
        for result in results:
            target = copy_compact(result, out)
            size += sum(file.stat().st_size for file in target.iterdir())
    except (RunError, ValueError, OSError) as error:
        sys.stderr.write(f"collect: error: {error}\n")
        return 2
    sys.stdout.write(f"{out}: {len(results)} runs, {size / 1e6:.2f} MB\n")
    return 0


def main() -> int:
    """Collect the runs named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument(
        "--compact", action="store_true", help="copy to OUT/ENV/LABEL/seedN for acktr report"
    )
    options = parser.parse_args()
    if options.compact:
        return collect_compact(options.runs, options.out)
    missing = [run for run in options.runs if not (run / "config.json").is_file()]
    if missing:
        sys.stderr.write(f"collect: error: not a run folder: {missing[0]}\n")
        return 2
    rows = sorted((summary(run) for run in options.runs), key=lambda r: (r["env"], r["seed"]))
    for run in options.runs:
        copy_run(run, options.out)
    for env in dict.fromkeys(str(row["env"]) for row in rows):
        folders = sorted((options.out / env.replace("/", "_")).glob("seed*"))
        figure = options.out / f"{env.replace('/', '_')}.png"
        plot_runs(folders, figure, published=published_curves(env, ("acktr",)))
    (options.out / "table.md").write_text(table(rows))
    sys.stdout.write(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
