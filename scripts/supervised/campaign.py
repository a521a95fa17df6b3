"""Tuning and full runs, one after another, with everything finished kept."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from scripts.supervised.errors import SupervisedError
from scripts.supervised.problems import Problem
from scripts.supervised.progress import Progress, Tracker
from scripts.supervised.runs import (
    Row,
    RunSpec,
    describe,
    is_finished,
    read_rows,
    train,
    write_rows,
)
from scripts.supervised.settings import RECIPES, Setting, adaptive_constants


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


@dataclass
class Outcome:
    """What a campaign found."""

    tuning: dict[str, list[tuple[Setting, Row]]] = field(default_factory=dict)
    """Setting and last evaluation of every tuning run, by optimizer."""
    chosen: dict[str, Setting] = field(default_factory=dict)
    runs: dict[tuple[str, int], list[Row]] = field(default_factory=dict)
    """Evaluations of every full run, by optimizer and seed."""


class Campaign:
    """Runs a plan in a folder; finished runs are read, the others made."""

    def __init__(self, plan: Plan, problem: Problem, out: Path) -> None:
        self._plan, self._problem, self._out = plan, problem, out
        self._tracker = Tracker()
        self._progress = Progress(self._tracker)

    def run(self) -> Outcome:
        """Do what is left to do.

        Raises:
            SupervisedError: A file in the folder belongs to another campaign or cannot be written,
                or every setting of an optimizer diverged.
        """
        self._estimate()
        outcome = Outcome()
        try:
            for name in self._plan.optimizers:
                outcome.chosen[name] = self._tune(name, outcome)
            for seed in self._plan.seeds:
                for name in self._plan.optimizers:
                    path, spec = self._full(name, seed, outcome.chosen[name])
                    outcome.runs[name, seed] = self._do(path, spec)
        finally:
            self._progress.close()
        return outcome

    def _estimate(self) -> None:
        """Tell the tracker what is left."""
        for name in self._plan.optimizers:
            for path, spec in self._candidates(name):
                if read_rows(path, spec) is None:
                    self._tracker.plan(name, spec.updates)
            for seed in self._plan.seeds:
                if not is_finished(self._run_path(name, seed)):
                    self._tracker.plan(name, self._plan.updates[name])

    def _tune(self, name: str, outcome: Outcome) -> Setting:
        """The setting with the lowest training loss at the end of the tuning budget."""
        if name in self._plan.fixed:
            return self._plan.fixed[name]
        found = [(spec.setting, self._do(path, spec)[-1]) for path, spec in self._candidates(name)]
        outcome.tuning[name] = found
        setting, best = min(found, key=lambda pair: pair[1].train_loss)
        if not math.isfinite(best.train_loss):
            raise SupervisedError(
                f"{name}: every setting diverged within {self._plan.tune_updates} updates"
            )
        self._progress.note(
            f"{name}: {describe(setting)} chosen, training loss {best.train_loss:.5g}"
            f" after {best.update} updates"
        )
        return setting

    def _candidates(self, name: str) -> Sequence[tuple[Path, RunSpec]]:
        """File and description of the tuning runs of an optimizer."""
        if name in self._plan.fixed:
            return []
        updates = self._plan.tune_updates
        folder = self._out / "tune" / name
        return [
            (
                folder / f"{describe(setting)}.csv",
                self._spec(name, self._plan.tune_seed, setting, updates, updates),
            )
            for setting in RECIPES[self._problem.name][name].grid
        ]

    def _full(self, name: str, seed: int, setting: Setting) -> tuple[Path, RunSpec]:
        updates, every = self._plan.updates[name], self._plan.base.eval_every
        return self._run_path(name, seed), self._spec(name, seed, setting, updates, every)

    def _run_path(self, name: str, seed: int) -> Path:
        return self._out / "runs" / name / f"seed{seed}.csv"

    def _spec(self, name: str, seed: int, setting: Setting, updates: int, every: int) -> RunSpec:
        kfac = name.startswith("kfac")
        return replace(
            self._plan.base,
            optimizer=name,
            seed=seed,
            setting=setting,
            updates=updates,
            eval_every=every,
            curvature=self._plan.base.curvature if kfac else None,
            constants=self._constants(name),
        )

    def _constants(self, name: str) -> dict[str, object]:
        """What the settings module fixes for an optimizer, to tell runs apart by."""
        if not name.startswith("kfac"):
            return {}
        if name == "kfac-adaptive":
            adaptive = adaptive_constants(self._problem.name)
            return {**self._plan.base.constants, "adaptive": adaptive}
        return self._plan.base.constants

    def _do(self, path: Path, spec: RunSpec) -> list[Row]:
        """Read a finished run or make it; the file has another name until the end."""
        rows = read_rows(path, spec)
        if rows is not None:
            return rows
        part = path.with_suffix(".part")
        label = f"{spec.optimizer} seed {spec.seed} {describe(spec.setting)}"
        written = 0
        last = time.monotonic()

        def report(rows: list[Row], update: int) -> None:
            nonlocal written, last
            now = time.monotonic()
            self._tracker.add(spec.optimizer, 1, now - last)
            last = now
            if len(rows) > written:
                write_rows(part, spec, rows, self._plan.updates_per_epoch)
                written = len(rows)
            self._progress.update(label, update, spec.updates, rows[-1].train_loss)

        rows = train(spec, self._problem, report)
        self._tracker.plan(spec.optimizer, rows[-1].update - spec.updates)
        write_rows(path, spec, rows, self._plan.updates_per_epoch)
        part.unlink(missing_ok=True)
        self._progress.note(
            f"{label}: training loss {rows[-1].train_loss:.5g}, test loss {rows[-1].test_loss:.5g},"
            f" {rows[-1].update} updates in {rows[-1].seconds:.1f} s"
        )
        return rows
