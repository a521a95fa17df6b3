"""Compare K-FAC with SGD and Adam on supervised problems.

Every optimizer is tuned on the same budget and trained with the setting found and several seeds,
one run after another. CSV files, a summary and a figure are written. The same command continues
where it was stopped; finished runs are kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from scripts import contest
from scripts.common import ScriptError, check_folder, command_line, integer, positive, run, save
from scripts.supervised import report, settings
from scripts.supervised.plan import Plan, compete
from scripts.supervised.problems import Dataset, load, make_problem
from scripts.supervised.settings import OPTIMIZERS, RECIPES
from scripts.supervised.training import RunSpec

_MOST_EPOCHS = 10**5


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code: 0, 2 bad input, 130 Ctrl-C, 75 SIGTERM."""
    note = "finished runs are kept, the same command continues"
    return run("supervised", lambda _: _compare(argv), note)


def _compare(argv: Sequence[str]) -> int:
    asked = options(argv)
    check_folder(asked.out)
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    images = load(asked.data, asked.problem)
    plan = make_plan(asked, images)
    widths = settings.SMALL_WIDTHS if images.built_in else settings.WIDTHS
    problem = make_problem(asked.problem, images, widths)
    outcome = compete("supervised", plan, asked.out, problem)
    text = report.markdown(plan, outcome, images, command_line("supervised", contest.shown(argv)))
    title = f"{problem.name}, {images.name}, batch {plan.base.batch}"
    picture = report.figure(outcome, report.threshold_of(outcome)[0], title)
    save(asked.out, {"summary.md": text.encode(), "figure.png": picture})
    sys.stdout.write(text)
    return 0


def make_plan(asked: argparse.Namespace, images: Dataset) -> Plan:
    """The campaign that a command line asks for.

    Raises:
        ScriptError: There are fewer images than a batch takes.
    """
    small, count = images.built_in, len(images.x_train)
    batch = settings.SMALL_BATCH if small else settings.BATCH[asked.problem]
    if batch > count:
        raise ScriptError(f"{images.name}: {count} training images, less than a batch of {batch}")
    per_epoch = count // batch
    recipes = RECIPES[asked.problem]
    epochs = {
        name: recipes[name].small_epochs if small else recipes[name].epochs
        for name in asked.optimizers
    } | dict(asked.epochs)
    widths = settings.SMALL_WIDTHS if small else settings.WIDTHS
    base = RunSpec(
        problem=asked.problem,
        data=images.digest(),
        widths=widths if asked.problem == "autoencoder" else (),
        optimizer="",
        seed=0,
        setting={},
        batch=batch,
        updates=0,
        eval_every=asked.eval_every or per_epoch,
        curvature=None,
        measured=asked.measure,
    )
    return Plan(
        optimizers=tuple(asked.optimizers),
        seeds=tuple(asked.seeds),
        updates={name: max(1, round(epochs[name] * per_epoch)) for name in asked.optimizers},
        tune_updates=asked.tune_updates or settings.TUNE_EPOCHS * per_epoch,
        updates_per_epoch=per_epoch,
        base=base,
    )


def options(argv: Sequence[str]) -> argparse.Namespace:
    """Options of a command line; help is printed and ends in SystemExit.

    Raises:
        ScriptError: One line that says what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m scripts.supervised", description=__doc__, allow_abbrev=False
    )
    what = ".npz with x_train, y_train, x_test, y_test"
    contest.add_options(parser, tuple(RECIPES), OPTIMIZERS, what)
    add = parser.add_argument
    add("--threads", type=integer(1, 1024), help="threads of torch; default torch's own")
    what = "epochs of full runs, for example kfac=10 sgd=100"
    add("--epochs", nargs="+", type=_epochs, default=[], metavar="NAME=EPOCHS", help=what)
    add("--eval-every", type=integer(1), metavar="UPDATES", help="default an epoch")
    what = "images of each split that losses are measured on; default all"
    add("--measure", type=integer(1), metavar="IMAGES", help=what)
    what = "budget of every setting that is tried; default three epochs"
    add("--tune-updates", type=integer(1), metavar="UPDATES", help=what)
    asked = contest.options(parser, argv)
    for name, _ in asked.epochs:
        if name not in asked.optimizers:
            raise ScriptError(f"argument --epochs: {name!r} is not among the optimizers")
    return asked


def _epochs(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, positive(_MOST_EPOCHS)(value)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
