"""The training loop: yields statistics, knows nothing of logging, checkpoints or progress."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from gymnasium.vector import VectorEnv

from acktr.algorithms import (
    A2CLearner,
    ACKTRLearner,
    Auxiliary,
    Learner,
    TRPOLearner,
    checked_auxiliary,
)
from acktr.apart import apart
from acktr.compute import autocast_context, resolve_device, seeded, threads_for
from acktr.config import Algo, Config, LearningRate, check_recurrent
from acktr.envs import FoundMasks, found_masks, pictures, space_difference, space_facts
from acktr.policies import (
    ActorCritic,
    MergedMoments,
    NetworkSource,
    Policy,
    RewardScaler,
    action_head,
    build_network,
    free_deviation,
    observation_normalizer,
    require_fitting,
    require_size,
    saved_parameters,
)
from acktr.rollout import Acting, Batch, Collector, NonFiniteError, Rollout, make_batch
from acktr.world import UNKEPT, World, require_alone, with_episodes

_LEARNERS: dict[Algo, type[ACKTRLearner | A2CLearner | TRPOLearner]] = {
    "acktr": ACKTRLearner,
    "a2c": A2CLearner,
    "trpo": TRPOLearner,
}

Doing = Literal["nothing", "collecting", "learning"]


@dataclass(frozen=True)
class Episode:
    """One finished episode, in the environment's own (unclipped, unscaled) reward."""

    reward: float
    """Sum of rewards."""
    length: int
    """Steps."""
    seconds: float
    """Wall-clock seconds of training when it ended, earlier sessions included."""
    info: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Numbers that the info of its last step had by the keys of ``config.record``."""


@dataclass(frozen=True)
class TrainStats:
    """The report of one update."""

    timesteps: int
    """Environment steps so far."""
    updates: int
    """Updates so far."""
    metrics: dict[str, float]
    """Scalars by TensorBoard tag, for example train/approx_kl, kfac/min_eig, time/fps."""
    episodes: tuple[Episode, ...]
    """Episodes that ended during this update's rollout."""


