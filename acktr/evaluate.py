"""Evaluation: whole episodes with frozen statistics and the environment's own reward."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from acktr.envs import MASK, EnvError, EnvWarning, flat, is_atari

MAX_EPISODE_STEPS = 27_000
"""Steps after which an episode of an environment without a time limit is cut short."""


class Player(Protocol):
    """A player that can be evaluated, such as ``acktr.policies.Policy``.

    One with a state from step to step has ``advance(observations, state, starts, deterministic,
    masks)``, which is called in place of ``act`` and gives actions and next state. The first state
    is None; starts (N,) are true where an episode begins.
    """

    @property
    def act(self) -> Callable[..., NDArray[Any]]:
        """Actions, as the environment takes them: ``act(observations, deterministic)``.

        Observations are a raw batch (N, ...). Where environments give action masks the call is
        ``act(observations, deterministic, masks)``, with booleans (N, P), true where allowed.
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
    note: Callable[[int], None] = lambda ended: None,
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
        note: Called after every step with the number of episodes that have ended.

    Raises:
        ValueError: episodes is not positive.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    account = _Account(episodes, envs, max_episode_steps)
    observation, infos = envs.reset(seed=seed)
    advance = getattr(policy, "advance", None)
    state: Any = None
    starts = np.ones(envs.num_envs, np.bool_)
    while account.left.any():
        masks = infos.get(MASK)
        if advance is not None:
            actions, state = advance(observation, state, starts, deterministic, masks)
        else:  # players of other environments need not know of masks
            actions = policy.act(observation, deterministic, *([] if masks is None else [masks]))
        observation, rewards, _, _, infos = envs.step(actions)
        starts, late = account.step(rewards, infos)
        note(episodes - int(account.left.sum()))
        if late.any():
            shown = copy.deepcopy(observation)
            observation, fresh = envs.reset(options={"reset_mask": late})
            _tell_others(envs.single_observation_space, shown, observation, ~late)
            infos = {**infos, **fresh}
    return account.evaluation()


def _tell_others(
    space: gymnasium.Space[Any], before: Any, after: Any, others: NDArray[np.bool_]
) -> None:
    """Warn of environments that were reset, or changed, although the mask left them out."""
    shown, now = (
        found if isinstance(found, dict) else {"": found}
        for found in (flat(space, before), flat(space, after))
    )
    if not all(np.array_equal(shown[name][others], now[name][others]) for name in shown):
        warnings.warn(
            'reset(options={"reset_mask": mask}) changed observations of environments that the mask'
            " leaves out: if it resets them, returns of this evaluation are sums over two episodes",
            EnvWarning,
            stacklevel=3,
        )


class _Account:
    """The episodes of an evaluation: how many are left to play, and what the others gave."""

    def __init__(self, episodes: int, envs: VectorEnv[Any, Any, Any], most_steps: int) -> None:
        num = envs.num_envs
        self.left = (episodes + np.arange(num)[::-1]) // num
        """Episodes that each environment still has to play."""
        self._most_steps = most_steps
        self._next_step = envs.metadata.get("autoreset_mode") == AutoresetMode.NEXT_STEP
        self._over = np.zeros(num, np.bool_)  # episodes whose end is shown: the next step resets
        self._running, self._steps = np.zeros(num), np.zeros(num, np.int64)
        self._cut = 0
        self._returns: list[float] = []
        self._lengths: list[int] = []
        self._recorded: list[dict[str, float]] = []

    def step(
        self, rewards: NDArray[Any], infos: Mapping[str, Any]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Take note of a step; where an episode begins with what is shown next, and is too long.

        Those that are too long begin if the caller resets them.
        """
        played = ~self._over
        self._running += np.where(played, rewards, 0.0)
        self._steps += played
        ended = np.asarray(infos.get("_episode", np.zeros(len(played))), np.bool_)
        late = ~ended & (self._steps >= self._most_steps)
        for index in np.flatnonzero((ended | late) & (self.left > 0)):
            self.left[index] -= 1
            self._cut += int(late[index])
            sums = infos["episode"]["r"] if ended[index] else self._running
            self._returns.append(float(sums[index]))
            self._lengths.append(int(self._steps[index]))
            columns = infos.get("recorded", {}) if ended[index] else {}
            self._recorded.append({key: float(values[index]) for key, values in columns.items()})
        self._running[ended | late] = 0.0
        self._steps[ended | late] = 0
        begins = self._over if self._next_step else ended
        self._over = ended & self._next_step
        return begins | late, late

    def evaluation(self) -> Evaluation:
        """The episodes that were played."""
        return Evaluation(
            tuple(self._returns), tuple(self._lengths), self._cut, tuple(self._recorded)
        )
