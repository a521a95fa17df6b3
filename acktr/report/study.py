"""The numbers of a report: what is compared with what, and every estimate with its interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from acktr.report import statistics as stats
from acktr.report.curves import Floats
from acktr.report.references import Reference, find_reference, normalise
from acktr.report.results import Result
from acktr.report.statistics import Interval

METRICS = {
    "last100": "mean of the last 100 training episodes",
    "eval": "evaluation at the end",
}
"""What is taken as a run's return, and in words."""

AGGREGATES: dict[str, Callable[..., Floats]] = {
    "IQM": stats.iqm,
    "median": stats.median,
    "mean": stats.mean,
    "optimality gap": stats.optimality_gap,
}
"""Statistics of normalised scores over environments; only of the last is less better."""

BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class EnvironmentRow:
    """Returns of one algorithm on one environment."""

    env: str
    label: str
    metric: str
    runs: int
    mean: Interval
    """Over runs."""
    iqm: Interval
    """Over runs."""


@dataclass(frozen=True)
class AggregateRow:
    """A statistic over environments."""

    metric: str
    statistic: str
    label: str
    other: str
    """The label that is compared with; empty if none is."""
    estimate: Interval


@dataclass(frozen=True)
class StepsRow:
    """Steps of one algorithm to one threshold."""

    env: str
    threshold: float
    label: str
    runs: int
    reached: int
    """Runs that reached it."""
    median: float
    """Steps, infinite unless more than half of the runs reached it."""
    ratio: float | None
    """Steps over those of the baseline; None if the baseline's are infinite or missing."""


@dataclass(frozen=True)
class Study:
    """Runs to compare, and how."""

    runs: tuple[Result, ...]
    """Runs of the labels, finished or not; only finished ones are compared."""
    labels: tuple[str, ...]
    """What is compared, in the order of the tables."""
    baseline: str
    """Label whose steps to a threshold are 1."""
    references: Mapping[str, Reference]
    """By environment id or name."""
    resamples: int
    """Bootstrap resamples."""

    @cached_property
    def results(self) -> tuple[Result, ...]:
        """Finished runs."""
        return tuple(run for run in self.runs if run.finished)

    @cached_property
    def unfinished(self) -> tuple[Result, ...]:
        """The other runs."""
        return tuple(run for run in self.runs if not run.finished)

    @cached_property
    def envs(self) -> tuple[str, ...]:
        """Environments of at least one finished run."""
        return tuple(sorted({result.env for result in self.results}))

    @cached_property
    def common(self) -> tuple[str, ...]:
        """Environments of which every label has a run."""
        return tuple(e for e in self.envs if all(self.of(e, label) for label in self.labels))

    @cached_property
    def scored(self) -> dict[str, Reference]:
        """References of the environments of ``common`` that have a low and a high one."""
        pairs = ((env, self.reference(env)) for env in self.common)
        return {env: one for env, one in pairs if one is not None and one.low is not None}

    def reference(self, env: str) -> Reference | None:
        """Of an environment id."""
        return find_reference(self.references, env)

    def of(self, env: str, label: str) -> list[Result]:
        """Runs of one label on one environment, by seed."""
        return [r for r in self.results if r.env == env and r.label == label]

    def returns(self, metric: str, label: str, envs: Sequence[str]) -> dict[str, Floats]:
        """Returns by environment; shape (runs,)."""
        return {
            env: np.array([_return(run, metric) for run in self.of(env, label)]) for env in envs
        }

    def scores(self, metric: str, label: str) -> dict[str, Floats]:
        """Normalised returns on the environments of ``scored``; shape (runs,)."""
        returns = self.returns(metric, label, [*self.scored])
        return {env: normalise(of, self.scored[env]) for env, of in returns.items()}

    def interval(self, statistic: Callable[..., Floats], *scores: Mapping[str, Floats]) -> Interval:
        """A statistic with its bootstrap interval."""
        return stats.interval(statistic, *scores, resamples=self.resamples, seed=BOOTSTRAP_SEED)

    def environment_rows(self) -> list[EnvironmentRow]:
        """Every environment, label and metric."""
        rows = []
        for env in self.envs:
            for label in self.labels:
                for metric in METRICS:
                    of = self.returns(metric, label, [env])
                    if len(of[env]):
                        mean, iqm = self.interval(stats.mean, of), self.interval(stats.iqm, of)
                        rows.append(EnvironmentRow(env, label, metric, len(of[env]), mean, iqm))
        return rows

    def aggregate_rows(self) -> list[AggregateRow]:
        """Aggregates of normalised scores, if any environment has some."""
        if not self.scored:
            return []
        return [
            AggregateRow(
                metric, name, label, "", self.interval(statistic, self.scores(metric, label))
            )
            for metric in METRICS
            for label in self.labels
            for name, statistic in AGGREGATES.items()
        ]

    def improvement_rows(self) -> list[AggregateRow]:
        """Probability that the first of two labels beats the second, for every pair."""
        if not self.common:
            return []
        order = sorted(self.labels, key=lambda label: label != self.baseline)
        rows = []
        for metric in METRICS:
            returns = {label: self.returns(metric, label, self.common) for label in order}
            for x, y in combinations(order, 2):
                better = self.interval(stats.probability_of_improvement, returns[x], returns[y])
                rows.append(AggregateRow(metric, "probability of improvement", x, y, better))
        return rows

    def steps_rows(self) -> list[StepsRow]:
        """Steps to every threshold of the references."""
        rows = []
        for env in self.envs:
            reference = self.reference(env)
            for threshold in () if reference is None else reference.thresholds:
                steps = {label: self._steps(env, label, threshold) for label in self.labels}
                medians = {label: stats.median_steps(of) for label, of in steps.items() if of}
                base = medians.get(self.baseline)
                for label, median in medians.items():
                    ratio = None if base is None else stats.steps_ratio(median, base)
                    reached = sum(step is not None for step in steps[label])
                    runs = len(steps[label])
                    rows.append(StepsRow(env, threshold, label, runs, reached, median, ratio))
        return rows

    def _steps(self, env: str, label: str, threshold: float) -> list[int | None]:
        curves = [run.curve for run in self.of(env, label) if run.curve is not None]
        return [stats.steps_to_threshold(curve, threshold) for curve in curves]


def _return(run: Result, metric: str) -> float:
    assert run.final is not None and run.last100 is not None  # it is finished
    return run.final.mean if metric == "eval" else run.last100
