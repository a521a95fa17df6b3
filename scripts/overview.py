"""The figure of the README: aggregate scores on MuJoCo, and the learning curve of Breakout.

Usage: python -m scripts.overview [--results results] [--out results/overview.png]

Left: interquartile means of the normalised scores over eight MuJoCo environments with their 95 %
intervals, as `acktr report` wrote them to mujoco/aggregate.csv. Right: the Breakout run of 10M
steps in atari/, beside the published curves. The same data give the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from acktr.files import write_atomic
from acktr.report.archives import unpacked
from acktr.report.figures import COLOURS, DASHES, GREY, bare, panels, picture, step_axis
from acktr.report.references import published_curves
from acktr.report.results import find_runs, read_results
from scripts.common import on_files, parsed

LABELS = {
    "acktr": "ACKTR",
    "sb3-ppo": "PPO (stable-baselines3)",
    "trpo": "TRPO",
    "acktr-paper": "ACKTR, the paper's settings",
    "a2c": "A2C",
}
METRICS = {"last100": "last 100 training episodes", "eval": "evaluation without noise"}
GAME = "BreakoutNoFrameskip-v4"


def scores(axis: Axes, aggregate: Path) -> None:
    """Points with intervals: one row per algorithm, one colour per metric."""
    with aggregate.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["statistic"] == "IQM"]
    for shift, (metric, name) in enumerate(METRICS.items()):
        mine = {row["label"]: row for row in rows if row["metric"] == metric}
        values = np.array(
            [
                [float(mine[label][f"value{end}"]) for end in ("_low", "", "_high")]
                for label in LABELS
            ]
        )
        low, middle, high = values.T
        places = np.arange(len(LABELS)) + 0.22 * shift - 0.11
        spread = np.stack([middle - low, high - middle])
        colour = COLOURS[1 - shift]
        axis.errorbar(middle, places, xerr=spread, label=name, fmt="o", color=colour, capsize=3)
    axis.set_yticks(range(len(LABELS)), list(LABELS.values()))
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_title("8 MuJoCo environments, 1M steps")
    axis.set_xlabel("normalised score, interquartile mean and 95 % interval")
    bare(axis)
    axis.legend(frameon=False, loc="lower right", fontsize="small")


def breakout(axis: Axes, runs: Path) -> None:
    """The curve of the run of 10M steps, and the published ones."""
    with unpacked([runs]) as folders:
        results = read_results(find_runs(folders))
    for dash, other in zip(DASHES, published_curves(GAME), strict=False):
        axis.plot(
            other.steps, other.returns, color=GREY, linestyle=dash, label=f"ACKTR, {other.source}"
        )
    for result in results:
        assert result.curve is not None
        steps, returns = result.curve.steps, result.curve.returns
        axis.plot(steps, returns, color=COLOURS[0], linewidth=2, label="ACKTR, ours (one seed)")
    step_axis(axis, "Breakout")
    axis.set_ylabel("return, mean of 100 episodes")
    axis.legend(frameon=False, loc="lower right", fontsize="small")


def work(argv: Sequence[str]) -> None:
    """Do what a command line says."""
    parser = argparse.ArgumentParser(description="draw the figure of the README")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--out", type=Path, default=Path("results/overview.png"))
    options = parsed(parser, argv)
    figure, (left, right), _ = panels(2, columns=2, height=3.6)
    figure.set_size_inches(12, 3.8)
    scores(left, options.results / "mujoco" / "aggregate.csv")
    breakout(right, options.results / "atari" / "runs.zip" / GAME / "acktr")
    write_atomic(options.out, picture(figure, "png"))


def main(argv: Sequence[str]) -> int:
    """Run a command line; 0, or 2 on bad input."""
    return on_files("overview", lambda: work(argv))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
