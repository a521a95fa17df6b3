"""Tuning and full runs, one after another, with everything finished kept."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.text import Text

from acktr.runs.progress import Display, pace, share
from scripts.common import ScriptError
from scripts.supervised.problems import Problem
from scripts.supervised.settings import RECIPES, TUNE_SEED, Curvature, Setting, constants
from scripts.supervised.training import Row, RunSpec, describe, read_rows, train, write_rows


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a campaign consists of."""

    optimizers: tuple[str, ...]
    seeds: tuple[int, ...]
    updates: Mapping[str, int]
    """Updates of a full run, by optimizer."""
    tune_updates: int
    """Updates of a tuning run, the same for all optimizers and settings."""
    updates_per_epoch: int
    base: RunSpec
    """Fields that all runs share; the others are replaced."""

    def tuning_specs(self, name: str) -> list[RunSpec]:
        """The tuning runs of an optimizer, which are evaluated at their end alone."""
        return [
            self._spec(name, TUNE_SEED, setting, self.tune_updates, self.tune_updates)
            for setting in RECIPES[self.base.problem][name].grid
        ]

    def full_spec(self, name: str, seed: int, setting: Setting) -> RunSpec:
        """A full run."""
        return self._spec(name, seed, setting, self.updates[name], self.base.eval_every)

    def _spec(self, name: str, seed: int, setting: Setting, updates: int, every: int) -> RunSpec:
        return replace(
            self.base,
            optimizer=name,
            seed=seed,
            setting=setting,
            updates=updates,
            eval_every=every,
            curvature=Curvature() if name.startswith("kfac") else None,
            constants=constants(self.base.problem, name),
        )


@dataclass
class Outcome:
    """What a campaign found."""

    tuning: dict[str, list[tuple[Setting, Row]]] = field(default_factory=dict)
    """Setting and last evaluation of every tuning run, by optimizer."""
    settings: dict[str, Setting] = field(default_factory=dict)
    """Setting of the full runs, by optimizer."""
    runs: dict[tuple[str, int], list[Row]] = field(default_factory=dict)
    """Evaluations of every full run, by optimizer and seed."""


class Campaign:
    """Runs a plan in a folder; finished runs are read, the others made."""

    def __init__(self, plan: Plan, problem: Problem, out: Path) -> None:
        self._plan, self._problem, self._out = plan, problem, out
        self._display = Display("supervised", 10.0)
        grids = {name: len(plan.tuning_specs(name)) for name in plan.optimizers}
        self._total = sum(
            count * plan.tune_updates + len(plan.seeds) * plan.updates[name]
            for name, count in grids.items()
        )
        self._done = self._made = 0
        self._started = time.monotonic()

    def run(self) -> Outcome:
        """Do what is left to do.

        Raises:
            ScriptError: A file in the folder belongs to another campaign or cannot be written,
                or every setting of an optimizer diverged.
        """
        plan, outcome = self._plan, Outcome()
        with closing(self._display):
            for name in plan.optimizers:
                folder = self._out / "tune" / name
                outcome.tuning[name] = [
                    (spec.setting, self._do(folder / f"{describe(spec.setting)}.csv", spec)[-1])
                    for spec in plan.tuning_specs(name)
                ]
                outcome.settings[name] = self._best(name, outcome)
            for seed in plan.seeds:
                for name in plan.optimizers:
                    spec = plan.full_spec(name, seed, outcome.settings[name])
                    path = self._out / "runs" / name / f"seed{seed}.csv"
                    outcome.runs[name, seed] = self._do(path, spec)
        return outcome

    def _best(self, name: str, outcome: Outcome) -> Setting:
        """The setting with the lowest training loss at the end of the tuning budget."""
        setting, best = min(outcome.tuning[name], key=lambda pair: pair[1].train_loss)
        if not math.isfinite(best.train_loss):
            raise ScriptError(
                f"{name}: every setting diverged within {self._plan.tune_updates} updates"
            )
        self._display.note(
            f"{name}: {describe(setting)} chosen, training loss {best.train_loss:.5g}"
            f" after {best.update} updates"
        )
        return setting

    def _do(self, path: Path, spec: RunSpec) -> list[Row]:
        """Read a finished run, or make it and write its file at the end."""
        rows = read_rows(path, spec)
        if rows is None:
            rows = self._make(path, spec)
        self._done += spec.updates
        return rows

    def _make(self, path: Path, spec: RunSpec) -> list[Row]:
        label = f"{spec.optimizer} seed {spec.seed} {describe(spec.setting)}"

        def report(rows: list[Row], update: int) -> None:
            self._made += 1
            if self._display.due():
                done = self._done + update
                speed = self._made / (time.monotonic() - self._started)
                line = (
                    f"{label}  update {update:,}/{spec.updates:,}  training loss"
                    f" {rows[-1].train_loss:.5g}  all updates {share(done, self._total)}"
                    f"  ETA {pace(done, self._total, speed)[1]}"
                )
                self._display.show(line, done, self._total, Text(line))

        rows = train(spec, self._problem, report)
        write_rows(path, spec, rows, self._plan.updates_per_epoch)
        self._display.note(
            f"{label}: training loss {rows[-1].train_loss:.5g}, test loss {rows[-1].test_loss:.5g},"
            f" {rows[-1].update} updates in {rows[-1].seconds:.1f} s"
        )
        return rows
