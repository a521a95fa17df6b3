"""Evaluation: whole episodes with frozen statistics and the environment's own reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from acktr.envs import MASK, EnvError, is_atari

MAX_EPISODE_STEPS = 27_000
"""Steps after which an episode of an environment without a time limit is cut short."""


class Player(Protocol):
    """A player that can be evaluated, such as ``acktr.policies.Policy``."""

    @property
    def act(self) -> Callable[..., NDArray[Any]]:
        """Actions, as the environment takes them: ``act(observations, deterministic)``.

        Observations are a raw batch (N, ...). Where environments give action masks the call is
        ``act(observations, deterministic, masks)``, with booleans (N, P), true where allowed.
        """


@runtime_checkable
class Remembering(Protocol):
    """A player that may have a state from step to step."""

    @property
    def recurrent(self) -> bool:
        """Whether it has."""

    @property
    def advance(self) -> Callable[..., tuple[NDArray[Any], Any]]:
        """Actions and next state: ``advance(observations, state, starts, deterministic, masks)``.

        The first state is None; starts (N,) are true where an episode begins.
        """


@dataclass(frozen=True)
class Evaluation:
    """Returns and lengths of the episodes, in the order in which they ended."""

    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    cut: int = 0
    """Episodes cut short after the largest number of steps; they count with what they had."""
    infos: tuple[Mapping[str, float], ...] = ()
    """Numbers that were recorded of the infos of last steps; none of an episode cut short."""

    best_by: str | None = None
    """What :attr:`score` is the mean of: a recorded number, or the return if None."""

    @property
    def score(self) -> float:
        """What one agent is better than another by."""
        return self.mean if self.best_by is None else self.mean_of(self.best_by)

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """Standard deviation of the returns over episodes."""
        return float(np.std(self.returns))

    def mean_of(self, key: str) -> float:
        """Mean of a recorded number over the episodes that have it; NaN if none has."""
        values = [info[key] for info in self.infos if not math.isnan(info.get(key, math.nan))]
        return float(np.mean(values)) if values else math.nan


def usually_deterministic(env: str) -> bool:
    """Whether evaluation takes the most likely actions: everywhere but in Atari games.

    An environment that is not made by an id may have any name.
    """
    try:
        return not is_atari(env)
    except EnvError:
        return True


def evaluate(
    policy: Player,
    envs: VectorEnv[Any, Any, Any],
    episodes: int,
    *,
    seed: int,
    deterministic: bool = True,
    max_episode_steps: int = MAX_EPISODE_STEPS,
) -> Evaluation:
    """Play whole episodes.

    Each parallel environment plays its share of them, so that short episodes are not preferred.

    Args:
        policy: Who plays.
        envs: Environments of ``envs.make_vec(..., training=False)``; the caller closes them.
        episodes: How many.
        seed: Of the environments.
        deterministic: The most likely action instead of a sample.
        max_episode_steps: Longer episodes are cut, so that a policy that never ends one does not
            play forever.

    Raises:
        ValueError: episodes is not positive.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    shares = (episodes + np.arange(envs.num_envs)[::-1]) // envs.num_envs
    returns: list[float] = []
    lengths: list[int] = []
    recorded: list[dict[str, float]] = []
    cut = 0
    observation, infos = envs.reset(seed=seed)
    running, steps = np.zeros(envs.num_envs), np.zeros(envs.num_envs, np.int64)
    # Of players with a memory: their state, and where an episode begins.
    state: Any = None
    starts = np.ones(envs.num_envs, np.bool_)
    while shares.any():
        masks = infos.get(MASK)
        if isinstance(policy, Remembering) and policy.recurrent:
            actions, state = policy.advance(observation, state, starts, deterministic, masks)
        elif masks is None:  # players of other environments need not know of masks
            actions = policy.act(observation, deterministic)
        else:
            actions = policy.act(observation, deterministic, masks)
        observation, rewards, _, _, infos = envs.step(actions)
        running += rewards
        steps += 1
        ended = np.asarray(infos.get("_episode", np.zeros(envs.num_envs)), np.bool_)
        late = ~ended & (steps >= max_episode_steps)
        for index in np.flatnonzero((ended | late) & (shares > 0)):
            shares[index] -= 1
            cut += int(late[index])
            finished = infos["episode"]["r"][index] if ended[index] else running[index]
            returns.append(float(finished))
            lengths.append(int(steps[index]))
            columns = infos.get("recorded", {}) if ended[index] else {}
            recorded.append({key: float(values[index]) for key, values in columns.items()})
        if late.any():
            observation, fresh = envs.reset(options={"reset_mask": late})
            infos = {**infos, **fresh}
        starts = ended | late
        running[ended | late] = 0.0
        steps[ended | late] = 0
    return Evaluation(tuple(returns), tuple(lengths), cut, tuple(recorded))
