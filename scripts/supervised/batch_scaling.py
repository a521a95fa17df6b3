"""How far K-FAC and SGD profit from larger batches: updates and examples to a loss.

For every batch size every optimizer is tuned on the same budget and trained with several seeds, as
scripts.supervised does, in a folder of its own. The same command continues where it was stopped.
Updates to the loss are fitted by u (1 + B' / B): u is what no batch goes below, and beyond the
critical batch B' more examples buy little (McCandlish et al. 2018, arXiv:1812.06162).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from acktr.report.figures import bare, legend_below, panels, picture, plain
from acktr.report.tables import as_csv
from acktr.report.tables import markdown as table
from scripts import contest
from scripts.common import (
    ScriptError,
    check_folder,
    command_line,
    described_machine,
    given_once,
    integer,
    positive,
    run,
    save,
)
from scripts.contest import Outcome, Row
from scripts.supervised import settings
from scripts.supervised.plan import Plan, compete
from scripts.supervised.problems import Dataset, load, make_problem
from scripts.supervised.report import COLOUR_OF
from scripts.supervised.settings import OPTIMIZERS
from scripts.supervised.training import RunSpec

BATCHES = (250, 500, 1000, 2000, 4000, 8000)
GRIDS = {"sgd": contest.grid(lr=(1.5e-3, 3e-3, 6e-3, 1.2e-2))}
"""Settings to choose from in place of the recipe's, which are a factor of three apart."""
_FAR = 1000
"""A critical batch so many times the largest one is infinite: no end is in sight."""


@dataclass(frozen=True)
class Reached:
    """What a run needed to the loss."""

    optimizer: str
    batch: int
    seed: int
    updates: int | None
    """At its first evaluation at or below the loss; None if it never was."""
    seconds: float | None
    final: float
    """Training loss at its end."""

    @property
    def examples(self) -> int | None:
        """Examples seen until then."""
        return None if self.updates is None else self.updates * self.batch


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code: 0, 2 bad input, 130 Ctrl-C, 75 SIGTERM."""
    note = "finished runs are kept, the same command continues"
    return run("supervised.batch_scaling", lambda _: _compare(argv), note)


def _compare(argv: Sequence[str]) -> int:
    asked = options(argv)
    check_folder(asked.out)
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    images = load(asked.data, asked.problem)
    if max(asked.batches) > len(images.x_train):
        raise ScriptError(f"argument --batches: {images.name} has {len(images.x_train)} images")
    outcomes = {batch: _outcome(asked, images, batch) for batch in asked.batches}
    goal = asked.goal or _common(outcomes)
    found = reached(outcomes, goal)
    command = command_line("supervised.batch_scaling", contest.shown(argv))
    text = summary(found, goal, images, command)
    files = {"summary.md": text.encode(), "scaling.csv": as_csv(*_rows(found))}
    title = f"{asked.problem} on {images.name}, to training loss {goal:.5g}"
    files |= {"figure.png": figure(found, title), "curves.png": curves(outcomes, title)}
    save(asked.out, files)
    sys.stdout.write(text)
    return 0


def _outcome(asked: argparse.Namespace, images: Dataset, batch: int) -> Outcome:
    """Tune and train with one batch size."""
    widths = settings.SMALL_WIDTHS if images.built_in else settings.WIDTHS
    problem = make_problem(asked.problem, images, widths)
    per_epoch = len(images.x_train) // batch
    base = RunSpec(
        problem=asked.problem,
        data=images.digest(),
        widths=widths,
        optimizer="",
        seed=0,
        setting={},
        batch=batch,
        updates=0,
        eval_every=asked.eval_every,
        curvature=None,
        measured=asked.measure,
        goal=asked.goal,
    )
    plan = Plan(
        optimizers=tuple(asked.optimizers),
        seeds=tuple(asked.seeds),
        updates=dict.fromkeys(asked.optimizers, asked.updates),
        tune_updates=asked.tune_updates,
        updates_per_epoch=per_epoch,
        base=base,
        grids={} if images.built_in else GRIDS,
    )
    return compete(f"batch {batch}", plan, asked.out / f"batch{batch}", problem)


def _common(outcomes: Mapping[int, Outcome]) -> float:
    """A loss that every run reached that did not diverge."""
    best = [
        min(row.train_loss for row in rows) for o in outcomes.values() for rows in o.runs.values()
    ]
    return max(loss for loss in best if math.isfinite(loss))


def reached(outcomes: Mapping[int, Outcome], goal: float) -> list[Reached]:
    """What every run needed, by batch, optimizer and seed."""
    found = []
    for batch, outcome in outcomes.items():
        for (optimizer, seed), rows in outcome.runs.items():
            hit: Row | None = next((row for row in rows if row.train_loss <= goal), None)
            updates, seconds = (None, None) if hit is None else (hit.update, hit.seconds)
            last = rows[-1].train_loss
            found.append(Reached(optimizer, batch, seed, updates, seconds, last))
    return found


def critical_batch(batches: Sequence[int], updates: Sequence[int]) -> float:
    """B' of updates = u (1 + B' / B), by least squares of relative errors; infinite for u near 0.

    Args:
        batches: At least two different sizes.
        updates: Updates to the loss with each.
    """
    sizes, taken = np.array(batches, np.float64), np.array(updates, np.float64)
    terms = np.stack([1 / taken, 1 / (sizes * taken)], axis=1)
    least, slope = np.linalg.lstsq(terms, np.ones(len(sizes)), rcond=None)[0]
    if least * sizes.max() * _FAR <= slope:
        return math.inf
    return max(float(slope / least), 0.0)


def critical_batches(found: Sequence[Reached], optimizer: str) -> dict[int, float]:
    """B' by seed, of those that reached the loss with two batches or more."""
    result = {}
    for seed in dict.fromkeys(one.seed for one in found):
        mine = [
            (one.batch, one.updates)
            for one in found
            if (one.optimizer, one.seed) == (optimizer, seed) and one.updates
        ]
        if len(mine) > 1:
            result[seed] = critical_batch([b for b, _ in mine], [u for _, u in mine])
    return result


