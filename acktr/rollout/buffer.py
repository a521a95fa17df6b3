"""A rollout's arrays, advantages (GAE) over them, and the batch that an update learns from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acktr import tree
from acktr.compute import to_tensor
from acktr.envs import Arrays
from acktr.policies import pack
from acktr.rollout.recurrence import Remembered
from acktr.tree import Observed, Tree

if TYPE_CHECKING:
    from acktr.rollout.shares import Share

Array = NDArray[Any]
Bools = NDArray[np.bool_]
ArrayOrTensor = TypeVar("ArrayOrTensor", Tensor, NDArray[Any])


@dataclass(frozen=True)
class EpisodeEnd:
    """An episode that ended during a rollout, in the environment's own reward."""

    reward: float
    length: int
    moment: float
    """time.perf_counter() when it ended."""
    info: dict[str, float] = field(default_factory=dict, hash=False)
    """Numbers in the info of its last step that are recorded; NaN where there was none."""


def ended_episodes(infos: dict[str, Any], moment: float) -> list[EpisodeEnd]:
    """The episodes that ended with a step."""
    if "episode" not in infos:
        return []
    rewards, lengths = infos["episode"]["r"], infos["episode"]["l"]
    recorded = infos.get("recorded", {})
    return [
        EpisodeEnd(
            float(rewards[i]),
            int(lengths[i]),
            moment,
            {key: float(values[i]) for key, values in recorded.items()},
        )
        for i in np.flatnonzero(infos["_episode"])
    ]


class Rollout:
    """T steps of N environments in arrays (T, N, ...), which a collector fills at ``[step, rows]``.

    Rows are the environments of a group: which group came first makes no difference.

    Args:
        observations: Memory for the observations (T, N, ...), as the network takes them: see
            :class:`acktr.rollout.observations.Observations`.
        reused: Parts of that memory which the next rollout uses too ("" for all of it, where there
            are no parts); :func:`make_batch` moves rows of them instead of copying.
        device: The network's device, where the values are.

    Attributes:
        actions: Actions (T, N, ...).
        masks: Action masks (T, N, P), which the actions obeyed; None without masks.
        rewards: Rewards as learning takes them (scaled).
        values: V of each step's state.
        next_values: V of the true successor state, the final observation where an episode was
            truncated.
        terminated: Steps that ended in a terminal state.
        ended: Steps that ended an episode, terminal or truncated.
        valid: Steps to learn from: the agent's own action in a running episode.
        kept: Numbers of those steps, t N + n, in the order of a batch's rows, once it is made.
        finals: Final observations (1, ...) of truncated episodes by (step, environment),
            normalised, where a reset has replaced them among the observations.
        memory: What a recurrent network remembers; None for others.
        episodes: Episodes that ended.
        env_steps: Environment steps taken (reset steps of next-step autoreset are none).
        env_seconds: Seconds of waiting for the environments; what they did while the policy acted
            is not part of it.
        forward_seconds: Seconds of acting and recording.
    """

    def __init__(self, observations: Tree, reused: frozenset[str], device: torch.device) -> None:
        shape = tree.first(observations).shape[:2]
        self.observations = observations
        self.reused = reused
        self.actions: Array = np.empty(0)
        self.masks: Bools | None = None
        self.rewards = np.zeros(shape, np.float32)
        self.values = torch.zeros(shape, dtype=torch.float32, device=device)
        self.next_values = torch.zeros_like(self.values)
        self.terminated = np.zeros(shape, np.bool_)
        self.ended = np.zeros(shape, np.bool_)
        self.valid = np.zeros(shape, np.bool_)
        self.kept: Array = np.empty(0, np.int64)
        self.finals: dict[tuple[int, int], Arrays] = {}
        self.memory: Remembered | None = None
        self.episodes: list[EpisodeEnd] = []
        self.env_steps = 0
        self.env_seconds = 0.0
        self.forward_seconds = 0.0

    def act(
        self,
        step: int,
        rows: slice,
        actions: Array,
        values: Tensor | None,
        masks: Bools | None = None,
    ) -> None:
        """Record the actions of a group, their masks, and the values if acting gave them."""
        if not len(self.actions):  # the first actions tell shape and type of all
            self.actions = np.empty((*self.values.shape, *actions.shape[1:]), actions.dtype)
        self.actions[step, rows] = actions
        if values is not None:
            self.values[step, rows] = values
        if masks is not None:
            if self.masks is None:
                self.masks = np.empty((*self.values.shape, masks.shape[1]), np.bool_)
            self.masks[step, rows] = masks


