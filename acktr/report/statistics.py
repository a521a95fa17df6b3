"""Statistics of returns over runs and environments, with bootstrap intervals; pure functions.

Scores are a mapping from environments to arrays of shape (..., runs): the last axis holds the runs
(seeds), earlier ones, if any, are bootstrap resamples. The environments may have different numbers
of runs; each environment counts the same, so that a run of one with n runs weighs 1/n.

Source: Agarwal, Schwarzer, Castro, Courville, Bellemare 2021, "Deep reinforcement learning at the
edge of the statistical precipice" (arXiv:2108.13264), sections 4.1 to 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from acktr.report.curves import Curve, Floats

Scores = Mapping[str, Floats]

LEAST_EPISODES = 10
"""Means over fewer episodes reach no threshold."""

_WEIGHT_CAP = 2**53


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval; three arrays of the same shape, () for one number."""

    value: Floats
    """The statistic of the scores themselves."""
    low: Floats
    """Lower end."""
    high: Floats
    """Upper end."""


def mean(scores: Scores) -> Floats:
    """Mean over environments of the mean over runs; shape (...)."""
    return np.asarray(np.mean(_means(scores), axis=0))


def median(scores: Scores) -> Floats:
    """Median over environments of the mean over runs; shape (...)."""
    return np.median(_means(scores), axis=0)


