"""Running normalisation of observations and rewards."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from acktr.envs import is_image

Float = NDArray[np.floating[Any]]


class RunningMoments:
    """Mean and variance of a stream of vectors in float64 (Chan et al. 1979, pairwise update)."""

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
        total = self.count + size
        mean = np.add.reduce(batch) / size
        centred = batch - mean
        delta = mean - self.mean
        self.m2 += np.add.reduce(centred * centred) + delta * delta * (self.count * size / total)
        self.mean += delta * (size / total)
        self.count = total

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
        """Restore; raises ValueError when the shape differs."""
        if state["mean"].shape != self.mean.shape or state["m2"].shape != self.m2.shape:
            raise ValueError("normaliser state has another shape than the observations")
        self.mean, self.m2 = state["mean"].copy(), state["m2"].copy()
        self.count = int(state["count"])


def _clipped(values: Float, limit: float) -> NDArray[np.float32]:
    """Values in [-limit, limit]; the two ufuncs take half of np.clip's time on small arrays."""
    return np.minimum(np.maximum(values, -limit), limit).astype(np.float32)


class ObservationNormalizer:
    """(x - mean) / sqrt(variance + 1e-8), clipped to +-clip; frozen unless told to update."""

    def __init__(self, shape: tuple[int, ...], clip: float = 10.0) -> None:
        self.moments = RunningMoments(shape)
        self.clip = clip

    def __call__(self, observations: Float, update: bool = False) -> NDArray[np.float32]:
        """Normalise a batch (N, ...), after folding it in if update."""
        if update:
            self.moments.update(observations)
        scaled = (observations - self.moments.mean) / np.sqrt(self.moments.variance + 1e-8)
        return _clipped(scaled, self.clip)

    def state_dict(self) -> dict[str, Any]:
        """Moments."""
        return self.moments.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore."""
        self.moments.load_state_dict(state)


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


def normalizable(space: gymnasium.Space[Any]) -> bool:
    """Whether observations are vectors of numbers, which running normalisation applies to."""
    return isinstance(space, gymnasium.spaces.Box) and not is_image(space)
