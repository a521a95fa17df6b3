"""summary.md and figure.png of a campaign; the numbers behind them are in the CSV files of runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from matplotlib import ticker

from acktr.report.figures import COLOURS, GREY, bare, legend_below, panels, picture, plain
from acktr.report.tables import markdown as table
from scripts.common import described_machine
from scripts.contest import TUNE_SEED, Outcome, Row, describe
from scripts.supervised.plan import Plan
from scripts.supervised.problems import Dataset
from scripts.supervised.settings import OPTIMIZERS

COLOUR_OF = dict(zip(OPTIMIZERS, [COLOURS[i] for i in (0, 2, 1, 3)], strict=True))


def threshold_of(outcome: Outcome) -> tuple[float, str]:
    """The training loss to reach, and where it comes from.

    It is the largest final loss over the seeds of sgd, so that every one of its runs reaches it;
    without sgd the largest final loss of all runs.
    """
    finals = {key: rows[-1].train_loss for key, rows in outcome.runs.items()}
    of_sgd = [loss for (name, _), loss in finals.items() if name == "sgd"]
    source = "sgd" if of_sgd else "all runs"
    goal = max(of_sgd or finals.values())
    return goal, f"largest final training loss over the seeds of {source}"


def ratios(outcome: Outcome, goal: float, slow: str, fast: str) -> dict[str, list[float | None]]:
    """Updates and seconds to the threshold of one optimizer over those of another.

    Returns:
        By ``updates`` and ``seconds`` the ratio of every seed and their mean; None where one of
        the two does not get there.
    """
    found: dict[str, list[float | None]] = {"updates": [], "seconds": []}
    for (name, seed), rows in outcome.runs.items():
        if name == fast:
            one, other = _reached(outcome.runs[slow, seed], goal), _reached(rows, goal)
            if one is None or other is None or other.seconds == 0:
                values: tuple[float | None, float | None] = (None, None)
            else:
                values = (one.update / other.update, one.seconds / other.seconds)
            found["updates"].append(values[0])
            found["seconds"].append(values[1])
    for each in found.values():
        known = [value for value in each if value is not None]
        each.append(statistics.fmean(known) if len(known) == len(each) else None)
    return found


def _reached(rows: Sequence[Row], goal: float) -> Row | None:
    """The first evaluation at or below the threshold."""
    return next((row for row in rows if row.train_loss <= goal), None)


def markdown(plan: Plan, outcome: Outcome, images: Dataset, command: str) -> str:
    """What was compared and what was found, as tables."""
    base = plan.base
    goal, source = threshold_of(outcome)
    parts = [
        f"# {base.problem} on {images.name}\n",
        f"Command: `{command}`\n",
        f"{len(images.x_train):,} training and {len(images.x_test):,} test images, batch"
        f" {base.batch}, {plan.updates_per_epoch} updates per epoch, evaluated every"
        f" {base.eval_every} updates on {base.measured or 'all'} images of each"
        " split; seconds are those of training, without evaluation.\n",
        f"Tuned for {plan.tune_updates} updates with seed {TUNE_SEED}; chosen by training loss"
        " at their end.\n",
        _grid_table(outcome),
        *([f"{edges}\n"] if (edges := outcome.edges()) else []),
        f"Threshold: training loss {_number(goal)} ({source}); reached at the first evaluation at"
        " or below it.\n",
        _run_table(outcome, goal),
        _mean_table(outcome),
        *_ratio_table(plan, outcome, goal),
        f"Data: SHA-256 {images.digest()}.\n",
        described_machine(),
    ]
    return "\n".join(parts)


def _grid_table(outcome: Outcome) -> str:
    body = []
    for name, best in outcome.settings.items():
        for setting, row in outcome.tuning[name]:
            mark = "yes" if setting == best else ""
            numbers = [_number(row.train_loss), f"{row.seconds:.1f}"]
            body.append([name, describe(setting), *numbers, mark])
    return table(["optimizer", "setting", "training loss", "seconds", "chosen"], body, left=2)


def _run_table(outcome: Outcome, goal: float) -> str:
    head = ["optimizer", "seed", "updates", "seconds", "training loss", "test loss"]
    head += ["updates to threshold", "seconds to threshold"]
    body = []
    for (name, seed), rows in outcome.runs.items():
        last, hit = rows[-1], _reached(rows, goal)
        row = [name, str(seed), f"{last.update:,}", f"{last.seconds:.1f}"]
        row += [_number(last.train_loss), _number(last.test_loss)]
        row += ["not reached", ""] if hit is None else [f"{hit.update:,}", f"{hit.seconds:.1f}"]
        body.append(row)
    return table(head, body)


def _mean_table(outcome: Outcome) -> str:
    body = []
    for name in outcome.settings:
        last = [rows[-1] for (of, _), rows in outcome.runs.items() if of == name]
        losses = ((row.train_loss for row in last), (row.test_loss for row in last))
        body.append([name, *(_number(statistics.fmean(loss)) for loss in losses)])
    return table(["optimizer", "mean final training loss", "mean final test loss"], body)


def _ratio_table(plan: Plan, outcome: Outcome, goal: float) -> list[str]:
    body = []
    for slow in (name for name in ("sgd", "adam") if name in plan.optimizers):
        for fast in (name for name in plan.optimizers if name.startswith("kfac")):
            for what, values in ratios(outcome, goal, slow, fast).items():
                cells = ("-" if value is None else f"{value:.2f}" for value in values)
                body.append([f"{slow}/{fast}", what, *cells])
    head = ["to the threshold", "ratio of", *(f"seed {seed}" for seed in plan.seeds), "mean"]
    return [table(head, body, left=2)] if body else []


def _number(value: float) -> str:
    return f"{value:.5g}" if math.isfinite(value) else "diverged"


def figure(outcome: Outcome, goal: float, title: str) -> bytes:
    """Training loss against updates and against seconds: a line per run, a colour per optimizer."""
    drawn, axes, _ = panels(2, 2)
    labels = {name: f"{name} ({describe(used)})" for name, used in outcome.settings.items()}
    for axis, name in zip(axes, ("updates", "seconds of training"), strict=True):
        for (optimizer, _), rows in outcome.runs.items():
            good = [row for row in rows if math.isfinite(row.train_loss)]
            axis.plot(
                [row.update if name == "updates" else row.seconds for row in good],
                [row.train_loss for row in good],
                color=COLOUR_OF[optimizer],
                alpha=0.8,
                label=labels[optimizer],
                marker="." if len(good) <= 30 else None,
            )
        if math.isfinite(goal):
            axis.axhline(goal, color=GREY, linewidth=1, linestyle="--")
        axis.set_xlabel(name)
        axis.set_yscale("log")
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(ticker.LogFormatter(minor_thresholds=(2, 0.4)))
        bare(axis)
        axis.grid(alpha=0.25, which="both")
    axes[0].set_ylabel("training loss")
    lines = {line.get_label(): line for line in axes[0].get_lines()[: len(outcome.runs)]}
    legend_below(drawn, list(lines.values()))
    drawn.suptitle(plain(title), fontweight="bold")
    return picture(drawn, "png")