def iqm(scores: Scores) -> Floats:
    """Interquartile mean over all runs: a quarter of them is cut at either end.

    With R runs in all, floor(R / 4) are cut (as scipy's trim_mean does). Where environments have
    different numbers of runs, each run is first repeated so that all have equally many.

    Returns:
        Shape (...).

    Raises:
        ValueError: if the least common multiple of the numbers of runs is beyond all reason.
    """
    arrays = _arrays(scores)
    repeats = math.lcm(*(array.shape[-1] for array in arrays))
    total = repeats * len(arrays)
    if total > _WEIGHT_CAP:
        raise ValueError("the environments have too many different numbers of runs")
    weights = np.concatenate(
        [np.full(array.shape[-1], repeats // array.shape[-1]) for array in arrays]
    )
    values = np.concatenate(arrays, axis=-1)
    order = np.argsort(values, axis=-1)
    ends = np.cumsum(weights[order], axis=-1)
    cut = total // 4
    # How many of a run's repetitions lie between the cuts.
    kept = np.minimum(ends, total - cut) - np.maximum(ends - weights[order], cut)
    ranked = np.take_along_axis(values, order, axis=-1)
    return np.asarray(np.sum(np.maximum(kept, 0) * ranked, axis=-1) / (total - 2 * cut))


def optimality_gap(scores: Scores, gamma: float = 1.0) -> Floats:
    """How far runs stay below ``gamma``: gamma - mean(min(score, gamma)); shape (...)."""
    return np.asarray(gamma - mean({env: np.minimum(of, gamma) for env, of in scores.items()}))


def probability_of_improvement(x: Scores, y: Scores) -> Floats:
    """Probability that a run of x beats a run of y, averaged over environments.

    Per environment the Mann-Whitney statistic over all pairs, ties counting one half.

    Args:
        x: Scores, environments to shape (..., runs of x).
        y: Scores of the same environments, shape (..., runs of y).

    Returns:
        Shape (...).

    Raises:
        ValueError: if the environments differ.
    """
    if set(x) != set(y):
        raise ValueError(f"different environments: {sorted(x)} and {sorted(y)}")
    wins = []
    for env in x:
        ours, theirs = x[env][..., :, None], y[env][..., None, :]
        wins.append(np.mean((ours > theirs) + 0.5 * (ours == theirs), axis=(-2, -1)))
    return np.asarray(np.mean(wins, axis=0))


def performance_profile(scores: Scores, thresholds: ArrayLike) -> Floats:
    """Share of runs with a score above each threshold (the run-score distribution).

    Args:
        scores: Environments to shape (..., runs).
        thresholds: Shape (thresholds,).

    Returns:
        Shape (..., thresholds).
    """
    taus = np.asarray(thresholds, dtype=np.float64)
    shares = [np.mean(of[..., None] > taus, axis=-2) for of in _arrays(scores)]
    return np.asarray(np.mean(shares, axis=0))


def resample(scores: Scores, count: int, generator: np.random.Generator) -> dict[str, Floats]:
    """Draw runs with replacement, within each environment and independently (stratified).

    Scores of shape (runs,) give resamples of shape (count, runs).
    """
    return {
        env: of[generator.integers(len(of), size=(count, len(of)))] for env, of in scores.items()
    }


def percentile_interval(samples: Floats, level: float = 0.95) -> tuple[Floats, Floats]:
    """Ends of the central interval that holds ``level`` of the samples (first axis)."""
    tail = 50 * (1 - level)
    low, high = np.percentile(samples, [tail, 100 - tail], axis=0)
    return low, high


def interval(
    statistic: Callable[..., Floats],
    *scores: Scores,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> Interval:
    """A statistic and its stratified bootstrap percentile interval.

    With few runs such intervals are too narrow: of five runs with normal returns, the 95 % interval
    of the mean holds the truth about 83 times in 100. With one run they have no width at all.

    Args:
        statistic: Takes as many scores as are given; any leading axes.
        scores: Environments to shape (runs,); each is resampled on its own.
        resamples: Number of bootstrap resamples.
        seed: Of the draws; the same seed gives the same interval.
        level: Share of the resampled statistics in the interval.

    Raises:
        ValueError: if there is no environment, an environment has no run, a score is not finite,
            or ``resamples`` or ``level`` is out of range.
    """
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples must be > 0 and level in (0, 1), got {resamples} and {level}")
    for of in scores:
        arrays = list(of.values())
        if not arrays or any(a.ndim != 1 or not len(a) or not np.isfinite(a).all() for a in arrays):
            raise ValueError("every environment needs at least one run, and finite scores")
    generator = np.random.default_rng(seed)
    drawn = [resample(of, resamples, generator) for of in scores]
    return Interval(statistic(*scores), *percentile_interval(statistic(*drawn), level))


def curve_band(curves: Floats, *, resamples: int, seed: int) -> Interval:
    """Mean of finite curves, shape (runs, points), with a 95 % bootstrap band; shape (points,).

    Whole runs are drawn; the interval is taken at each point by itself.
    """
    runs = len(curves)
    drawn = np.random.default_rng(seed).integers(runs, size=(resamples, runs))
    shares = np.stack([np.mean(drawn == run, axis=1) for run in range(runs)], axis=1)
    return Interval(np.mean(curves, axis=0), *percentile_interval(shares @ curves))


def steps_to_threshold(curve: Curve, threshold: float) -> int | None:
    """First step at which a curve reaches a return, by a mean over enough episodes; else None."""
    reached = (curve.returns >= threshold) & (curve.episodes >= LEAST_EPISODES)
    return int(curve.steps[np.argmax(reached)]) if reached.any() else None


def median_steps(steps: Sequence[int | None]) -> float:
    """Median over runs, None (never) counting as infinity.

    Raises:
        ValueError: if there are no runs.
    """
    if not steps:
        raise ValueError("no runs")
    ranked = sorted(math.inf if value is None else float(value) for value in steps)
    below, above = ranked[(len(ranked) - 1) // 2], ranked[len(ranked) // 2]
    return (below + above) / 2


def steps_ratio(steps: float, baseline: float) -> float | None:
    """How many times the baseline's steps are needed; infinite if only the baseline gets there.

    If the baseline never does, nothing can be said: None.
    """
    return None if math.isinf(baseline) else steps / baseline


def _arrays(scores: Scores) -> list[Floats]:
    if not scores:
        raise ValueError("no environments")
    return [np.asarray(of, dtype=np.float64) for of in scores.values()]


def _means(scores: Scores) -> Floats:
    """Mean over runs; shape (environments, ...)."""
    return np.stack([np.mean(of, axis=-1) for of in _arrays(scores)])
