"""Evaluation: whole episodes with frozen statistics and the environment's own reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from acktr.policy import Policy


@dataclass(frozen=True)
class Evaluation:
    """Returns and lengths of the episodes, in the order in which they ended."""

    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """Standard deviation of the returns over episodes."""
        return float(np.std(self.returns))


def evaluate(
    policy: Policy,
    envs: VectorEnv[Any, Any, Any],
    episodes: int,
    *,
    seed: int,
    deterministic: bool = True,
) -> Evaluation:
    """Play whole episodes.

    Each parallel environment plays its share of them, so that short episodes are not preferred.

    Args:
        policy: Who plays.
        envs: Environments of ``envs.make_vec(..., training=False)``; the caller closes them.
        episodes: How many.
        seed: Of the environments.
        deterministic: The most likely action instead of a sample.

    Raises:
        ValueError: episodes is not positive.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    shares = (episodes + np.arange(envs.num_envs)[::-1]) // envs.num_envs
    returns: list[float] = []
    lengths: list[int] = []
    observation, _ = envs.reset(seed=seed)
    while shares.any():
        observation, _, _, _, infos = envs.step(policy.act(observation, deterministic))
        for index in np.flatnonzero(infos.get("_episode", ())):
            if shares[index] > 0:
                shares[index] -= 1
                returns.append(float(infos["episode"]["r"][index]))
                lengths.append(int(infos["episode"]["l"][index]))
    return Evaluation(tuple(returns), tuple(lengths))
