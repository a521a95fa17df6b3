"""Stepping environments with a policy: while it acts for one group, the others are stepped."""

from __future__ import annotations

import copy
import time
import warnings
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray
from torch import Tensor

from acktr.compute import one_thread, restore_generator, to_tensor
from acktr.envs import (
    MASK,
    GroupedEnvs,
    GuardedVectorEnv,
    Masks,
    UnsavedError,
    autoreset_mode,
    check_state,
    choices,
    layers,
    require_like,
    state_method,
)
from acktr.policies import Normalizer, RewardScaler, to_environment
from acktr.rollout.acting import Acting
from acktr.rollout.buffer import Array, Rollout, ended_episodes
from acktr.rollout.groups import Group, groups_of
from acktr.rollout.microbatch import outputs_of
from acktr.rollout.observations import Observations, fill
from acktr.rollout.recurrence import Recurrence, Remembered
from acktr.tree import Observed, tree_map

_PLAYED = "the environments of training were reset or stepped by others since"


class NonFiniteError(RuntimeError):
    """The policy or the value function produced NaN or Inf."""


class _Received(NamedTuple):
    """What a step of a group's environments gave, (N,) each."""

    rewards: NDArray[np.float64]
    alive: Array
    """Whether the episode was running before it."""
    terminated: Array
    ended: Array
    """Whether it ended the episode."""
    chosen: Array
    """Whether the policy chose the action."""