def summary(found: Sequence[Reached], goal: float, images: Dataset, command: str) -> str:
    """What was found, as tables."""
    body = [
        [
            one.optimizer,
            str(one.batch),
            str(one.seed),
            *(["not reached", ""] if one.updates is None else [one.updates, f"{one.examples:,}"]),
            "" if one.seconds is None else f"{one.seconds:.1f}",
            f"{one.final:.5g}",
        ]
        for one in found
    ]
    names = list(dict.fromkeys(one.optimizer for one in found))
    critical = {name: critical_batches(found, name) for name in names}
    seeds = list(dict.fromkeys(one.seed for one in found))
    fits = [
        [name, *(f"{critical[name].get(seed, math.nan):,.0f}" for seed in seeds)] for name in names
    ]
    head = ["optimizer", "batch", "seed", "updates", "examples", "seconds", "final training loss"]
    parts = [
        f"# Batches of {'the small set' if images.built_in else images.name}\n",
        f"Command: `{command}`\n",
        f"Updates and examples to training loss {goal:.5g}, at the first evaluation at or below"
        " it.\n",
        table(head, [[str(cell) for cell in row] for row in body]),
        "Critical batch of updates = u (1 + B' / B):\n",
        table(["optimizer", *(f"seed {seed}" for seed in seeds)], fits),
        *(_ratios(critical[name], critical["sgd"], name) for name in names if "sgd" in names),
        f"Data: SHA-256 {images.digest()}.\n",
        described_machine(),
    ]
    return "\n".join(part for part in parts if part)


def _ratios(mine: Mapping[int, float], of_sgd: Mapping[int, float], name: str) -> str:
    """The ratio of an optimizer's critical batch to SGD's: geometric mean and range over seeds."""
    seeds = [seed for seed in mine if seed in of_sgd]
    logs = [math.log(mine[s] / of_sgd[s]) for s in seeds if 0 < mine[s] < math.inf > of_sgd[s] > 0]
    if name == "sgd" or not logs:
        return ""
    mean, low, high = (math.exp(x) for x in (statistics.fmean(logs), min(logs), max(logs)))
    return (
        f"Critical batch of {name} over that of sgd: {mean:.2f}, from {low:.2f} to {high:.2f} over"
        f" {len(logs)} seeds.\n"
    )


