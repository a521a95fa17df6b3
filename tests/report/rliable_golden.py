"""Numbers of rliable 1.2.0 that the tests of the statistics compare with.

They were computed once, by this module in an environment of its own, and are kept in rliable.csv:

    pip install rliable==1.2.0 "pandas<3" && python -m tests.report.rliable_golden
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Key = tuple[str, ...]

KEPT = Path(__file__).with_name("rliable.csv")
SHAPES = [(5, 8), (3, 1), (1, 4), (10, 3), (4, 26), (7, 7)]
GAMMAS = (0.5, 1.0, 2.0)
PAIRS_OF_RUNS = [(5, 5), (3, 10), (1, 1), (1, 6)]
TAUS = np.linspace(-0.5, 2, 26)  # many scores are equal to a threshold
SEEDS = range(20)
SAME_RESAMPLES, OTHER_RESAMPLES = 400, 2000


def matrix(runs: int, envs: int, seed: int = 0) -> Floats:
    """Scores (runs, environments) with ties."""
    return np.random.default_rng(seed).normal(0.7, 0.5, (runs, envs)).round(1)


def two_algorithms() -> Floats:
    return np.random.default_rng(5).normal(0.6, 0.4, (2, 10, 6))


def golden() -> dict[Key, list[float]]:
    """The kept numbers, by statistic and case."""
    with KEPT.open(newline="") as file:
        rows = [row for row in csv.reader(file) if not row[0].startswith("#")]
    return {(name, *case.split()): [float(v) for v in values] for name, case, *values in rows}


def computed() -> Iterator[list[object]]:
    """Rows of the file: statistic, case, numbers."""
    from rliable import library, metrics

    four: dict[str, Callable[..., float]] = {
        "mean": metrics.aggregate_mean,
        "median": metrics.aggregate_median,
        "iqm": metrics.aggregate_iqm,
        "optimality gap": metrics.aggregate_optimality_gap,
    }
    for name, statistic in four.items():
        for runs, envs in SHAPES:
            values = [float(statistic(matrix(runs, envs, seed))) for seed in SEEDS]
            yield [name, f"{runs} {envs}", *values]
    for gamma in GAMMAS:
        yield ["gamma", f"{gamma}", float(metrics.aggregate_optimality_gap(matrix(5, 6), gamma))]
    for ours, theirs in PAIRS_OF_RUNS:
        yield [
            "improvement",
            f"{ours} {theirs}",
            *(
                float(
                    metrics.probability_of_improvement(
                        matrix(ours, 6, seed), matrix(theirs, 6, seed + 100)
                    )
                )
                for seed in SEEDS
            ),
        ]
    yield ["profile", "", *library.score_distributions(matrix(5, 8), TAUS).tolist()]

    def all_four(of: Floats) -> Floats:
        return np.array([statistic(of) for statistic in four.values()])

    # rliable draws from the global generator.
    np.random.seed(3)  # noqa: NPY002
    bootstrap = library.StratifiedBootstrap(matrix(5, 4))
    ends = bootstrap.conf_int(all_four, reps=SAME_RESAMPLES, size=0.95, method="percentile")
    for end, values in zip(("low", "high"), ends.tolist(), strict=True):
        yield ["same resamples", end, *values]
    np.random.seed(3)  # noqa: NPY002
    bootstrap = library.StratifiedBootstrap(matrix(5, 4))
    for number, data in enumerate(bootstrap.bootstrap(SAME_RESAMPLES)):
        yield ["resample", f"{number}", *data[0][0].ravel().tolist()]

    def five(a: Floats, b: Floats) -> Floats:
        return np.array([*all_four(a), metrics.probability_of_improvement(a, b)])

    x, y = two_algorithms()
    np.random.seed(0)  # noqa: NPY002
    _, intervals = library.get_interval_estimates({"pair": [x, y]}, five, reps=OTHER_RESAMPLES)
    yield ["other resamples", "value", *five(x, y).tolist()]
    for end, values in zip(("low", "high"), intervals["pair"].tolist(), strict=True):
        yield ["other resamples", end, *values]


if __name__ == "__main__":
    with KEPT.open("w", newline="") as file:
        file.write("# Made with rliable 1.2.0 by: python -m tests.report.rliable_golden\n")
        csv.writer(file, lineterminator="\n").writerows(computed())
