"""Rollouts: stepping the environments with the policy, and turning steps into a batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray
from torch import Tensor

from acktr.compute import one_thread, restore_generator, to_tensor
from acktr.envs import is_image
from acktr.policies import (
    ActionHead,
    ActorCritic,
    FrameStore,
    ObservationNormalizer,
    RewardScaler,
    SeparateActorCritic,
    compute_type,
    pack,
    to_environment,
)
from acktr.rollout.acting import Acting
from acktr.rollout.lanes import Lane, lanes
from acktr.rollout.microbatch import outputs_of
from acktr.rollout.recorder import Array, Bools, EpisodeEnd, Final, Recorder, Rollout


class NonFiniteError(RuntimeError):
    """The policy or the value function produced NaN or Inf."""


@dataclass(frozen=True)
class Batch:
    """Samples of one update, B rows on the network's device."""

    observations: Tensor
    """As the network takes them; images lie in memory that the next rollout overwrites."""
    actions: Tensor
    advantages: Tensor
    """(B,), not standardised."""
    returns: Tensor
    """(B,) targets of the critic: advantage + value."""
    values: Tensor
    """(B,) predictions made during the rollout."""

    def __len__(self) -> int:
        return len(self.advantages)


def gae(
    rewards: Array,
    values: Array,
    next_values: Array,
    terminated: Bools,
    ended: Bools,
    gamma: float,
    gae_lambda: float,
) -> NDArray[np.float64]:
    """Generalised advantage estimates (T, N) (Schulman et al. 2016, equation 16).

    delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)
    A_t = delta_t + gamma lambda (1 - ended_t) A_{t+1}

    A terminated episode has no future value; a truncated one is bootstrapped from the value of its
    final observation, and neither passes advantages across its end. A rollout's end is treated as
    a truncation.

    Args:
        rewards: r_t (T, N).
        values: V(s_t) (T, N).
        next_values: V(s_{t+1}) (T, N) of the true successor.
        terminated: Whether step t ended in a terminal state.
        ended: Whether step t ended an episode, terminal or truncated.
        gamma: Discount factor.
        gae_lambda: lambda.
    """
    delta = rewards + gamma * np.where(terminated, 0.0, next_values) - values
    carry = gamma * gae_lambda * ~ended
    advantages = np.zeros(rewards.shape, np.float64)
    running = np.zeros(rewards.shape[1:], np.float64)
    for step in range(len(rewards) - 1, -1, -1):
        running = delta[step] + carry[step] * running
        advantages[step] = running
    return advantages


def make_batch(rollout: Rollout, gamma: float, gae_lambda: float, device: torch.device) -> Batch:
    """Advantages and returns of a rollout's valid steps, flattened to (B, ...)."""
    advantages = gae(
        rollout.rewards,
        rollout.values,
        rollout.next_values,
        rollout.terminated,
        rollout.ended,
        gamma,
        gae_lambda,
    )
    valid = rollout.valid.reshape(-1)
    whole = bool(valid.all())

    def flat(array: Array) -> Tensor:
        rows = array.reshape(-1, *array.shape[2:])
        return to_tensor(rows if whole else rows[chosen], device)

    if isinstance(rollout.observations, Tensor):
        observations, chosen = pack(rollout.observations, valid)
    else:
        chosen = np.flatnonzero(valid)
        observations = flat(rollout.observations)
    actions = rollout.actions.flatten(0, 1)
    return Batch(
        observations=observations,
        actions=actions if whole else actions[torch.from_numpy(chosen).to(actions.device)],
        advantages=flat(advantages.astype(np.float32)),
        returns=flat((advantages + rollout.values).astype(np.float32)),
        values=flat(rollout.values),
    )


