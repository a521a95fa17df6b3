"""Running normalisation of observations and rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import gymnasium
import numpy as np
from numpy.typing import NDArray

from acktr.config import Config, ConfigError
from acktr.envs import parts, picture

Float = NDArray[np.floating[Any]]
_T = TypeVar("_T", float, NDArray[np.float64])


def pooling(delta: _T, count: float, others: float) -> tuple[_T, _T]:
    """What further samples add to a mean, and to the sums of squared differences of both.

    delta others / n and delta^2 count others / n with n = count + others (Chan et al. 1979).

    Args:
        delta: Their mean less that of the former ones.
        count: Number of the former ones.
        others: Number of the further ones; not both may be 0.
    """
    total = count + others
    return delta * (others / total), delta * delta * (count * others / total)


class RunningMoments:
    """Mean and variance of a stream of vectors in float64, by pairwise updates."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.mean = np.zeros(shape, np.float64)
        self.m2 = np.zeros(shape, np.float64)
        self.count = 0

    def update(self, batch: Float) -> None:
        """Fold in a batch (N, ...)."""
        size = len(batch)
        if size == 0:
            return
        batch = np.asarray(batch, np.float64)
        mean = np.add.reduce(batch) / size
        centred = batch - mean
        self.join(mean, np.add.reduce(centred * centred), size)

    def join(self, mean: NDArray[np.float64], m2: NDArray[np.float64], count: int) -> None:
        """Fold in so many samples, by their mean and sum of squared differences from it."""
        if count == 0:
            return
        move, spread = pooling(mean - self.mean, self.count, count)
        self.m2 += m2 + spread
        self.mean += move
        self.count += count

    def since(self, former: RunningMoments) -> RunningMoments:
        """Those of the samples that came after the moments were as they were."""
        new = RunningMoments(self.mean.shape)
        new.count = self.count - former.count
        if new.count:
            new.mean = (self.count * self.mean - former.count * former.mean) / new.count
            _, spread = pooling(new.mean - former.mean, former.count, new.count)
            new.m2 = np.maximum(self.m2 - former.m2 - spread, 0.0)
        return new

    def copy(self) -> RunningMoments:
        """Moments of their own, as these are now."""
        found = RunningMoments(self.mean.shape)
        found.load_state_dict(self.state_dict())
        return found

    @property
    def variance(self) -> NDArray[np.float64]:
        """Population variance; 1 before there are two samples."""
        if self.count < 2:
            return np.ones_like(self.m2)
        return self.m2 / self.count

    def state_dict(self) -> dict[str, Any]:
        """Moments and count."""
        return {"mean": self.mean.copy(), "m2": self.m2.copy(), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises ValueError when the shape differs or no numbers have such moments."""
        mean, m2, count = state["mean"], state["m2"], state["count"]
        if mean.shape != self.mean.shape or m2.shape != self.m2.shape:
            raise ValueError("normaliser state has another shape than the observations")
        if not (np.isfinite(mean).all() and (m2 >= 0).all() and np.isfinite(m2).all()):
            raise ValueError("normaliser state must have finite means and variances >= 0")
        if type(count) is not int or count < 0:
            raise ValueError(f"normaliser state must have a count >= 0, got {count!r:.40}")
        self.mean, self.m2 = mean.astype(np.float64), m2.astype(np.float64)
        self.count = count


def _clipped(values: Float, limit: float) -> NDArray[np.float32]:
    """Values in [-limit, limit]; the two ufuncs take half of np.clip's time on small arrays."""
    return np.minimum(np.maximum(values, -limit), limit).astype(np.float32)


class ObservationNormalizer:
    """(x - mean) / sqrt(variance + 1e-8), clipped to +-clip."""

    def __init__(self, shape: tuple[int, ...], clip: float = 10.0) -> None:
        self.moments = RunningMoments(shape)
        self.clip = clip

    def __call__(self, observations: Float) -> NDArray[np.float32]:
        """Normalise a batch (N, ...) with the statistics as they are."""
        scaled = (observations - self.moments.mean) / np.sqrt(self.moments.variance + 1e-8)
        return _clipped(scaled, self.clip)

    def update(self, observations: Float) -> None:
        """Fold in a batch (N, ...)."""
        self.moments.update(observations)

    def running(self) -> list[RunningMoments]:
        """The statistics themselves."""
        return [self.moments]

    def state_dict(self) -> dict[str, Any]:
        """Moments."""
        return self.moments.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore."""
        self.moments.load_state_dict(state)


class PartNormalizer:
    """Normalises some parts of Dict and Tuple observations, each by statistics of its own.

    Args:
        shapes: Shapes of the parts to normalise, by name; the others stay as they are.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.parts = {name: ObservationNormalizer(shape) for name, shape in shapes.items()}

    def __call__(self, observations: dict[str, Any]) -> dict[str, Any]:
        """Normalise a batch with the statistics as they are, by part."""
        scaled = {name: each(observations[name]) for name, each in self.parts.items()}
        return observations | scaled

    def update(self, observations: dict[str, Any]) -> None:
        """Fold in a batch."""
        for name, each in self.parts.items():
            each.update(observations[name])

    def running(self) -> list[RunningMoments]:
        """The statistics themselves."""
        return [each.moments for each in self.parts.values()]

    def state_dict(self) -> dict[str, Any]:
        """Moments by part."""
        return {name: each.state_dict() for name, each in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises ValueError when the parts or their shapes differ."""
        if set(state) != set(self.parts):
            raise ValueError("normaliser state has other parts than the observations")
        for name, each in self.parts.items():
            each.load_state_dict(state[name])


Normalizer = ObservationNormalizer | PartNormalizer
"""Normalises observations: arrays (N, ...), or a dict of them by part."""


def observation_normalizer(space: gymnasium.Space[Any], config: Config) -> Normalizer | None:
    """The normaliser that the configuration asks for; None where there is nothing to normalise.

    Vectors of numbers are normalised: Boxes, but no pictures, and of a Dict or Tuple space no
    masks, which are Boxes of integers (or booleans) between 0 and 1. A network of one's own gets
    parts within bounds as they are: padding and flags in them may mean something to it.

    Raises:
        ConfigError: ``normalize_parts`` names a part that the observations do not have, or one that
            is no vector of numbers.
    """
    if not config.normalize_observation:
        return None
    inside = parts(space)
    vectors = {
        name: tuple(part.shape or ())
        for name, part in inside.items()
        if isinstance(part, gymnasium.spaces.Box) and picture(part, config.network.channels) is None
    }
    wanted = config.normalize_parts
    if "" in inside:
        if wanted:
            raise ConfigError("normalize_parts is for Dict and Tuple observations only")
        return ObservationNormalizer(vectors[""]) if vectors else None
    if wanted is None:
        own = config.network.custom is not None
        usual = [name for name in vectors if not (own and _is_bounded(inside[name]))]
        wanted = tuple(name for name in usual if not _is_mask(inside[name]))
    for name in wanted:
        if name not in vectors:
            raise ConfigError(
                f"normalize_parts: {name!r} is no vector among the observation's parts"
                f" ({', '.join(inside)})"
            )
    return PartNormalizer({name: vectors[name] for name in wanted}) if wanted else None


def _is_bounded(space: gymnasium.Space[Any]) -> bool:
    """Whether a Box says in which range its numbers are."""
    return isinstance(space, gymnasium.spaces.Box) and space.is_bounded()


def _is_mask(space: gymnasium.Space[Any]) -> bool:
    """Whether a Box holds integers or booleans between 0 and 1."""
    assert isinstance(space, gymnasium.spaces.Box)
    integers = np.dtype(space.dtype).kind in "iub"
    return integers and bool((space.low >= 0).all() and (space.high <= 1).all())


class RewardScaler:
    """r / sqrt(Var[R] + 1e-8), clipped to +-clip, with R_t = gamma R_{t-1} + r_t per environment.

    The mean is not subtracted; R starts anew after an episode's end.
    """

    def __init__(self, num_envs: int, gamma: float, clip: float = 10.0) -> None:
        self.gamma = gamma
        self.clip = clip
        self.returns = np.zeros(num_envs, np.float64)
        self.moments = RunningMoments(())

    def __call__(
        self,
        rewards: Float,
        ended: NDArray[np.bool_],
        valid: NDArray[np.bool_],
        rows: slice = slice(None),
    ) -> NDArray[np.float32]:
        """Scale the rewards (N,) of one step and fold them in.

        Args:
            rewards: Rewards of the step.
            ended: Episodes that ended with it.
            valid: Steps that count; others neither change the statistics nor the returns.
            rows: The environments that they are from, of all.
        """
        returns = self.returns[rows]  # a view
        returns[valid] = self.gamma * returns[valid] + rewards[valid]
        self.moments.update(returns[valid])
        returns[ended] = 0.0
        scaled = rewards / np.sqrt(self.moments.variance + 1e-8)
        return _clipped(scaled, self.clip)

    def reset(self) -> None:
        """Begin new episodes everywhere."""
        self.returns[:] = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Moments and the running discounted returns."""
        return {"returns": self.returns.copy(), "moments": self.moments.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; with another number of environments the running returns start at zero."""
        self.moments.load_state_dict(state["moments"])
        if state["returns"].shape == self.returns.shape:
            self.returns = state["returns"].copy()
        else:
            self.reset()
