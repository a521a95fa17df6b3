"""Tuning and full runs, one after another, with everything finished kept."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.text import Text

from acktr.runs.progress import Display
from scripts.common import ScriptError, TimeLeft
from scripts.supervised.problems import Problem
from scripts.supervised.settings import RECIPES, Setting, constants
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
    tune_seed: int
    fixed: Mapping[str, Setting]
    """Settings that are given, by optimizer; the other optimizers are tuned."""
    updates_per_epoch: int
    base: RunSpec
    """Fields that all runs share; the others are replaced."""

    def tuning_spec(self, name: str, setting: Setting) -> RunSpec:
        """A tuning run, which is evaluated at its end alone."""
        return self._spec(name, self.tune_seed, setting, self.tune_updates, self.tune_updates)

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
            curvature=self.base.curvature if name.startswith("kfac") else None,
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
        self._left = TimeLeft(self._planned())

    def run(self) -> Outcome:
        """Do what is left to do.

        Raises:
            ScriptError: A file in the folder belongs to another campaign or cannot be written,
                or every setting of an optimizer diverged.
        """
        plan, outcome = self._plan, Outcome()
        with closing(self._display):
            for name in plan.optimizers:
                outcome.settings[name] = self._tune(name, outcome)
            for seed in plan.seeds:
                for name in plan.optimizers:
                    spec = plan.full_spec(name, seed, outcome.settings[name])
                    outcome.runs[name, seed] = self._do(self._run_path(name, seed), spec)
        return outcome

    def _planned(self) -> dict[str, float]:
        """Updates that are left, by optimizer."""
        planned: dict[str, float] = {}
        for name in self._plan.optimizers:
            tuning = [
                spec.updates
                for path, spec in self._candidates(name)
                if read_rows(path, spec) is None
            ]
            runs = [s for s in self._plan.seeds if not self._run_path(name, s).exists()]
            planned[name] = sum(tuning) + len(runs) * self._plan.updates[name]
        return planned

    def _tune(self, name: str, outcome: Outcome) -> Setting:
        """The setting with the lowest training loss at the end of the tuning budget."""
        if name in self._plan.fixed:
            return self._plan.fixed[name]
        tried = [(spec.setting, self._do(path, spec)[-1]) for path, spec in self._candidates(name)]
        outcome.tuning[name] = tried
        setting, best = min(tried, key=lambda pair: pair[1].train_loss)
        if not math.isfinite(best.train_loss):
            raise ScriptError(
                f"{name}: every setting diverged within {self._plan.tune_updates} updates"
            )
        self._display.note(
            f"{name}: {describe(setting)} chosen, training loss {best.train_loss:.5g}"
            f" after {best.update} updates"
        )
        return setting

    def _candidates(self, name: str) -> list[tuple[Path, RunSpec]]:
        """File and description of the tuning runs of an optimizer."""
        grid = () if name in self._plan.fixed else RECIPES[self._problem.name][name].grid
        specs = [self._plan.tuning_spec(name, setting) for setting in grid]
        folder = self._out / "tune" / name
        return [(folder / f"{describe(spec.setting)}.csv", spec) for spec in specs]

    def _run_path(self, name: str, seed: int) -> Path:
        return self._out / "runs" / name / f"seed{seed}.csv"

    def _do(self, path: Path, spec: RunSpec) -> list[Row]:
        """Read a finished run, or make it and write its file at the end."""
        rows = read_rows(path, spec)
        if rows is not None:
            return rows
        label = f"{spec.optimizer} seed {spec.seed} {describe(spec.setting)}"
        last = time.monotonic()

        def report(rows: list[Row], update: int) -> None:
            nonlocal last
            now = time.monotonic()
            self._left.add(spec.optimizer, 1, now - last)
            last = now
            if self._display.due():
                line = (
                    f"{label}  update {update:,}/{spec.updates:,}  training loss"
                    f" {rows[-1].train_loss:.5g}  all runs {self._left.share:.1%}  ETA {self._left}"
                )
                self._display.show(line, round(1000 * self._left.share), 1000, Text(line))

        rows = train(spec, self._problem, report)
        self._left.drop(spec.optimizer, spec.updates - rows[-1].update)
        write_rows(path, spec, rows, self._plan.updates_per_epoch)
        self._display.note(
            f"{label}: training loss {rows[-1].train_loss:.5g}, test loss {rows[-1].test_loss:.5g},"
            f" {rows[-1].update} updates in {rows[-1].seconds:.1f} s"
        )
        return rows