@dataclass(frozen=True)
class Batch:
    """Samples of one update, B rows on the network's device."""

    observations: Observed
    """Those that the network takes, by part if their space has parts; pictures may lie in memory
    that the next rollout overwrites."""
    actions: Tensor
    advantages: Tensor
    """(B,), not standardised."""
    returns: Tensor
    """(B,) targets of the critic: advantage + value."""
    values: Tensor | None
    """(B,) predictions made during the rollout; None if they are not known."""
    weights: Tensor | None = None
    """(B,) weights of the samples, with mean 1; None for 1."""
    masks: Tensor | None = None
    """(B, P) bool, true where an action is allowed; None without masks."""
    share: Share | None = None
    """What it is of the batch of all ranks; None in one process."""

    def __len__(self) -> int:
        return len(self.advantages)

    @property
    def total(self) -> int:
        """Samples of all ranks together."""
        return len(self) if self.share is None else self.share.total


def gae(
    rewards: ArrayOrTensor,
    values: ArrayOrTensor,
    next_values: ArrayOrTensor,
    terminated: ArrayOrTensor,
    ended: ArrayOrTensor,
    gamma: float,
    gae_lambda: float,
) -> ArrayOrTensor:
    """Generalised advantage estimates (T, ...) (Schulman et al. 2016, equation 16).

    delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)
    A_t = delta_t + gamma lambda (1 - ended_t) A_{t+1}

    A terminated episode has no future value; a truncated one is bootstrapped from the value of its
    final observation, and neither passes advantages across its end. A rollout's end is treated as
    a truncation.

    Args:
        rewards: r_t (T, N), or (T,) of one environment: arrays, or tensors for a tensor.
        values: V(s_t) (T, N).
        next_values: V(s_{t+1}) (T, N) of the true successor.
        terminated: Whether step t ended in a terminal state.
        ended: Whether step t ended an episode, terminal or truncated.
        gamma: Discount factor.
        gae_lambda: lambda.

    Returns:
        A_t (T, N), of arrays in float64, of tensors in the type of the values.

    Raises:
        ValueError: The shapes differ.
    """
    given = (rewards, values, next_values, terminated, ended)
    if len(shapes := {tuple(each.shape) for each in given}) > 1:
        raise ValueError(f"gae: all arrays must have one shape (T, N), got {sorted(shapes)}")
    if isinstance(rewards, Tensor):
        arrays = (torch.as_tensor(each).detach().cpu().numpy() for each in given)
        r, v, following, terminal, last = arrays
        found = gae(r, v, following, terminal, last, gamma, gae_lambda)
        return torch.from_numpy(found).to(1.0 * values)  # which may be integers too
    terminated, ended = np.asarray(terminated, np.bool_), np.asarray(ended, np.bool_)
    delta = rewards + gamma * np.where(terminated, 0.0, next_values) - values
    carry = gamma * gae_lambda * ~ended
    advantages = np.zeros(rewards.shape, np.float64)
    running = np.zeros(rewards.shape[1:], np.float64)
    for step in range(len(rewards) - 1, -1, -1):
        running = delta[step] + carry[step] * running
        advantages[step] = running
    return advantages


def make_batch(rollout: Rollout, gamma: float, gae_lambda: float, device: torch.device) -> Batch:
    """Advantages and returns of a rollout's valid steps, flattened to (B, ...).

    The samples of a recurrent network follow one another in time, environment by environment.
    """
    values = rollout.values.cpu().numpy()
    advantages = gae(
        rollout.rewards,
        values,
        rollout.next_values.cpu().numpy(),
        rollout.terminated,
        rollout.ended,
        gamma,
        gae_lambda,
    )
    memory, valid = rollout.memory, rollout.valid
    observations: Observed
    if memory is None:
        flat, kept = _learned(rollout, valid.reshape(-1))
        observations = tree.to_device(flat, device)
    else:
        observations = memory.sequences(rollout.observations, valid, device)
        kept = np.flatnonzero(valid.T)
    rollout.kept = kept

    def column(array: Array) -> Tensor:
        array = array if memory is None else array.swapaxes(0, 1)
        return to_tensor(array.reshape(valid.size, *array.shape[2:])[kept], device)

    return Batch(
        observations=observations,
        actions=column(rollout.actions),
        advantages=column(advantages.astype(np.float32)),
        returns=column((advantages + values).astype(np.float32)),
        values=column(values),
        masks=None if rollout.masks is None else column(rollout.masks),
    )


def _learned(rollout: Rollout, valid: Bools) -> tuple[Tree, Array]:
    """Observations of the valid steps, and the numbers of those steps in the order of the rows.

    In memory that is used again the last rows move into the gaps; everything else follows.
    """
    flattened = tree.tree_map(lambda part: part.flatten(0, 1), rollout.observations)
    named = flattened if isinstance(flattened, dict) else {"": flattened}
    kept, packed = np.flatnonzero(valid), dict[str, Tensor]()
    for name in rollout.reused:
        packed[name], kept = pack(named[name], valid)
    if len(kept) < len(valid):
        rows = torch.from_numpy(kept)
        named = {n: packed[n] if n in packed else part[rows] for n, part in named.items()}
    return named if isinstance(flattened, dict) else named[""], kept
