"""Running statistics against numpy over all data at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acktr.policies.normalize import ObservationNormalizer, RewardScaler, RunningMoments


@given(seed=st.integers(0, 1000), parts=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_moments_in_parts_equal_moments_of_the_whole(seed: int, parts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    batches = [1e3 + rng.normal(size=(n, 3)) for n in parts]
    whole = np.concatenate(batches)
    moments = RunningMoments((3,))
    for batch in batches:
        moments.update(batch)
    assert moments.count == len(whole)
    if len(whole) >= 2:
        np.testing.assert_allclose(moments.mean, whole.mean(0))
        np.testing.assert_allclose(moments.variance, whole.var(0), rtol=1e-6)


def test_observations_are_standardised_clipped_and_frozen() -> None:
    rng = np.random.default_rng(0)
    data = rng.normal(5.0, 3.0, size=(1000, 2))
    normalizer = ObservationNormalizer((2,), clip=2.0)
    normalizer.update(data)
    count = normalizer.moments.count
    scaled = normalizer(data)
    assert normalizer.moments.count == count
    expected = np.clip((data - data.mean(0)) / data.std(0), -2, 2)
    np.testing.assert_allclose(scaled, expected, atol=1e-5)
    assert scaled.dtype == np.float32


def test_reward_scale_is_the_deviation_of_discounted_returns() -> None:
    rng = np.random.default_rng(1)
    rewards = rng.normal(size=(50, 2))
    ended = rng.random((50, 2)) < 0.1
    scaler = RewardScaler(2, gamma=0.9)
    seen, running = [], np.zeros(2)
    for step in range(50):
        running = 0.9 * running + rewards[step]
        seen.append(running.copy())
        scaled = scaler(rewards[step], ended[step], np.ones(2, bool))
        running[ended[step]] = 0
    expected = np.clip(rewards[-1] / np.sqrt(np.concatenate(seen).var() + 1e-8), -10, 10)
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)


def test_state_round_trip_and_wrong_shapes() -> None:
    normalizer = ObservationNormalizer((2,))
    normalizer.update(np.random.default_rng(0).normal(size=(7, 2)))
    copy = ObservationNormalizer((2,))
    copy.load_state_dict(normalizer.state_dict())
    data = np.ones((3, 2))
    np.testing.assert_array_equal(copy(data), normalizer(data))
    with pytest.raises(ValueError, match="another shape"):
        ObservationNormalizer((3,)).load_state_dict(normalizer.state_dict())
    scaler = RewardScaler(2, 0.9)
    scaler(np.ones(2), np.zeros(2, bool), np.ones(2, bool))
    same, other = RewardScaler(2, 0.9), RewardScaler(3, 0.9)
    same.load_state_dict(scaler.state_dict())
    other.load_state_dict(scaler.state_dict())
    np.testing.assert_array_equal(same.returns, scaler.returns)
    np.testing.assert_array_equal(other.returns, np.zeros(3))
    assert other.moments.count == 2
