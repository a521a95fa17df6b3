"""Race K-FAC against Muon, SOAP, Adam and SGD on one problem, by updates and by CPU seconds.

Every optimizer is tuned on a grid, the same CPU seconds for each setting, on a seed of its own, and
then runs with each seed for the whole time; all in one process on one thread, in turn. CSV
files of every evaluation and a report are written. The same command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from rich.text import Text

from acktr.runs.progress import Display, duration
from scripts.common import (
    ScriptError,
    check_folder,
    command_line,
    complain,
    given_once,
    integer,
    parsed,
    positive,
    run,
    save,
)
from scripts.race import report
from scripts.race.problems import PROBLEMS, Problem, make
from scripts.race.racers import GRIDS, RACERS, Setting, constants, missing
from scripts.race.running import RunSpec, describe, write_rows
from scripts.race.running import run as run_once
from scripts.supervised.training import Row, read_rows

TUNE_SEED = 1000
_MARKS = 3
"""Losses are reported at so many equal parts of the time."""


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code: 0, 2 bad input, 130 Ctrl-C, 75 SIGTERM."""
    note = "finished runs are kept, the same command continues"
    return run("race", lambda _: _race(argv), note)


def _race(argv: Sequence[str]) -> int:
    asked = options(argv)
    check_folder(asked.out)
    torch.set_num_threads(1)
    left_out = {name: package for name in asked.optimizers if (package := missing(name))}
    for name, package in left_out.items():
        complain("race", f"{name} is left out: {package} is not installed")
    names = [name for name in asked.optimizers if name not in left_out]
    if not names:
        raise ScriptError("no optimizer is left")
    problem = make(asked.problem, asked.data)
    race = Race(asked, problem, names)
    tuned, best, runs = race.run()
    shown = [
        Path(word).name if at and argv[at - 1] == "--data" else word for at, word in enumerate(argv)
    ]  # the folder differs between machines
    text = report.markdown(
        problem,
        tuned,
        best,
        runs,
        seconds=[asked.seconds * part / _MARKS for part in range(1, _MARKS + 1)],
        tune_seconds=asked.tune_seconds,
        left_out=left_out,
        command=command_line("race", shown),
    )
    save(asked.out, {"summary.md": text.encode()})
    sys.stdout.write(text)
    return 0


class Race:
    """Tuning and full runs in a folder; finished ones are read, the others made."""

    def __init__(self, asked: argparse.Namespace, problem: Problem, names: Sequence[str]) -> None:
        self._asked, self._problem, self._names = asked, problem, names
        self._display = Display("race", 10.0)
        tuning = sum(len(GRIDS[problem.name][name]) for name in names if self._is_tuned(name))
        runs = len(names) * len(asked.seeds)
        self._total = tuning * asked.tune_seconds + runs * asked.seconds
        self._done = self._made = 0.0
        self._started = time.monotonic()

    def run(
        self,
    ) -> tuple[
        dict[str, list[tuple[Setting, Row]]], dict[str, Setting], dict[tuple[str, int], list[Row]]
    ]:
        """Do what is left to do; tuning runs, chosen settings and full runs.

        Raises:
            ScriptError: A file belongs to another race, or every setting of an optimizer diverged.
        """
        asked, out = self._asked, self._asked.out
        tuned: dict[str, list[tuple[Setting, Row]]] = {}
        best: dict[str, Setting] = {}
        runs: dict[tuple[str, int], list[Row]] = {}
        with closing(self._display):
            for name in self._names:
                grid = GRIDS[self._problem.name][name]
                best[name] = grid[0]
                if self._is_tuned(name):
                    tuned[name] = [
                        (setting, self._do(out / "tune" / name, name, setting, None)[-1])
                        for setting in grid
                    ]
                    best[name], row = min(tuned[name], key=lambda pair: pair[1].train_loss)
                    if not math.isfinite(row.train_loss):
                        raise ScriptError(f"{name}: every setting diverged")
            for seed in asked.seeds:
                for name in self._names:
                    runs[name, seed] = self._do(out / "runs" / name, name, best[name], seed)
        return tuned, best, runs

    def _is_tuned(self, name: str) -> bool:
        return len(GRIDS[self._problem.name][name]) > 1

    def _do(self, folder: Path, name: str, setting: Setting, seed: int | None) -> list[Row]:
        """Read a finished run, or make it and write its file at the end; seed None is tuning."""
        asked, tuning = self._asked, seed is None
        seconds = asked.tune_seconds if tuning else asked.seconds
        spec = RunSpec(
            problem=self._problem.name,
            data=self._problem.data,
            optimizer=name,
            setting=setting,
            constants=constants(name, self._problem.name),
            seed=TUNE_SEED if seed is None else seed,
            batch=self._problem.batch,
            seconds=seconds,
            every=seconds if tuning else asked.every,
        )
        path = folder / f"{describe(setting) if tuning else f'seed{seed}'}.csv"
        label = f"{name} {describe(setting)} {'tuning' if tuning else f'seed {seed}'}"
        rows = read_rows(path, spec)
        if rows is None:

            def show(row: Row) -> None:
                if self._display.due():
                    made = self._made + row.seconds
                    pace = (time.monotonic() - self._started) / max(made, 1e-9)
                    left = max(self._total - self._done - row.seconds, 0.0)
                    line = (
                        f"{label}: update {row.update}, {row.seconds:.0f} of {seconds:g} s,"
                        f" training loss {row.train_loss:.5g}; ETA {duration(left * pace)}"
                    )
                    progress = int(self._done + row.seconds)
                    self._display.show(line, progress, int(self._total), Text(line))

            rows = run_once(spec, self._problem, show)
            write_rows(path, spec, rows)
            self._made += seconds
            last = rows[-1]
            self._display.note(
                f"{label}: training loss {last.train_loss:.5g} after {last.update} updates"
            )
        self._done += seconds
        return rows


def options(argv: Sequence[str]) -> argparse.Namespace:
    """Options of a command line; help is printed and ends in SystemExit.

    Raises:
        ScriptError: One line that says what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m scripts.race", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    add("problem", choices=PROBLEMS)
    what = (
        ".npz with x_train, y_train, x_test, y_test, or for the transformer a text;"
        " without it a small built-in set is used"
    )
    add("--data", type=Path, metavar="FILE", help=what)
    add("--out", type=Path, required=True, help="folder of the results")
    add("--optimizers", nargs="+", choices=RACERS, default=list(RACERS), metavar="NAME")
    add("--seeds", nargs="+", type=integer(0), default=[0, 1, 2], metavar="SEED")
    add("--seconds", type=positive(1e6), default=30.0, help="CPU seconds of a run; default 30")
    what = "CPU seconds of every setting that is tried; default 15"
    add("--tune-seconds", type=positive(1e6), default=15.0, metavar="SECONDS", help=what)
    what = "CPU seconds between evaluations; default 1"
    add("--every", type=positive(1e6), default=1.0, metavar="SECONDS", help=what)
    asked = parsed(parser, argv)
    given_once(asked, "optimizers", "seeds")
    if TUNE_SEED in asked.seeds:
        raise ScriptError(f"argument --seeds: {TUNE_SEED} is the seed of the tuning")
    return asked


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