def _rows(found: Sequence[Reached]) -> tuple[tuple[str, ...], list[list[object]]]:
    """Head and body of scaling.csv."""
    head = ("optimizer", "batch", "seed", "updates", "examples", "seconds", "final_train_loss")
    body: list[list[object]] = []
    for one in found:
        numbers = (one.updates, one.examples, one.seconds, one.final)
        cells = ["" if number is None else f"{number:.9g}" for number in numbers]
        body.append([one.optimizer, one.batch, one.seed, *cells])
    return head, body


def figure(found: Sequence[Reached], title: str) -> bytes:
    """Updates and examples to the loss against the batch size: a line for each seed."""
    drawn, axes, _ = panels(2, 2)
    for axis, what in zip(axes, ("updates", "examples"), strict=True):
        for key in dict.fromkeys((one.optimizer, one.seed) for one in found):
            hit = [one for one in found if (one.optimizer, one.seed) == key and one.updates]
            axis.plot(
                [one.batch for one in hit],
                [one.updates if what == "updates" else one.examples for one in hit],
                color=COLOUR_OF[key[0]],
                alpha=0.8,
                marker=".",
                label=key[0],
            )
        _logarithmic(axis, "batch", f"{what} to the loss")
        sizes = sorted({one.batch for one in found})
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.set_xticks([], minor=True)  # whose labels would lie on one another
    return _finished(drawn, axes[0], title)


def curves(outcomes: Mapping[int, Outcome], title: str) -> bytes:
    """Training loss against updates and against examples, a line for each run.

    Optimizers have a colour each, and batches a shade, the darker the larger they are.
    """
    drawn, axes, _ = panels(2, 2)
    for axis, what in zip(axes, ("updates", "examples"), strict=True):
        for place, (batch, outcome) in enumerate(outcomes.items()):
            for (name, _), rows in outcome.runs.items():
                seen = [row for row in rows[1:] if math.isfinite(row.train_loss)]
                axis.plot(
                    [row.update * (batch if what == "examples" else 1) for row in seen],
                    [row.train_loss for row in seen],
                    color=COLOUR_OF[name],
                    alpha=0.3 + 0.7 * (place + 1) / len(outcomes),
                    linewidth=1,
                    label=f"{name}, {batch}",
                )
        _logarithmic(axis, what, "training loss")
    return _finished(drawn, axes[0], title)


def _logarithmic(axis: Any, x: str, y: str) -> None:
    """Name the axes of a panel."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    bare(axis)
    axis.grid(alpha=0.25, which="both")


def _finished(drawn: Figure, axis: Any, title: str) -> bytes:
    """The picture, with a legend of the lines of one panel, each label once."""
    lines = {line.get_label(): line for line in axis.get_lines()}
    legend_below(drawn, list(lines.values()))
    drawn.suptitle(plain(title), fontweight="bold")
    return picture(drawn, "png")


def options(argv: Sequence[str]) -> argparse.Namespace:
    """Options of a command line; help is printed and ends in SystemExit.

    Raises:
        ScriptError: One line that says what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m scripts.supervised.batch_scaling",
        description=__doc__,
        allow_abbrev=False,
    )
    what = ".npz with x_train, y_train, x_test, y_test"
    contest.add_options(parser, ("autoencoder",), OPTIMIZERS, what)
    add = parser.add_argument
    add("--batches", nargs="+", type=integer(2), default=list(BATCHES), metavar="SIZE")
    add("--updates", type=integer(1), default=3000, help="of every full run; default 3000")
    what = "budget of every setting that is tried; default 200"
    add("--tune-updates", type=integer(1), default=200, metavar="UPDATES", help=what)
    add("--eval-every", type=integer(1), default=10, metavar="UPDATES", help="default 10")
    what = "images of each split that losses are measured on; default 2000"
    add("--measure", type=integer(1), default=2000, metavar="IMAGES", help=what)
    what = (
        "training loss to reach, at which every run ends, those of the tuning too; by default runs"
        " make all their updates, and the loss is the lowest that all of them reach"
    )
    add("--goal", type=positive(1e9), metavar="LOSS", help=what)
    add("--threads", type=integer(1, 1024), help="threads of torch; default torch's own")
    asked = contest.options(parser, argv)
    given_once(asked, "batches")
    return asked


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