class Collector:
    """Steps a vector environment with a policy; owns what lives between rollouts.

    Args:
        envs: Vector environment with ``metadata["autoreset_mode"]`` NEXT_STEP or SAME_STEP.
        network: Policy and value function.
        head: Action distribution.
        device: Device of the network.
        generator: Source of the action noise, on that device.
        autocast: Context factory for the network's forward pass.
        observation_normalizer: Applied to every observation if given.
        reward_scaler: Applied to every reward if given.
        micro_batch: Most observations that are valued at once; None: all of a rollout's.
        compiled: Whether acting is compiled.

    Raises:
        ValueError: The environment does not declare a supported autoreset mode.
    """

    def __init__(
        self,
        envs: VectorEnv[Any, Any, Any],
        network: ActorCritic,
        head: ActionHead,
        device: torch.device,
        generator: torch.Generator,
        autocast: Callable[[], AbstractContextManager[Any]],
        observation_normalizer: ObservationNormalizer | None = None,
        reward_scaler: RewardScaler | None = None,
        micro_batch: int | None = None,
        compiled: bool = False,
    ) -> None:
        mode = envs.metadata.get("autoreset_mode")
        if mode not in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
            raise ValueError(
                f"the vector environment declares autoreset mode {mode}; NEXT_STEP or SAME_STEP"
                ' is needed in metadata["autoreset_mode"]'
            )
        self.envs = envs
        self.network = network
        self.device = device
        self.generator = generator
        self.autocast = autocast
        self.observation_normalizer = observation_normalizer
        self.reward_scaler = reward_scaler
        space = envs.single_observation_space
        self._store = FrameStore(space, device) if is_image(space) else None
        self.micro_batch = micro_batch
        self.acting = Acting(network, head, generator, autocast, compiled)
        self._next_step = mode == AutoresetMode.NEXT_STEP
        self._lanes = lanes(envs)
        self._begun = False

    def reset(self, seed: int | None) -> None:
        """Start new episodes everywhere."""
        observations = self._seen(self.envs.reset(seed=seed)[0])
        for lane in self._lanes:
            lane.show(observations)
        if self.reward_scaler is not None:
            self.reward_scaler.reset()
        self._begun = True

    def _seen(self, observation: Any) -> Array:
        """A copy, as the environment may reuse its buffer; images as bytes."""
        return np.array(observation, dtype=None if self._store is None else np.uint8)

    def _normalize(self, observation: Array, valid: Bools | None) -> Array:
        if self.observation_normalizer is None:
            return observation
        if valid is not None:
            self.observation_normalizer.moments.update(observation[valid])
        return self.observation_normalizer(observation)

    def _values(self, observations: Tensor) -> Tensor:
        """Values (B,)."""
        with self.autocast():
            if isinstance(self.network, SeparateActorCritic):
                values: Tensor = self.network.critic(observations)
            else:
                _, values = self.network(observations)
        return values

    def _valued(self, observations: Tensor) -> NDArray[np.float32]:
        return outputs_of(self._values, observations, self.micro_batch).float().cpu().numpy()

    def _missing(self, recorder: Recorder) -> NDArray[np.float32]:
        """The values that acting did not give: a separate critic's, and those of the ends."""
        parts = [self._valued(to_tensor(recorder.unvalued(), self.device))]
        if self._store is not None and not recorder.values:
            parts.insert(0, self._valued(self._store.frames))
        return np.concatenate(parts)

    @torch.no_grad()
    def collect(self, num_steps: int) -> Rollout:
        """Take num_steps steps in every environment.

        The values that acting does not give (all of them with a separate critic, else those of the
        last and of the final observations) come from one forward pass at the end.
        """
        if not self._begun:
            self.reset(None)
        if self._store is not None:
            with self.autocast():
                dtype = compute_type(self.device)
            rows = num_steps * len(self._lanes)
            self._store.start(rows, self.envs.num_envs // len(self._lanes), dtype)
        recorder = Recorder(len(self._lanes))
        try:
            self._walk(num_steps, recorder)
        except BaseException:
            for lane in self._lanes:
                if lane.under_way:  # or the next rollout could not begin
                    with suppress(Exception):
                        self._receive(lane, recorder)
            raise
        started = time.perf_counter()
        last = np.concatenate([lane.observation for lane in self._lanes])
        recorder.last = self._normalize(last, None)
        values = self._missing(recorder)
        recorder.forward_seconds += time.perf_counter() - started
        return recorder.finish(values, None if self._store is None else self._store.frames)

    def _walk(self, num_steps: int, recorder: Recorder) -> None:
        """All steps of a rollout: while the policy acts for a lane, the others are stepped."""
        with one_thread(), self.autocast():  # around all steps: weights are cast once
            for step in range(num_steps + 1):
                for lane in self._lanes:
                    if step > 0:
                        self._receive(lane, recorder)
                    if step < num_steps:
                        self._act(lane, recorder)

    def _act(self, lane: Lane, recorder: Recorder) -> None:
        """Choose a lane's actions and begin its step."""
        started = time.perf_counter()
        observation, shown = self._show(lane, len(recorder.actions))
        actions, values, broken = self.acting(shown)
        if bool(broken):
            raise NonFiniteError(
                "the policy's output is NaN or Inf: lower lr or kl_clip, raise damping, or"
                " normalise observations and rewards"
            )
        taken = to_environment(actions.cpu().numpy(), self.envs.single_action_space)
        recorder.act(observation, actions, values)
        acted = time.perf_counter()
        lane.begin(taken)
        recorder.forward_seconds += acted - started
        recorder.env_seconds += time.perf_counter() - acted

    def _receive(self, lane: Lane, recorder: Recorder) -> None:
        """Wait for a lane's step and record it."""
        waited = time.perf_counter()
        following, rewards, terminated, truncated, infos = lane.end()
        stepped = time.perf_counter()
        alive = ~lane.dead
        valid = alive.copy()
        if "forced" in infos:
            valid &= ~np.asarray(infos["forced"], np.bool_)
        terminated = np.asarray(terminated, np.bool_) & alive
        ended = (terminated | np.asarray(truncated, np.bool_)) & alive
        final = self._final_observations(infos, ended & ~terminated)
        rewards = np.asarray(rewards, np.float64)
        if self.reward_scaler is not None:
            rewards = self.reward_scaler(rewards, ended, alive, lane.rows)
        recorder.add(rewards, terminated, ended, valid, final, alive)
        recorder.episodes += _finished(infos, stepped)
        lane.observation = self._seen(following)
        lane.dead = ended if self._next_step else np.zeros_like(ended)
        recorder.env_seconds += stepped - waited
        recorder.forward_seconds += time.perf_counter() - stepped

    def _show(self, lane: Lane, row: int) -> tuple[Array | None, Tensor]:
        """The present observation, to record (None where images are stored) and to act on."""
        if self._store is not None:
            return None, self._store.put(row, lane.observation)
        observation = self._normalize(lane.observation, ~lane.dead)
        return observation, to_tensor(observation, self.device)

    def _final_observations(self, infos: dict[str, Any], truncated: Bools) -> Final | None:
        """Normalised final observations of truncated episodes under same-step autoreset."""
        if self._next_step or not truncated.any():
            return None
        finals = np.stack([np.asarray(infos["final_obs"][i]) for i in np.flatnonzero(truncated)])
        finals = finals.astype(self.envs.single_observation_space.dtype, copy=False)
        return truncated, self._normalize(finals, None)

    def state_dict(self) -> dict[str, Any]:
        """Normalisers, the generator, and the environments where they can be saved.

        Environments that offer ``state_dict`` continue exactly; others start new episodes.
        """
        saver = _member(self.envs, "state_dict")
        exact = saver is not None and self._begun
        return {
            "observation_normalizer": _state(self.observation_normalizer),
            "reward_scaler": _state(self.reward_scaler),
            "generator": self.generator.get_state(),
            "envs": saver() if saver is not None and exact else None,
            "observation": np.concatenate([lane.observation for lane in self._lanes])
            if exact
            else None,
            "dead": np.concatenate([lane.dead for lane in self._lanes]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; environments without saved state must be reset after it."""
        for name in ("observation_normalizer", "reward_scaler"):
            target = getattr(self, name)
            if (target is None) != (state[name] is None):
                raise ValueError(f"checkpoint and configuration disagree about the {name}")
            if target is not None:
                target.load_state_dict(state[name])
        restore_generator(self.generator, state["generator"])
        loader = _member(self.envs, "load_state_dict")
        if loader is not None and state["envs"] is not None:
            loader(state["envs"])
            for lane in self._lanes:
                lane.show(state["observation"], state["dead"])
            self._begun = True


def _finished(infos: dict[str, Any], moment: float) -> tuple[EpisodeEnd, ...]:
    if "episode" not in infos:
        return ()
    rewards, lengths = infos["episode"]["r"], infos["episode"]["l"]
    return tuple(
        EpisodeEnd(float(rewards[i]), int(lengths[i]), moment)
        for i in np.flatnonzero(infos["_episode"])
    )


def _state(stateful: ObservationNormalizer | RewardScaler | None) -> dict[str, Any] | None:
    return None if stateful is None else stateful.state_dict()


def _member(envs: VectorEnv[Any, Any, Any], name: str) -> Callable[..., Any] | None:
    """A method of the innermost environment, or None."""
    found = getattr(envs.unwrapped, name, None)
    return found if callable(found) else None
