"""Copy the small files of finished runs into a results folder and write a table and figures.

Usage: python scripts/collect.py RUN [RUN ...] --out results/FOLDER
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np

from acktr.curves import load_monitor, published_curves
from acktr.plot import plot_runs

MAX_PROGRESS_ROWS = 400
COPIED = ("config.json", "versions.json", "monitor.csv", "eval.csv")


def thin(source: Path, target: Path) -> None:
    """Copy a CSV with at most MAX_PROGRESS_ROWS rows, first and last included."""
    with source.open(newline="") as handle:
        header, *rows = list(csv.reader(handle))
    if len(rows) > MAX_PROGRESS_ROWS:
        keep = np.unique(np.linspace(0, len(rows) - 1, MAX_PROGRESS_ROWS).round().astype(int))
        rows = [rows[i] for i in keep]
    with target.open("w", newline="") as handle:
        csv.writer(handle).writerows([header, *rows])


def copy_run(run: Path, out: Path) -> Path:
    """Copy one run's files to OUT/ENV/seedN."""
    target = out / run.parent.parent.name / run.name
    target.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (run / name).exists():
            shutil.copyfile(run / name, target / name)
    thin(run / "progress.csv", target / "progress.csv")
    command = (run / "command.txt").read_text()
    (target / "command.txt").write_text(
        re.sub(r" --(run-dir|resume)[ =]\S+", r" --\1 ...", command)
    )
    return target


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


def main() -> int:
    """Collect the runs named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
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
