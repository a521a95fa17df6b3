"""The runs that a comparison consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from scripts.contest import TUNE_SEED, Contest, Outcome, Setting
from scripts.supervised.problems import Problem
from scripts.supervised.settings import RECIPES, Curvature, constants
from scripts.supervised.training import RunSpec, train, write_rows


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The runs of a comparison: so many updates each."""

    optimizers: tuple[str, ...]
    seeds: tuple[int, ...]
    updates: Mapping[str, int]
    """Updates of a full run, by optimizer."""
    tune_updates: int
    """Updates of a tuning run, the same for all optimizers and settings."""
    updates_per_epoch: int
    base: RunSpec
    """Fields that all runs share; the others are replaced."""
    grids: Mapping[str, tuple[Setting, ...]] = field(default_factory=dict)
    """Settings to choose from, of optimizers that do not take those of their recipe."""

    def tuning_specs(self, name: str) -> list[RunSpec]:
        """The tuning runs of an optimizer, evaluated at their end alone unless there is a goal."""
        every = self.tune_updates if self.base.goal is None else self.base.eval_every
        return [
            self._spec(name, TUNE_SEED, setting, self.tune_updates, every)
            for setting in self.grids.get(name, RECIPES[self.base.problem][name].grid)
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


def compete(name: str, plan: Plan, out: Path, problem: Problem) -> Outcome:
    """Tune and train all that a plan asks for, in a folder; what is finished is kept.

    Args:
        name: What lines of progress begin with.
        plan: The campaign.
        out: Its folder.
        problem: What is trained on.
    """
    return Contest(
        name,
        plan,
        out,
        lambda spec, tell: train(spec, problem, tell),
        lambda path, spec, rows: write_rows(path, spec, rows, plan.updates_per_epoch),
        plan.base.goal,
    ).run()
