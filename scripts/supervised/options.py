"""The command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from acktr.compute import resolve_device
from acktr.config import ConfigError
from scripts.arguments import integer, parsed, positive
from scripts.supervised.errors import SupervisedError
from scripts.supervised.settings import (
    LM,
    OPTIMIZERS,
    RECIPES,
    TUNE_EPOCHS,
    TUNE_SEED,
    ProblemName,
    Setting,
)

_DESCRIPTION = """\
Compare K-FAC with SGD and Adam on supervised problems: tune each optimizer on the same budget,
train with the chosen settings and several seeds, one run after another, and write CSV files, a
summary and a figure. The same command continues where it was stopped; finished runs are kept.
"""
MOST_UPDATES = 10**9
"""Updates of the longest run."""
_MOST_THREADS = 1024
_MOST_WIDTH = 20_000
_MOST_VALUE = 1e30
"""Largest of a setting and a threshold: float32 still holds what the optimizers make of it."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options of a command line; help is printed and ends in SystemExit.

    Raises:
        SupervisedError: One line that says what is wrong.
    """
    options = parsed(_parser(), argv, SupervisedError)
    _check(options)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="supervised", description=_DESCRIPTION)
    parser.add_argument("problem", choices=tuple(RECIPES), help="network and loss")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help=".npz with x_train, y_train, x_test, y_test; idx files; or a folder of CIFAR-10"
        " batches; without it a small built-in set is used",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N; default cpu")
    parser.add_argument(
        "--threads", type=integer(1, _MOST_THREADS), help="threads of torch; default torch's own"
    )
    _add_runs(parser)
    _add_tuning(parser)
    _add_problem(parser)
    _add_overhead(parser)
    return parser


def _add_runs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("runs")
    group.add_argument(
        "--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="NAME"
    )
    group.add_argument("--seeds", nargs="+", type=integer(0), default=[0, 1, 2], metavar="SEED")
    group.add_argument(
        "--epochs",
        nargs="+",
        type=_epochs,
        default=[],
        metavar="NAME=EPOCHS",
        help="epochs of full runs, for example kfac=10 sgd=100",
    )
    group.add_argument("--eval-every", type=integer(1), metavar="UPDATES", help="default an epoch")
    group.add_argument(
        "--measure",
        type=integer(1),
        metavar="IMAGES",
        help="images of each split that losses are measured on; default all",
    )
    group.add_argument(
        "--threshold",
        type=positive(_MOST_VALUE),
        metavar="LOSS",
        help="training loss to reach; default the largest final one over the seeds of sgd",
    )


def _add_tuning(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tuning, the same budget for every setting")
    budget = group.add_mutually_exclusive_group()
    budget.add_argument("--tune-updates", type=integer(1, MOST_UPDATES), metavar="UPDATES")
    budget.add_argument(
        "--tune-epochs", type=positive(MOST_UPDATES), default=TUNE_EPOCHS, metavar="EPOCHS"
    )
    group.add_argument("--tune-seed", type=integer(0), default=TUNE_SEED, metavar="SEED")
    group.add_argument(
        "--fix",
        nargs="+",
        type=_fixed,
        default=[],
        metavar="NAME:KEY=VALUE[,...]",
        help="settings to use instead of tuning, for example kfac:kl_clip=10,damping=0.3",
    )


def _add_problem(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("problem")
    group.add_argument("--batch", type=integer(1), help="images per update")
    group.add_argument(
        "--widths", nargs="+", type=integer(1, _MOST_WIDTH), help="encoder of the autoencoder"
    )
    group.add_argument(
        "--statistics-part", type=integer(1), metavar="K", help="K-FAC's statistics from batch/K"
    )
    group.add_argument(
        "--statistics-every", type=integer(1), default=1, metavar="UPDATES", help="default 1"
    )
    group.add_argument(
        "--refresh-every", type=integer(1), metavar="UPDATES", help="K-FAC's inverses"
    )


def _add_overhead(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cost of an update")
    group.add_argument(
        "--overhead", action="store_true", help="measure SGD beside K-FAC instead of training"
    )
    group.add_argument("--blocks", type=integer(1), default=20)
    group.add_argument("--block-updates", type=integer(1), default=20)
    group.add_argument("--warm-up", type=integer(0), default=20, metavar="UPDATES")


def _check(options: argparse.Namespace) -> None:
    for flag in ("optimizers", "seeds"):
        values = getattr(options, flag)
        if len(set(values)) != len(values):
            raise SupervisedError(f"argument --{flag}: each value may be given once")
    if options.tune_seed in options.seeds:
        raise SupervisedError(
            f"argument --tune-seed: {options.tune_seed} is among --seeds; tune on another one"
        )
    for flag in ("epochs", "fix"):
        for name, _ in getattr(options, flag):
            if name not in options.optimizers:
                raise SupervisedError(
                    f"argument --{flag}: {name!r} is not among the optimizers"
                    f" {', '.join(options.optimizers)}"
                )
    for name, setting in options.fix:
        _check_fixed(options.problem, name, setting)
    try:
        options.device = resolve_device(options.device)
    except ConfigError as error:
        raise SupervisedError(f"argument --device: {error}") from error


def _check_fixed(problem: ProblemName, name: str, setting: Setting) -> None:
    wanted = RECIPES[problem][name].grid[0]
    if setting.keys() != wanted.keys():
        raise SupervisedError(
            f"argument --fix: {name} needs {' and '.join(wanted)}, got {', '.join(setting)}"
        )
    limits = LM[problem]
    if name == "kfac-adaptive" and not limits.minimum <= setting["damping"] <= limits.maximum:
        raise SupervisedError(
            f"argument --fix: damping of {name} must lie in [{limits.minimum:g},"
            f" {limits.maximum:g}], got {setting['damping']:g}"
        )


def _epochs(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, positive(MOST_UPDATES)(value)


def _fixed(text: str) -> tuple[str, Setting]:
    name, _, rest = text.partition(":")
    setting = {}
    for pair in rest.split(","):
        key, _, value = pair.partition("=")
        setting[key] = positive(_MOST_VALUE)(value)
    return name, setting
