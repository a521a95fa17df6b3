"""Compare K-FAC with SGD and Adam on supervised problems.

Every optimizer is tuned on the same budget and trained with the setting found and several seeds,
one run after another. CSV files, a summary and a figure are written. The same command continues
where it was stopped; finished runs are kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from acktr.compute import resolve_device
from scripts.common import (
    ScriptError,
    check_folder,
    command_line,
    given_once,
    integer,
    parsed,
    positive,
    run,
    save,
)
from scripts.supervised import report, settings
from scripts.supervised.campaign import Campaign, Plan
from scripts.supervised.problems import Dataset, Problem, load, make_problem
from scripts.supervised.settings import LM, OPTIMIZERS, RECIPES, ProblemName, Setting
from scripts.supervised.training import Curvature, RunSpec

_MOST_UPDATES = 10**9
"""Updates of the longest run."""
_MOST_VALUE = 1e30
"""Largest of a setting and a threshold: float32 still holds what the optimizers make of it."""


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
    try:
        widths = settings.SMALL_WIDTHS if images.built_in else settings.WIDTHS
        problem = make_problem(asked.problem, images, asked.widths or widths, asked.device)
        plan = make_plan(asked, problem, images)
        outcome = Campaign(plan, problem, asked.out).run()
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        raise ScriptError(
            "not enough memory: choose smaller --widths or a smaller --batch"
        ) from error
    command = command_line("supervised", _without_folder(argv))
    text = report.markdown(plan, outcome, images, command, asked.threshold)
    title = f"{problem.name}, {images.name}, batch {plan.base.batch}"
    goal, _ = report.threshold_of(outcome, asked.threshold)
    picture = report.figure(outcome, goal, title)
    save(asked.out, {"summary.md": text.encode(), "figure.png": picture})
    sys.stdout.write(text)
    return 0


def _out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether Python or torch could not allocate; torch has no exception of its own on the CPU."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _without_folder(argv: Sequence[str]) -> list[str]:
    """The arguments with the file name alone after --data; the folder differs between machines."""
    short = list(argv)
    for at, argument in enumerate(argv):
        if argument.startswith("--data="):
            short[at] = f"--data={Path(argument.partition('=')[2]).name}"
        elif at > 0 and argv[at - 1] == "--data":
            short[at] = Path(argument).name
    return short


def make_plan(asked: argparse.Namespace, problem: Problem, images: Dataset) -> Plan:
    """The campaign that a command line asks for.

    Raises:
        ScriptError: The batch is larger than the data, or a run would be too long.
    """
    small = images.built_in
    batch = asked.batch or (settings.SMALL_BATCH if small else settings.BATCH[problem.name])
    if batch > len(problem.train):
        raise ScriptError(
            f"argument --batch: {batch} is more than the {len(problem.train)} training images"
        )
    per_epoch = len(problem.train) // batch
    epochs = dict(asked.epochs)
    for name in asked.optimizers:
        recipe = RECIPES[problem.name][name]
        epochs.setdefault(name, recipe.small_epochs if small else recipe.epochs)
    lengths = {f"--epochs: {name}={epochs[name]:g}": epochs[name] for name in asked.optimizers}
    if asked.tune_updates is None:
        lengths[f"--tune-epochs: {asked.tune_epochs:g}"] = asked.tune_epochs
    for what, length in lengths.items():
        if length > _MOST_UPDATES / per_epoch:
            raise ScriptError(
                f"argument {what} epochs of {per_epoch} updates are too many:"
                f" at most {_MOST_UPDATES / per_epoch:g} epochs fit"
            )
    base = RunSpec(
        problem=problem.name,
        data=images.digest(),
        widths=problem.widths if problem.name == "autoencoder" else (),
        optimizer="",
        seed=0,
        setting={},
        batch=batch,
        updates=0,
        eval_every=asked.eval_every or per_epoch,
        device=str(asked.device),
        curvature=Curvature(
            statistics_part=asked.statistics_part,
            statistics_every=asked.statistics_every,
            refresh_every=asked.refresh_every,
        ),
        constants=settings.constants(problem.name, "kfac"),
        measured=asked.measure,
    )
    return Plan(
        optimizers=tuple(asked.optimizers),
        seeds=tuple(asked.seeds),
        updates={name: max(1, round(epochs[name] * per_epoch)) for name in asked.optimizers},
        tune_updates=asked.tune_updates or max(1, round(asked.tune_epochs * per_epoch)),
        tune_seed=asked.tune_seed,
        fixed=dict(asked.fix),
        updates_per_epoch=per_epoch,
        base=base,
    )


def options(argv: Sequence[str]) -> argparse.Namespace:
    """Options of a command line; help is printed and ends in SystemExit.

    Raises:
        ScriptError: One line that says what is wrong.
    """
    asked = parsed(_parser(), argv)
    given_once(asked, "optimizers", "seeds")
    if asked.tune_seed in asked.seeds:
        raise ScriptError(
            f"argument --tune-seed: {asked.tune_seed} is among --seeds; tune on another one"
        )
    for flag in ("epochs", "fix"):
        for name, _ in getattr(asked, flag):
            if name not in asked.optimizers:
                raise ScriptError(
                    f"argument --{flag}: {name!r} is not among the optimizers"
                    f" {', '.join(asked.optimizers)}"
                )
    for name, setting in asked.fix:
        _check_fixed(asked.problem, name, setting)
    asked.device = resolve_device(asked.device)
    return asked


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.supervised", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    add("problem", choices=tuple(RECIPES), help="network and loss")
    what = ".npz with x_train, y_train, x_test, y_test; without it a small built-in set is used"
    add("--data", type=Path, metavar="FILE", help=what)
    add("--out", type=Path, required=True, help="folder of the results")
    add("--device", default="cpu", help="auto, cpu, cuda or cuda:N; default cpu")
    add("--threads", type=integer(1, 1024), help="threads of torch; default torch's own")

    add = parser.add_argument_group("runs").add_argument
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="NAME")
    add("--seeds", nargs="+", type=integer(0), default=[0, 1, 2], metavar="SEED")
    what = "epochs of full runs, for example kfac=10 sgd=100"
    add("--epochs", nargs="+", type=_epochs, default=[], metavar="NAME=EPOCHS", help=what)
    add("--eval-every", type=integer(1), metavar="UPDATES", help="default an epoch")
    what = "images of each split that losses are measured on; default all"
    add("--measure", type=integer(1), metavar="IMAGES", help=what)
    what = "training loss to reach; default the largest final one over the seeds of sgd"
    add("--threshold", type=positive(_MOST_VALUE), metavar="LOSS", help=what)

    group = parser.add_argument_group("tuning, the same budget for every setting")
    budget = group.add_mutually_exclusive_group().add_argument
    budget("--tune-updates", type=integer(1, _MOST_UPDATES), metavar="UPDATES")
    length = positive(_MOST_UPDATES)
    budget("--tune-epochs", type=length, default=settings.TUNE_EPOCHS, metavar="EPOCHS")
    add = group.add_argument
    add("--tune-seed", type=integer(0), default=settings.TUNE_SEED, metavar="SEED")
    form = "NAME:KEY=VALUE[,...]"
    what = "settings to use instead of tuning, for example kfac:kl_clip=10,damping=0.3"
    add("--fix", nargs="+", type=_fixed, default=[], metavar=form, help=what)

    add = parser.add_argument_group("problem").add_argument
    add("--batch", type=integer(1), help="images per update")
    add("--widths", nargs="+", type=integer(1, 20_000), help="encoder of the autoencoder")
    part, refresh = settings.STATISTICS_PART, settings.KFAC_CONSTANTS.refresh_interval
    what = f"K-FAC's statistics from batch/K; default {part}"
    add("--statistics-part", type=integer(1), default=part, metavar="K", help=what)
    what = "between statistics; default 1"
    add("--statistics-every", type=integer(1), default=1, metavar="UPDATES", help=what)
    what = f"between inverses; default {refresh}"
    add("--refresh-every", type=integer(1), default=refresh, metavar="UPDATES", help=what)
    return parser


def _check_fixed(problem: ProblemName, name: str, setting: Setting) -> None:
    wanted = RECIPES[problem][name].grid[0]
    if setting.keys() != wanted.keys():
        raise ScriptError(
            f"argument --fix: {name} needs {' and '.join(wanted)}, got {', '.join(setting)}"
        )
    limits = LM[problem]
    if name == "kfac-adaptive" and not limits.minimum <= setting["damping"] <= limits.maximum:
        raise ScriptError(
            f"argument --fix: damping of {name} must lie in [{limits.minimum:g},"
            f" {limits.maximum:g}], got {setting['damping']:g}"
        )


def _epochs(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, positive(_MOST_UPDATES)(value)


def _fixed(text: str) -> tuple[str, Setting]:
    name, _, rest = text.partition(":")
    pairs = (pair.partition("=") for pair in rest.split(","))
    return name, {key: positive(_MOST_VALUE)(value) for key, _, value in pairs}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