class Collector:
    """Steps a vector environment with a policy; owns what lives between rollouts.

    Args:
        envs: Vector environment with ``metadata["autoreset_mode"]`` NEXT_STEP or SAME_STEP.
        acting: The network, its action noise and its precision.
        observation_normalizer: Applied to every observation if given.
        reward_scaler: Applied to every reward if given.
        micro_batch: Most observations that are valued at once; None: all of a rollout's.
        masked: Whether to obey the action masks in the infos, where there are some.

    Raises:
        EnvError: The environment does not declare a supported autoreset mode.
    """

    def __init__(
        self,
        envs: VectorEnv[Any, Any, Any],
        acting: Acting,
        observation_normalizer: Normalizer | None = None,
        reward_scaler: RewardScaler | None = None,
        micro_batch: int | None = None,
        masked: bool = True,
    ) -> None:
        mode = autoreset_mode(envs)
        self.envs = envs
        self.acting = acting
        self.device = acting.generator.device
        self.observation_normalizer = observation_normalizer
        self.reward_scaler = reward_scaler
        self.micro_batch = micro_batch
        self.observations = Observations(
            envs.single_observation_space,
            envs.num_envs,
            acting.network,
            self.device,
            acting.autocast,
            observation_normalizer,
        )
        network = acting.network
        self.recurrence = (
            Recurrence(network, envs.num_envs, self.device) if network.recurrent else None
        )
        self._next_step = mode == AutoresetMode.NEXT_STEP
        self._groups = groups_of(envs)
        self._begun = False
        self._noted = self._turns()
        # Why the episodes of the state that was loaded cannot go on; None if they do.
        self.unsaved: str | None = None
        # Those of a loaded state, until they go on.
        self._loaded: dict[str, Any] | None = None
        # Environments whose next step only resets (next-step autoreset).
        self._dead = np.zeros(envs.num_envs, np.bool_)
        self._masked = masked
        # Action masks (N, P) of what is shown.
        self._masks: Masks | None = None
        # What the rollout under way, or one that failed, began with.
        self._before: dict[str, Any] | None = None

    @property
    def begun(self) -> bool:
        """Whether episodes have begun, or go on, in the environments."""
        return self._begun

    def begin(self, seed: int | None) -> None:
        """Go on with the episodes of a loaded state if there are some, else start new ones.

        Raises:
            ValueError, EnvFault: The environments do not take the state; it can be tried again.
        """
        if self._begun:
            return
        if self._loaded is None:
            self.reset(seed)
            return
        try:
            self._restore(self._loaded)
        except UnsavedError as error:  # found out only by trying
            self.unsaved = str(error)
            self.reset(seed)

    def reset(self, seed: int | None) -> None:
        """Start new episodes everywhere; what a rollout that was broken off counted is undone."""
        if self._before is not None:
            self._load_statistics(self._before)
        self._begun, self._before = False, None
        shown, infos = self.envs.reset(seed=seed)
        self.observations.keep(slice(None), shown)
        self._dead[:] = False
        masks = infos.get(MASK) if self._masked else None
        self._masks = None if masks is None else masks.copy()
        if self.recurrence is not None:
            self.recurrence.starts[:] = True
        if self.reward_scaler is not None:
            self.reward_scaler.reset()
        self._begun, self._loaded = True, None
        self._noted = self._turns()

    def _turns(self) -> int:
        """How often the environments were reset or stepped so far, by whomever."""
        kinds = GuardedVectorEnv | GroupedEnvs
        return next((each.turns for each in layers(self.envs) if isinstance(each, kinds)), 0)

    def _begin_again(self) -> None:
        """Start new episodes if the running ones did not go on as was recorded, and say so."""
        cut = self._before is not None
        if cut or self._turns() != self._noted:
            why = "the last rollout was broken off" if cut else _PLAYED
            warnings.warn(f"{why}: new episodes begin", UserWarning, stacklevel=5)
            self.reset(None)

    @torch.no_grad()
    def collect(self, num_steps: int) -> Rollout:
        """Take num_steps steps in every environment.

        The values that acting does not give (all of them with a separate critic, else those of the
        last and of the final observations) come from one forward pass at the end.
        """
        self.begin(None)
        self._begin_again()
        self.acting.begin()
        self._before = self._statistics()
        started = time.perf_counter()
        memory = self.observations.room(num_steps)
        rollout = Rollout(memory, self.observations.reused, self.device)
        if self.recurrence is not None:
            rollout.memory = Remembered(self.recurrence.state, num_steps)
        try:
            # Both contexts are around all steps: weights are cast once, and torch's other threads
            # leave the cores to the environments.
            with one_thread(), self.acting.autocast():
                for step in range(num_steps + 1):
                    for group in self._groups:  # the others are stepped meanwhile
                        received = self._receive(rollout, step - 1, group) if step > 0 else None
                        if step < num_steps:
                            self._act(rollout, step, group)
                        if received is not None:
                            self._record(rollout, step - 1, group, received)
        except BaseException:
            for group in self._groups:
                if group.under_way:  # or the next rollout could not begin
                    with suppress(Exception):
                        self._receive(rollout, 0, group)
            raise
        finally:
            self._noted = self._turns()
        self._value(rollout)
        rollout.forward_seconds = time.perf_counter() - started - rollout.env_seconds
        self._before = None
        return rollout

    def _act(self, rollout: Rollout, step: int, group: Group) -> None:
        """Choose a group's actions and begin its step."""
        alive = ~self._dead[group.rows] if self._next_step else None
        shown = self.observations.show(rollout.observations, step, group.rows, alive)
        masks = None if self._masks is None else self._masks[group.rows]
        allowed = None if masks is None else to_tensor(masks, self.device)
        if rollout.memory is None or self.recurrence is None:
            actions, values, broken = self.acting(shown, allowed)
        else:
            rollout.memory.starts[step, group.rows] = self.recurrence.starts[group.rows]
            seen = self.recurrence.seen(shown, group.rows)
            (actions, values, broken), state = self.acting.unroll(seen, allowed)
            self.recurrence.advance(group.rows, state)
        if bool(broken):
            raise NonFiniteError(
                "the policy's output is NaN or Inf: lower lr or kl_clip, raise damping, or"
                " normalise observations and rewards"
            )
        numbers = actions.cpu().numpy()
        rollout.act(step, group.rows, numbers, values, masks)
        taken = to_environment(numbers, self.envs.single_action_space)
        started = time.perf_counter()
        group.under_way = True  # before, since an interrupt may come in between
        group.stepper.step_async(taken)
        rollout.env_seconds += time.perf_counter() - started

    def _receive(self, rollout: Rollout, step: int, group: Group) -> _Received:
        """Wait for a group's step, and take over what its next action needs."""
        rows, alive = group.rows, ~self._dead[group.rows]
        started = time.perf_counter()
        group.under_way = False
        following, rewards, terminated, truncated, infos = group.stepper.step_wait()
        moment = time.perf_counter()
        rollout.env_seconds += moment - started
        terminated = np.asarray(terminated, np.bool_) & alive
        ended = (terminated | np.asarray(truncated, np.bool_)) & alive
        rollout.episodes += ended_episodes(infos, moment)
        truncated = ended & ~terminated
        if truncated.any() and not self._next_step:
            places = np.flatnonzero(truncated)
            finals = self.observations.finals(infos["final_obs"], places)
            envs = rows.start + places
            rollout.finals |= {(step, int(env)): row for env, row in zip(envs, finals, strict=True)}
            if rollout.memory is not None and self.recurrence is not None:
                states = {(step, int(env)): self.recurrence.of(int(env)) for env in envs}
                rollout.memory.finals |= states
        self.observations.keep(rows, following)
        if self._masks is not None:
            self._masks[rows] = infos[MASK]
        self._dead[rows] = ended & self._next_step
        if self.recurrence is not None:
            self.recurrence.starts[rows] = ~alive if self._next_step else ended
        # Neither a reset nor a forced action (FIRE) is one that the policy chose.
        chosen = alive & ~np.asarray(infos.get("forced", False), np.bool_)
        # A copy, since the environments may use their memory again in the step that begins.
        return _Received(np.array(rewards, np.float64), alive, terminated, ended, chosen)

    def _record(self, rollout: Rollout, step: int, group: Group, received: _Received) -> None:
        """Record a group's step; its next one is under way meanwhile."""
        rewards, alive, terminated, ended, chosen = received
        rows = group.rows
        if self.reward_scaler is not None:
            rollout.rewards[step, rows] = self.reward_scaler(rewards, ended, alive, rows)
        else:
            rollout.rewards[step, rows] = rewards
        rollout.terminated[step, rows] = terminated
        rollout.ended[step, rows] = ended
        rollout.valid[step, rows] = chosen
        rollout.env_steps += int(np.count_nonzero(alive))

    def _value(self, rollout: Rollout) -> None:
        """Fill in the values that acting left out, and those of each step's true successor."""
        num, samples = self.envs.num_envs, rollout.values.numel()
        last = self.observations.ends(list(rollout.finals.values()))
        ends: Observed = last
        if rollout.memory is not None and self.recurrence is not None:
            ends = self.recurrence.ends(last, list(rollout.memory.finals.values()))
        if self.acting.gives_values:
            values = self._valued(ends)
        else:
            steps = tree_map(lambda part: part.flatten(0, 1), rollout.observations)
            pieces = self.observations.pieces(steps, last)
            values = torch.cat([self._valued(piece) for piece in pieces])
            rollout.values, values = values[:samples].view(-1, num), values[samples:]
        rollout.next_values[:-1] = rollout.values[1:]
        rollout.next_values[-1] = values[:num]
        for (step, env), value in zip(rollout.finals, values[num:], strict=True):
            rollout.next_values[step, env] = value

    def _valued(self, observations: Observed) -> Tensor:
        return outputs_of(self.acting.values, observations, self.micro_batch).float()

    def state_dict(self, unkept: str | None = None) -> dict[str, Any]:
        """Normalisers, the generator, and the episodes where the environments can be saved.

        Environments that offer ``state_dict`` continue exactly; others start new episodes, and
        ``unsaved`` says in words why. So do all in a rollout, or after one that failed; the rest
        is as it was before that. ``unkept`` is why episodes are left out although they need not be.
        """
        return {
            **(self._before or self._statistics()),
            **(self._episodes(unkept) if self._loaded is None else self._loaded),
        }

    def _episodes(self, unkept: str | None = None) -> dict[str, Any]:
        """What lives until the end of an episode."""
        envs, unsaved = None, unkept
        if unsaved is not None:
            pass
        elif self._before is not None:
            unsaved = "the checkpoint was made in the middle of a rollout that was broken off"
        elif self._begun and self._turns() != self._noted:
            unsaved = _PLAYED
        elif self.envs.closed:
            unsaved = "the environments were closed before it was saved"
        elif self._begun:
            try:
                envs = state_method(self.envs, "state_dict")()
            except UnsavedError as error:
                unsaved = str(error)
        return {
            "envs": envs,
            "unsaved": unsaved,
            "observation": None if envs is None else copy.deepcopy(self.observations.now),
            "dead": self._dead.copy(),
            "masks": None if envs is None or self._masks is None else self._masks.copy(),
            "memory": None if self.recurrence is None else self.recurrence.state_dict(),
        }

    def _statistics(self) -> dict[str, Any]:
        return {
            "observation_normalizer": _state(self.observation_normalizer),
            "reward_scaler": _state(self.reward_scaler),
            "generator": self.acting.generator.get_state(),
        }

    def _load_statistics(self, state: dict[str, Any]) -> None:
        for name in ("observation_normalizer", "reward_scaler"):
            if state[name] is not None:
                getattr(self, name).load_state_dict(state[name])
        restore_generator(self.acting.generator, state["generator"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; its episodes go on when the next ones would begin.

        Raises:
            ValueError: It does not fit; nothing is changed.
        """
        for name in ("observation_normalizer", "reward_scaler"):
            if (getattr(self, name) is None) != (state[name] is None):
                raise ValueError(f"checkpoint and configuration disagree about the {name}")
        loaded = None
        if state["envs"] is not None:
            try:
                self.check_episodes(state)
                loaded = {name: state.get(name) for name in self._episodes()}
            except UnsavedError as error:
                state = {**state, "unsaved": str(error)}
        self._load_statistics(state)
        self._begun, self._loaded, self._before = False, loaded, None
        unsaved = state.get("unsaved", "the checkpoint of an earlier version does not hold them")
        self.unsaved = unsaved if loaded is None else None

    def check_episodes(self, state: dict[str, Any]) -> None:
        """Raise ValueError, with one line, unless the episodes of a state can go on here."""
        require_like(state["observation"], self.observations.now, "the observation")
        require_like(state["dead"], self._dead, "dead")
        if state.get("masks") is not None:
            sizes = choices(self.envs.single_action_space) or ()
            require_like(state["masks"], np.ones((len(self._dead), sum(sizes)), np.bool_), "masks")
        if self.recurrence is not None:
            self.recurrence.check_state_dict(state["memory"])
        check_state(self.envs, state["envs"])

    def _restore(self, state: dict[str, Any]) -> None:
        """Go on with episodes."""
        state_method(self.envs, "load_state_dict")(state["envs"])
        fill(self.observations.now, ..., state["observation"])
        self._dead[...] = state["dead"]
        masks = state["masks"]  # which earlier versions did not write
        self._masks = None if masks is None else np.array(masks)
        if self.recurrence is not None:
            self.recurrence.load_state_dict(state["memory"])
        self._begun, self._loaded = True, None
        self._noted = self._turns()


def _state(stateful: Normalizer | RewardScaler | None) -> dict[str, Any] | None:
    return None if stateful is None else stateful.state_dict()
