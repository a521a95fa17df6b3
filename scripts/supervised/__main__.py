"""From the command line to the results."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from acktr.interrupts import STOPPED, Interrupts, Stopped
from scripts.supervised import data, figure, options, overhead, report, settings
from scripts.supervised.campaign import Campaign, Plan
from scripts.supervised.errors import SupervisedError
from scripts.supervised.problems import Problem, make_problem
from scripts.supervised.runs import RunSpec, describe
from scripts.supervised.steppers import Curvature

BAD_INPUT = 2


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code: 0, 2 bad input, 130 Ctrl-C, 75 SIGTERM."""
    try:
        with Interrupts():
            _run(argv)
    except SupervisedError as error:
        _complain(f"error: {error}")
        return BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        _complain("error: not enough memory: choose smaller --widths or a smaller --batch")
        return BAD_INPUT
    except Stopped as stop:
        _complain("stopped; finished runs are kept, the same command continues")
        return STOPPED[signal.Signals(stop.signum)]
    return 0


def _out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether Python or torch could not allocate; torch has no exception of its own on the CPU."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _complain(text: str) -> None:
    line = "".join(c if c.isprintable() else " " for c in text)
    sys.stderr.write(f"supervised: {line}\n")
    sys.stderr.flush()


def _run(argv: Sequence[str]) -> None:
    chosen = options.parse(argv)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    images = data.load(chosen.data, chosen.problem)
    small = images.built_in
    widths = chosen.widths or (settings.SMALL_WIDTHS if small else settings.WIDTHS)
    problem = make_problem(chosen.problem, images, widths, chosen.device)
    batch = chosen.batch or (settings.SMALL_BATCH if small else settings.BATCH[problem.name])
    if batch > len(problem.train):
        raise SupervisedError(
            f"argument --batch: {batch} is more than the {len(problem.train)} training images"
        )
    command = shlex.join(["python", "-m", "scripts.supervised", *_without_folder(argv)])
    if chosen.overhead:
        _overhead(chosen, problem, batch, command)
        return
    plan = _plan(chosen, problem, batch, images)
    outcome = Campaign(plan, problem, chosen.out).run()
    summary = report.summarize(
        plan, outcome, command=command, data=_about(images), threshold=chosen.threshold
    )
    labels = {name: f"{name} ({describe(found)})" for name, found in outcome.chosen.items()}
    goal = summary["threshold"]["train_loss"]
    title = f"{problem.name}, {images.name}, batch {batch}"
    picture = figure.draw(outcome.runs, labels, goal, title)
    report.write_report(chosen.out, summary, picture)
    sys.stdout.write(report.markdown(summary))


def _without_folder(argv: Sequence[str]) -> list[str]:
    """The arguments with the file name alone after --data; the folder differs between machines."""
    short = list(argv)
    for at, argument in enumerate(argv):
        if argument.startswith("--data="):
            short[at] = f"--data={Path(argument.partition('=')[2]).name}"
        elif at > 0 and argv[at - 1] == "--data":
            short[at] = Path(argument).name
    return short


def _about(images: data.Dataset) -> dict[str, object]:
    return {
        "name": images.name,
        "sha256": images.digest(),
        "train_images": len(images.x_train),
        "test_images": len(images.x_test),
        "shape": list(images.x_train.shape[1:]),
    }


def _curvature(chosen: argparse.Namespace, problem: Problem) -> Curvature:
    constants = settings.KFAC_CONSTANTS[problem.name]
    return Curvature(
        statistics_part=chosen.statistics_part or settings.STATISTICS_PART[problem.name],
        statistics_every=chosen.statistics_every,
        refresh_every=chosen.refresh_every or constants.refresh_interval,
    )


def _plan(chosen: argparse.Namespace, problem: Problem, batch: int, images: data.Dataset) -> Plan:
    per_epoch = len(problem.train) // batch
    epochs = dict(chosen.epochs)
    for name in chosen.optimizers:
        recipe = settings.RECIPES[problem.name][name]
        epochs.setdefault(name, recipe.small_epochs if images.built_in else recipe.epochs)
    base = RunSpec(
        problem=problem.name,
        data=images.digest(),
        widths=problem.widths if problem.name == "autoencoder" else (),
        optimizer="",
        seed=0,
        setting={},
        batch=batch,
        updates=0,
        eval_every=chosen.eval_every or per_epoch,
        device=str(chosen.device),
        curvature=_curvature(chosen, problem),
        constants=settings.kfac_constants(problem.name),
        measured=chosen.measure,
    )
    _check_length(epochs, chosen, per_epoch)
    return Plan(
        optimizers=tuple(chosen.optimizers),
        seeds=tuple(chosen.seeds),
        updates={name: max(1, round(epochs[name] * per_epoch)) for name in chosen.optimizers},
        tune_updates=chosen.tune_updates or max(1, round(chosen.tune_epochs * per_epoch)),
        tune_seed=chosen.tune_seed,
        fixed=dict(chosen.fix),
        updates_per_epoch=per_epoch,
        base=base,
    )


def _check_length(epochs: Mapping[str, float], chosen: argparse.Namespace, per_epoch: int) -> None:
    most = options.MOST_UPDATES / per_epoch
    asked = {f"--epochs: {name}={epochs[name]:g}": epochs[name] for name in chosen.optimizers}
    if chosen.tune_updates is None:
        asked[f"--tune-epochs: {chosen.tune_epochs:g}"] = chosen.tune_epochs
    for what, value in asked.items():
        if value > most:
            raise SupervisedError(
                f"argument {what} epochs of {per_epoch} updates are too many:"
                f" at most {most:g} epochs fit"
            )


def _overhead(chosen: argparse.Namespace, problem: Problem, batch: int, command: str) -> None:
    curvature = _curvature(chosen, problem)
    if chosen.block_updates % curvature.refresh_every:
        raise SupervisedError(
            f"argument --block-updates: {chosen.block_updates} must be a multiple of the"
            f" {curvature.refresh_every} updates between inverses"
        )
    recipes = settings.RECIPES[problem.name]
    fixed = dict(chosen.fix)
    found = overhead.measure(
        problem,
        batch=batch,
        curvature=curvature,
        settings={name: fixed.get(name, recipes[name].grid[0]) for name in ("sgd", "kfac")},
        blocks=chosen.blocks,
        block_updates=chosen.block_updates,
        warm_up=chosen.warm_up,
    )
    overhead.write(chosen.out, found, command)
    sys.stdout.write(overhead.markdown(found, command))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