class Trainer:
    """Everything that learns: environments, network, rollout, learner and counters.

    Args:
        config: The run.
        envs: Vector environment; the caller closes it.
        network: One of one's own (:mod:`acktr.policies.contract`), in place of the configuration's.
        auxiliary: Losses of its further outputs, by name.
        learning_rate: Step size of the policy in place of the configuration's; see
            :class:`acktr.agent.Agent`.
        world: The processes that train together, of which this one has a part of the environments;
            None for one process.

    Raises:
        ConfigError: The device is absent, the network does not keep the contract, something was not
            made for several processes, or there are several without a world.
        ValueError: Unsupported spaces or autoreset mode.
    """

    def __init__(
        self,
        config: Config,
        envs: VectorEnv[Any, Any, Any],
        network: NetworkSource | None = None,
        auxiliary: Mapping[str, Auxiliary] | None = None,
        learning_rate: LearningRate | None = None,
        world: World | None = None,
    ) -> None:
        if world is None:
            require_alone()
        ranks = None if world is None else world.ranks
        self.config = config
        self.world = None if ranks is None or ranks.size == 1 else world
        self.helped = ranks is not None and ranks.helped
        """Whether another process decomposes for this one."""
        self.auxiliary = checked_auxiliary(auxiliary, config.micro_batch)
        self.envs = envs
        device = resolve_device(config.device)
        self.device = device if world is None else world.device(device)
        space = envs.single_observation_space
        self.head = action_head(envs.single_action_space)
        require_size(space, self.head, config, envs.num_envs)
        self.network = self._initial(network)
        if self.world is not None:
            self.world.begin(config, self.network, self.auxiliary)
        seen = pictures(space, config.network.channels)
        if self.network.recurrent:
            check_recurrent(config)
        self.precision, autocast = autocast_context(self.device, config.precision, bool(seen))
        acting_noise, learning_noise = _noise(config.seed, self.device)
        observations = observation_normalizer(space, config)
        rewards = RewardScaler(envs.num_envs, config.gamma) if config.normalize_reward else None
        place = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        acting = Acting(self.network, self.head, acting_noise, autocast, config.compile, place)
        masked = config.masks is not None
        self.collector = Collector(envs, acting, observations, rewards, config.micro_batch, masked)
        self.learner: Learner = _LEARNERS[config.algo](
            self.network, self.head, config, learning_noise, autocast, self.auxiliary, ranks
        )
        self._merged: MergedMoments | None = None
        if self.world is not None:
            shared = self.world.ranks
            self._merged = MergedMoments.of(observations, rewards, shared, self.device)
        self.learner.learning_rate = learning_rate
        self.timesteps, self.updates, self.restarts, self.seconds = 0, 0, 0, 0.0
        self.begun = 0
        """Steps at which the schedules began."""
        self.restarted: str | None = None
        self._idle = False
        self.doing: Doing = "nothing"
        """What :meth:`run` does; after an error, what it did then."""
        self.asked: Callable[[], int | None] = lambda: None
        """Says which signal this process got; asked in every update of several processes."""
        self._held: dict[str, Any] | None = None
        self.stop: int | None = None
        """The signal that one of several processes got before the last update."""

    def _initial(self, network: NetworkSource | None) -> ActorCritic:
        """A network of the seed alone, on which torch's own generator does not depend either."""
        with seeded(self.config.seed), self.threads():
            return build_network(
                self.envs.single_observation_space,
                self.head,
                self.config.network,
                network,
                action_space=self.envs.single_action_space,
                auxiliary=tuple(self.auxiliary),
                device=self.device,
            )

    def threads(self) -> AbstractContextManager[None]:
        """Context with as many of torch's threads as the network is worth; they come back."""
        return threads_for(self.envs.single_observation_space, self.config.network.channels)

    @property
    def described(self) -> str:
        """Algorithm, environments, device, precision and threads in words."""
        config = self.config
        with self.threads():
            threads = torch.get_num_threads()
        return (
            f"{config.algo} in {config.num_envs} x {config.env}, device {self.device}, precision"
            f" {self.precision}, torch threads {threads}"
        )

    def begin(self) -> FoundMasks:
        """Begin episodes, or go on with loaded ones, unless that is done; :meth:`run` does so too.

        Where episodes of a checkpoint cannot go on, ``restarted`` says why from then on, and the
        metric ``rollout/restarts`` counts.

        Returns:
            The action masks that the environments were found to have.

        Raises:
            EnvError: They do not have those that are asked for.
            EnvFault: An environment failed.
        """
        if not self.collector.begun:
            self.collector.begin(self.config.seed + self.timesteps)
            why = self.collector.unsaved
            if why is not None and self.timesteps > 0:
                self.restarts += 1
                self.restarted = f"environments start new episodes: {why}"
        return found_masks(self.envs)

    def run(self, total_timesteps: int, start: int | None = None) -> Iterator[TrainStats]:
        """Train until ``timesteps`` reaches the total, yielding after every update.

        The state may be saved whenever the generator is suspended, and also while it collects, or
        after an error in that: it is that of the last update then. Schedules run from start to the
        total; None: from where they began before, also in the session that a state was saved in.

        Raises:
            EnvFault: An environment returned NaN or Inf.
            NonFiniteError: The network did.
            FactorError: K-FAC cannot go on.
            RankError: Another of several processes cannot.
            CriticError: The process in which the critic learns cannot.
        """
        self.begin()
        self.begun = self.begun if start is None else start
        with apart(self.learner, self.config, self.envs):
            yield from self._updates(total_timesteps, self.begun)

    def _updates(self, total_timesteps: int, start: int) -> Iterator[TrainStats]:
        """All updates until then."""
        config = self.config
        origin = time.perf_counter() - self.seconds
        while self.timesteps < total_timesteps:
            started = time.perf_counter()
            progress = (self.timesteps - start) / (total_timesteps - start)
            with self.threads():  # for this update: in between torch is the caller's
                self.doing = "collecting"
                rollout = self._collected()
                batch = make_batch(rollout, config.gamma, config.gae_lambda, self.device)
                episodes = [
                    Episode(end.reward, end.length, end.moment - origin, end.info)
                    for end in rollout.episodes
                ]
                steps = rollout.env_steps
                if self.world is None:
                    self.doing = "learning"
                    self._require_finite(bool(torch.isfinite(batch.returns).all()))
                else:
                    batch, steps, episodes = self._joined(self.world, rollout, batch, episodes)
                # One sample has no variance to learn from: resets may have taken all other steps.
                metrics = self.learner.update(batch, progress) if batch.total > 1 else {}
            if batch.total <= 1 and steps > 0:
                self._tell_idle(steps, batch.total)
            self.timesteps += steps
            self.updates += 1
            self.seconds = time.perf_counter() - origin
            self.doing = "nothing"
            if self.restarts:
                metrics["rollout/restarts"] = float(self.restarts)
            if (deviation := free_deviation(self.network)) is not None:
                metrics["train/std"] = deviation
            metrics["time/env"] = rollout.env_seconds
            metrics["time/forward"] = rollout.forward_seconds
            metrics["time/fps"] = steps / (time.perf_counter() - started)
            yield TrainStats(self.timesteps, self.updates, metrics, tuple(episodes))

    def _collected(self) -> Rollout:
        """The next rollout; the other ranks, who wait for it, are told where there is none."""
        self._held = None if self.world is None else self.collector.state_dict(UNKEPT)
        try:
            return self.collector.collect(self.config.num_steps)
        except Exception:
            if self.world is not None:
                self.world.fail(self.device)
            raise

    def _joined(
        self, world: World, rollout: Rollout, batch: Batch, episodes: list[Episode]
    ) -> tuple[Batch, int, list[Episode]]:
        """The batch as a share of that of all ranks, and the steps and episodes of all."""
        keys = self.config.record
        numbers = [
            (e.reward, float(e.length), e.seconds, *(e.info[key] for key in keys)) for e in episodes
        ]
        found = world.joined(rollout, batch, self.network, self.asked(), numbers)
        self.doing, self._held = "learning", None
        self._require_finite(found.finite)
        if self._merged is not None:
            self._merged.merge()
        self.stop = found.stop
        every = [
            Episode(reward, int(length), seconds, dict(zip(keys, info, strict=True)))
            for reward, length, seconds, *info in found.episodes
        ]
        return found.batch, found.env_steps, sorted(every, key=lambda one: one.seconds)

    def _require_finite(self, finite: bool) -> None:
        """Stop before anything is learned from NaN or Inf."""
        if not finite:
            raise NonFiniteError(
                f"the value function is NaN or Inf at step {self.timesteps}: lower lr or"
                " kl_clip, raise damping, or normalise rewards"
            )

    def _tell_idle(self, steps: int, samples: int) -> None:
        """Warn, once, of a rollout that nothing could be learned from."""
        if not self._idle:
            warnings.warn(
                f"the update at step {self.timesteps + steps} was skipped, as {samples} of its"
                f" {steps} steps can be learned from and 2 are needed (not steps that reset, nor"
                " those whose action the environment forced): raise num_steps",
                UserWarning,
                stacklevel=2,
            )
        self._idle = True

    def settle(self) -> None:
        """Wait for a critic that learns in another process, so that its parameters are here.

        Only who reads parameters while :meth:`run` is suspended needs it: a critic that is asked
        for values or for its state_dict() waits by itself.
        """
        if isinstance(self.learner, ACKTRLearner):
            self.learner.settle()

    @property
    def _spaces(self) -> dict[str, Any]:
        envs = self.envs
        return space_facts(envs.single_observation_space, envs.single_action_space)

    def policy(self, seed: int) -> Policy:
        """The policy as it is at any moment, with frozen statistics and its own action noise."""
        return Policy(
            self.network,
            self.envs.single_observation_space,
            self.envs.single_action_space,
            self.collector.observation_normalizer,
            seed,
            self.config.network.channels,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later session needs to go on, in several processes without episodes."""
        self.settle()
        unkept = None if self.world is None else UNKEPT
        auxiliary = {"auxiliary": list(self.auxiliary)} if self.auxiliary else {}
        return {
            "network": saved_parameters(self.network),
            "learner": self.learner.state_dict(),
            "collector": self._held or self.collector.state_dict(unkept),
            "timesteps": self.timesteps,
            "updates": self.updates,
            "begun": self.begun,
            "seconds": self.seconds,
            "restarts": self.restarts,
            "spaces": self._spaces,
            **auxiliary,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Environments go on with their episodes when :meth:`begin` is called. Those that have no
        state start new ones, seeded by the seed and the number of steps done.

        Raises:
            ValueError: The state belongs to another network, algorithm or environment.
        """
        if (other := space_difference(state.get("spaces"), self._spaces)) is not None:
            raise ValueError(other)
        names = state.get("auxiliary", [])
        if names != list(self.auxiliary):
            raise ValueError(
                f"it was trained with the auxiliary losses {', '.join(names) or 'none'}, not"
                f" {', '.join(self.auxiliary) or 'none'}: pass the same as auxiliary="
            )
        saved = state["network"]
        require_fitting(self.network, saved)
        ranks = None if self.world is None else self.world.ranks
        rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        self.learner.load_state_dict(state["learner"])
        self.collector.load_state_dict(with_episodes(state["collector"], rank, size))
        self.network.load_state_dict(saved)
        if self._merged is not None:
            self._merged.begin()
        self.timesteps = int(state["timesteps"])
        self.updates = int(state["updates"])
        self.begun = int(state.get("begun", 0))  # which earlier versions did not write
        self.seconds = float(state["seconds"])
        self.restarts = int(state.get("restarts", 0))  # which earlier versions did not write
        self.restarted = None


def _noise(seed: int, device: torch.device) -> tuple[torch.Generator, torch.Generator]:
    """Generators of acting and of learning.

    How often one of them draws does not change the numbers of the other.
    """
    acting, learning = (torch.Generator(device).manual_seed(2 * seed + part) for part in (1, 2))
    return acting, learning
