"""Race K-FAC against Muon, SOAP, Adam and SGD on one problem, by updates and by CPU seconds.

First it is measured what an update of each optimizer costs, in turn on one thread: pace.csv. By
that seconds are charged. Every optimizer is tuned on a grid, the same CPU seconds for each setting,
on a seed of its own, and then runs with each seed for the whole time. CSV files of every evaluation
and a report are written. The same command continues where it was stopped; without pace.csv it
measures the pace again and keeps the runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from scripts import contest
from scripts.common import ScriptError, check_folder, command_line, complain, positive, run, save
from scripts.contest import TUNE_SEED, Contest, Setting
from scripts.race import report
from scripts.race.pace import Pace, measured
from scripts.race.problems import PROBLEMS, Problem, make
from scripts.race.racers import GRIDS, RACERS, constants, missing
from scripts.race.running import RunSpec, write_rows
from scripts.race.running import run as run_once

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
    names = tuple(name for name in asked.optimizers if name not in left_out)
    if not names:
        raise ScriptError("no optimizer is left")
    problem = make(asked.problem, asked.data)
    paces = measured(problem, names, asked.out / "pace.csv", lambda line: complain("race", line))
    plan = RacePlan(problem, names, tuple(asked.seeds), asked.seconds, asked.tune_seconds, paces)
    race = Contest(
        "race", plan, asked.out, lambda spec, tell: run_once(spec, problem, tell), write_rows
    )
    text = report.markdown(
        problem,
        race.run(),
        paces=paces,
        seconds=[asked.seconds * part / _MARKS for part in range(1, _MARKS + 1)],
        tune_seconds=asked.tune_seconds,
        left_out=left_out,
        command=command_line("race", contest.shown(argv)),
    )
    save(asked.out, {"summary.md": text.encode()})
    sys.stdout.write(text)
    return 0


@dataclass(frozen=True)
class RacePlan:
    """The runs of a race: so many charged CPU seconds each."""

    problem: Problem
    optimizers: tuple[str, ...]
    seeds: tuple[int, ...]
    seconds: float
    tune_seconds: float
    paces: Mapping[str, Pace]

    def tuning_specs(self, name: str) -> list[RunSpec]:
        """A run for every setting; none where there is only one."""
        grid = GRIDS[self.problem.name][name]
        specs = [self._spec(name, TUNE_SEED, setting, self.tune_seconds) for setting in grid]
        return specs if len(specs) > 1 else []

    def full_spec(self, name: str, seed: int, setting: Setting) -> RunSpec:
        """A full run."""
        return self._spec(name, seed, setting, self.seconds)

    def _spec(self, name: str, seed: int, setting: Setting, seconds: float) -> RunSpec:
        return RunSpec(
            problem=self.problem.name,
            data=self.problem.data,
            optimizer=name,
            setting=setting,
            constants=constants(name, self.problem.name),
            seed=seed,
            batch=self.problem.batch,
            seconds=seconds,
            pace=self.paces[name],
        )


def options(argv: Sequence[str]) -> argparse.Namespace:
    """Options of a command line; help is printed and ends in SystemExit.

    Raises:
        ScriptError: One line that says what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m scripts.race", description=__doc__, allow_abbrev=False
    )
    what = ".npz with x_train, y_train, x_test, y_test, or for the transformer a text"
    contest.add_options(parser, PROBLEMS, RACERS, what)
    add = parser.add_argument
    add("--seconds", type=positive(1e6), default=30.0, help="CPU seconds of a run; default 30")
    what = "CPU seconds of every setting that is tried; default 15"
    add("--tune-seconds", type=positive(1e6), default=15.0, metavar="SECONDS", help=what)
    return contest.options(parser, argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
