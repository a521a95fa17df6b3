"""The statistics against rliable and against their definitions written out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from acktr.report import statistics as stats
from acktr.report.curves import Curve
from tests.report.rliable_golden import (
    GAMMAS,
    OTHER_RESAMPLES,
    PAIRS_OF_RUNS,
    SAME_RESAMPLES,
    SEEDS,
    SHAPES,
    TAUS,
    golden,
    matrix,
    two_algorithms,
)

Floats = NDArray[np.float64]

GOLDEN = golden()
STATISTICS = {
    "mean": stats.mean,
    "median": stats.median,
    "iqm": stats.iqm,
    "optimality gap": stats.optimality_gap,
}


def by_env(scores: Floats) -> dict[str, Floats]:
    """The last two axes (runs, environments) as this package takes them."""
    return {f"env{i}": scores[..., i] for i in range(scores.shape[-1])}


def ragged(seed: int = 0) -> dict[str, Floats]:
    generator = np.random.default_rng(seed)
    return {env: generator.normal(size=n).round(1) for env, n in (("a", 2), ("b", 5), ("c", 3))}


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_estimates_are_rliables(name: str, shape: tuple[int, int]) -> None:
    found = [float(STATISTICS[name](by_env(matrix(*shape, seed=seed)))) for seed in SEEDS]
    np.testing.assert_allclose(found, GOLDEN[name, *map(str, shape)], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", STATISTICS)
def test_leading_axes_are_resamples(name: str) -> None:
    ours = STATISTICS[name]
    many = np.random.default_rng(1).normal(size=(6, 5, 4))
    found = ours(by_env(many))
    assert found.shape == (6,)
    np.testing.assert_array_equal(found, [float(ours(by_env(one))) for one in many])


@pytest.mark.parametrize("gamma", GAMMAS)
def test_optimality_gap_of_another_gamma(gamma: float) -> None:
    found = float(stats.optimality_gap(by_env(matrix(5, 6)), gamma))
    assert found == pytest.approx(GOLDEN["gamma", str(gamma)][0], abs=1e-13)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS_OF_RUNS)
def test_probability_of_improvement_is_rliables(ours: int, theirs: int) -> None:
    expected = GOLDEN["improvement", str(ours), str(theirs)]
    for seed in SEEDS:
        x, y = by_env(matrix(ours, 6, seed)), by_env(matrix(theirs, 6, seed + 100))
        found = float(stats.probability_of_improvement(x, y))
        assert found == pytest.approx(expected[seed], abs=1e-13)


def test_probability_of_improvement_by_counting() -> None:
    x, y = ragged(1), ragged(2)
    per_env = []
    for env in x:
        wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in x[env] for b in y[env]]
        per_env.append(sum(wins) / len(wins))
    found = float(stats.probability_of_improvement(x, y))
    assert found == pytest.approx(sum(per_env) / 3, abs=1e-14)
    assert found + float(stats.probability_of_improvement(y, x)) == pytest.approx(1, abs=1e-14)
    assert float(stats.probability_of_improvement(x, x)) == 0.5
    with pytest.raises(ValueError, match="different environments"):
        stats.probability_of_improvement(x, {"a": y["a"]})


def test_performance_profile_is_rliables() -> None:
    scores = matrix(5, 8)
    found = stats.performance_profile(by_env(scores), TAUS)
    np.testing.assert_allclose(found, GOLDEN[("profile",)], atol=1e-14)
    assert (np.diff(found) <= 0).all()
    many = stats.performance_profile(by_env(np.stack([scores, scores + 1])), TAUS)
    np.testing.assert_array_equal(many[0], found)
    assert many.shape == (2, 26)


class TestRaggedRuns:
    """Each environment counts the same, whatever its number of runs."""

    def test_mean_median_gap_and_profile(self) -> None:
        scores = ragged()
        means = [sum(of) / len(of) for of in scores.values()]
        assert float(stats.mean(scores)) == pytest.approx(sum(means) / 3, abs=1e-14)
        assert float(stats.median(scores)) == pytest.approx(sorted(means)[1], abs=1e-14)
        gaps = [sum(1 - min(1, s) for s in of) / len(of) for of in scores.values()]
        assert float(stats.optimality_gap(scores)) == pytest.approx(sum(gaps) / 3, abs=1e-14)
        above = [sum(s > 0.1 for s in of) / len(of) for of in scores.values()]
        found = stats.performance_profile(scores, [0.1])
        assert float(found[0]) == pytest.approx(sum(above) / 3, abs=1e-14)

    @pytest.mark.parametrize("seed", range(10))
    def test_iqm_is_the_trimmed_mean_of_repeated_runs(self, seed: int) -> None:
        scores = ragged(seed)
        equal = np.concatenate([np.repeat(of, 30 // len(of)) for of in scores.values()])
        expected = scipy.stats.trim_mean(equal, 0.25)
        assert float(stats.iqm(scores)) == pytest.approx(expected, abs=1e-13)

    def test_iqm_by_hand(self) -> None:
        scores = {"a": np.array([5.0, 1.0, 9.0, 100.0, -50.0])}
        assert float(stats.iqm(scores)) == 5.0  # one of five is cut at either end
        assert float(stats.iqm({"a": scores["a"][:3]})) == 5.0  # nothing is cut
        # Each run of a counts as two of b: of 0, 0, 1, 2, 3, 10, 10, 20 the middle four are taken.
        both = {"a": np.array([0.0, 10.0]), "b": np.array([1.0, 2.0, 3.0, 20.0])}
        assert float(stats.iqm(both)) == 4.0

    def test_too_many_different_counts(self) -> None:
        primes = [p for p in range(2, 60) if all(p % q for q in range(2, p))]
        with pytest.raises(ValueError, match="too many different numbers of runs"):
            stats.iqm({str(p): np.zeros(p) for p in primes})

    def test_no_environments(self) -> None:
        for statistic in STATISTICS.values():
            with pytest.raises(ValueError, match="no environments"):
                statistic({})


class TestIntervals:
    def test_of_the_same_resamples_they_are_rliables(self) -> None:
        drawn = np.array([GOLDEN["resample", str(k)] for k in range(SAME_RESAMPLES)])
        drawn = drawn.reshape(SAME_RESAMPLES, 5, 4)
        assert all(set(drawn[..., k].flat) == set(matrix(5, 4)[:, k]) for k in range(4))
        expected = np.array([GOLDEN["same resamples", end] for end in ("low", "high")])
        for column, statistic in enumerate(STATISTICS.values()):
            low, high = stats.percentile_interval(statistic(by_env(drawn)))
            np.testing.assert_allclose([low, high], expected[:, column], atol=1e-12)

    def test_of_other_resamples_they_are_rliables_up_to_chance(self) -> None:
        """Ends differ by at most five standard errors of an estimated quantile.

        A quantile p of B draws has the standard error sqrt(p (1 - p) / B) / density; the density of
        a normal distribution with the bootstrap's deviation is taken, and B is rliable's.
        """
        x, y = two_algorithms()

        def ours(a: stats.Scores, b: stats.Scores) -> Floats:
            each = [statistic(a) for statistic in STATISTICS.values()]
            return np.stack([*each, stats.probability_of_improvement(a, b)], axis=-1)

        value, low, high = (GOLDEN["other resamples", name] for name in ("value", "low", "high"))
        found = stats.interval(ours, by_env(x), by_env(y), resamples=40_000, seed=0)
        deviation = (found.high - found.low) / (2 * 1.96)
        error = np.sqrt(0.025 * 0.975 / OTHER_RESAMPLES) / scipy.stats.norm.pdf(1.96)
        tolerance = 5 * error * deviation
        assert (tolerance < 0.15 * (found.high - found.low)).all()
        assert (np.abs(found.low - low) < tolerance).all()
        assert (np.abs(found.high - high) < tolerance).all()
        np.testing.assert_allclose(found.value, value, atol=1e-13)

    def test_resamples_stay_in_their_environment_and_are_independent(self) -> None:
        scores = {"a": np.array([0.0, 1.0]), "b": np.array([10.0, 20.0])}
        count = 40_000
        drawn = stats.resample(scores, count, np.random.default_rng(0))
        rows = np.concatenate([drawn["a"], drawn["b"]], axis=1)
        outcomes, seen = np.unique(rows, axis=0, return_counts=True)
        expected = list(itertools.product([0.0, 1.0], [0.0, 1.0], [10.0, 20.0], [10.0, 20.0]))
        assert [tuple(row) for row in outcomes] == expected
        chi_square = float(np.sum((seen - count / 16) ** 2 / (count / 16)))
        assert chi_square < scipy.stats.chi2.ppf(0.9999, 15)

    def test_exact_bootstrap_of_two_runs(self) -> None:
        """The mean of a resample of 0 and 1 is 0, 1/2 or 1 with odds 1, 2, 1."""
        scores = {"a": np.array([0.0, 1.0])}
        found = stats.interval(stats.mean, scores, resamples=4000, seed=1)
        assert (float(found.value), float(found.low), float(found.high)) == (0.5, 0.0, 1.0)
        middle = stats.interval(stats.mean, scores, resamples=4000, seed=1, level=0.4)
        assert (float(middle.low), float(middle.high)) == (0.5, 0.5)

    def test_seed_decides(self) -> None:
        scores = by_env(matrix(5, 3))
        one, same, other = (
            stats.interval(stats.mean, scores, resamples=200, seed=seed) for seed in (1, 1, 2)
        )
        assert (one.low, one.high) == (same.low, same.high) != (other.low, other.high)

    def test_one_run_has_no_width(self) -> None:
        found = stats.interval(stats.iqm, {"a": np.array([3.0])}, resamples=50, seed=0)
        assert float(found.value) == float(found.low) == float(found.high) == 3.0

    @pytest.mark.parametrize(
        "scores",
        [{}, {"a": np.array([])}, {"a": np.array([1.0, np.nan])}, {"a": np.zeros((2, 2))}],
    )
    def test_scores_that_are_refused(self, scores: dict[str, Floats]) -> None:
        with pytest.raises(ValueError, match="at least one run, and finite scores"):
            stats.interval(stats.mean, scores, resamples=10, seed=0)

    @pytest.mark.parametrize(("resamples", "level"), [(0, 0.95), (10, 0.0), (10, 1.0)])
    def test_settings_that_are_refused(self, resamples: int, level: float) -> None:
        with pytest.raises(ValueError, match="resamples must be > 0"):
            stats.interval(stats.mean, ragged(), resamples=resamples, seed=0, level=level)

    def test_coverage_that_the_text_of_reports_states(self) -> None:
        """Of five normal returns about 83 of 100 intervals hold the mean (5 standard errors)."""
        generator, trials = np.random.default_rng(0), 1500
        held = 0
        for trial in range(trials):
            scores = {"a": generator.normal(size=5)}
            found = stats.interval(stats.mean, scores, resamples=500, seed=trial)
            held += bool(found.low <= 0 <= found.high)
        assert abs(held / trials - 0.83) < 5 * math.sqrt(0.83 * 0.17 / trials)


class TestCurves:
    def test_band_is_the_interval_of_each_point(self) -> None:
        curves = np.random.default_rng(0).normal(size=(5, 7)).cumsum(axis=1)
        band = stats.curve_band(curves, resamples=500, seed=4)
        for point in range(7):
            found = stats.interval(stats.mean, {"a": curves[:, point]}, resamples=500, seed=4)
            for ours, expected in zip(
                (band.value, band.low, band.high),
                (found.value, found.low, found.high),
                strict=True,
            ):
                assert float(ours[point]) == pytest.approx(float(expected), abs=1e-12)

    def test_first_step_at_or_above_a_threshold(self) -> None:
        steps, episodes = np.array([100, 200, 300, 400]), np.array([5, 10, 15, 20])
        curve = Curve(steps, episodes, np.array([9.0, 3.0, 5.0, 1.0]))
        reach = stats.steps_to_threshold
        assert reach(curve, 5.0) == 300  # of five episodes 9 does not count
        assert reach(curve, 3.0) == 200
        assert reach(curve, 5.1) is None
        assert reach(Curve(steps[:0], episodes[:0], curve.returns[:0]), 0.0) is None

    def test_medians_with_runs_that_never_get_there(self) -> None:
        assert stats.median_steps([300, None, 100, 200, None]) == 300
        assert stats.median_steps([None, None, 100, 200, None]) == math.inf
        assert stats.median_steps([100, 300]) == 200
        assert stats.median_steps([100, None]) == math.inf
        with pytest.raises(ValueError, match="no runs"):
            stats.median_steps([])

    def test_ratios(self) -> None:
        assert stats.steps_ratio(600, 300) == 2
        assert stats.steps_ratio(math.inf, 300) == math.inf
        assert stats.steps_ratio(300, math.inf) is None
        assert stats.steps_ratio(math.inf, math.inf) is None
