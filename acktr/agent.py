"""The Python interface: an agent that learns, predicts, saves and loads."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from acktr.algorithms import Auxiliary
from acktr.compute import resolve_device
from acktr.config import Algo, Config, to_dict
from acktr.envs import (
    MASK,
    EnvLike,
    Masks,
    MaskSetting,
    Wrapper,
    as_masks,
    batched,
    choices,
    flat,
    found_masks,
)
from acktr.given import require_same, take_envs
from acktr.policies import NetworkSource, with_network
from acktr.runs.checkpoint import (
    CheckpointError,
    checkpoint_exists,
    restoring,
    save_checkpoint,
)
from acktr.runs.saved import read_agent
from acktr.train import Trainer, TrainStats

Callback = Callable[[TrainStats], bool | None]
"""Receives the statistics of each update; returning False stops the training."""


class Agent:
    """An agent of any algorithm; :class:`ACKTR`, :class:`A2C` and :class:`TRPO` fix which.

    Args:
        env: What to learn on: an environment's id; a class or function that makes a
            ``gymnasium.Env``; a list of such functions; one ``gymnasium.Env``; or a Gymnasium
            VectorEnv that declares its autoreset mode.
        config: Settings; the environment's preset if None. For environments that are made already
            and for lists, num_envs is their number.
        seed: Overrides config.seed if given.
        device: Overrides config.device if given.
        num_envs: Overrides config.num_envs if given.
        env_kwargs: Arguments of each environment, as ``gymnasium.make`` takes them, or the class
            or function; overrides config.env_kwargs if given.
        wrappers: Classes or functions around each environment, or their names as module:Name, the
            innermost first; overrides config.wrappers if given.
        record: Keys of the infos of episodes' last steps, for the ``info`` of the callback's
            episodes; overrides config.record if given.
        network: A network of one's own, or (actor, critic): a torch.nn.Module, or a class or
            function that makes one of the observation space and the action space. What it gets and
            returns is in :mod:`acktr.policies.contract`.
        auxiliary: Losses of its further outputs, by name.
        masks: Overrides config.masks unless auto: where action masks come from.

    Raises:
        EnvError: The environment cannot be made or has unsupported spaces.
        ConfigError: A setting cannot be used, or the configuration is another algorithm's.
        ValueError: The vector environment declares no supported autoreset mode.
    """

    algo: ClassVar[Algo]

    def __init__(
        self,
        env: EnvLike | VectorEnv[Any, Any, Any],
        config: Config | None = None,
        seed: int | None = None,
        device: str | None = None,
        *,
        num_envs: int | None = None,
        env_kwargs: Mapping[str, Any] | None = None,
        wrappers: Sequence[Wrapper] | None = None,
        record: Sequence[str] | None = None,
        network: NetworkSource | None = None,
        auxiliary: Mapping[str, Auxiliary] | None = None,
        masks: MaskSetting = "auto",
    ) -> None:
        keys = (record,) if isinstance(record, str) else record
        asked = {"seed": seed, "device": device, "record": keys and tuple(keys)}
        changes: dict[str, Any] = {k: value for k, value in asked.items() if value is not None}
        if masks != "auto":
            changes["masks"] = masks
        resolve_device(device or str(getattr(config, "device", "auto")))
        given = take_envs(
            env,
            config,
            self.algo,
            changes,
            num_envs=num_envs,
            env_kwargs=env_kwargs,
            wrappers=wrappers,
        )
        self.envs = given.envs
        self._owns_envs, self._env_origin = given.owned, given.origin
        try:
            self.config = config = with_network(given.config, network)
            self.trainer = Trainer(config, self.envs, network, auxiliary)
        except BaseException:
            self.close()
            raise
        self.policy = self.trainer.policy(config.seed)

    @property
    def num_timesteps(self) -> int:
        """Environment steps learned from so far."""
        return self.trainer.timesteps

    def learn(self, total_timesteps: int, callback: Callback | None = None) -> Self:
        """Train for this many more environment steps (rounded up to whole updates).

        A linear schedule runs over the steps of this call, as in Stable-Baselines3; episodes that
        an earlier call left running go on.

        Args:
            total_timesteps: Steps, summed over the parallel environments.
            callback: Called after each update; returning False stops.

        Returns:
            The agent itself.

        Raises:
            ValueError: total_timesteps is not positive.
            EnvFault, NonFiniteError, FactorError: As :meth:`Trainer.run`.
        """
        if total_timesteps < 1:
            raise ValueError(f"total_timesteps must be at least 1, got {total_timesteps}")
        start = self.trainer.timesteps
        unused = self.trainer.begin().unused
        if unused is not None:
            warnings.warn(unused, UserWarning, stacklevel=2)
        for stats in self.trainer.run(start + int(total_timesteps), start=start):
            if callback is not None and callback(stats) is False:
                break
        return self

    def predict(
        self,
        observation: Any,
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = False,
        action_masks: Any = None,
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        """Action of one observation, or actions of a batch of them.

        Args:
            observation: Raw observation (*shape) or batch (N, *shape), as the environment gives it,
                with a dict or tuple of arrays for Dict and Tuple spaces.
            state: Recurrent state; passed through, the networks have none.
            episode_start: Ignored, for recurrent policies.
            deterministic: The most likely action instead of a sample.
            action_masks: Mask (P,) of the observation, or (N, P) of the batch, in the forms of
                :mod:`acktr.envs.masks`; all actions are allowed if None.

        Returns:
            Action or actions as the environment takes them, and the state.

        Raises:
            ValueError: The observation has another shape or other parts than the environment's, or
                the mask is unfit.
        """
        batch, alone = batched(self.policy.observation_space, observation)
        actions = self.policy.act(batch, deterministic, self._allowed(batch, alone, action_masks))
        return actions[0] if alone else actions, state

    def _allowed(self, batch: Any, alone: bool, action_masks: Any) -> Masks | None:
        """Masks (N, P) of a batch of observations as booleans."""
        sizes = choices(self.policy.action_space)
        inside = self.config.masks in ("auto", "observation") and sizes is not None
        if action_masks is None and inside and isinstance(batch, dict):
            action_masks, alone = batch.get(MASK), False
        if action_masks is None:
            if found_masks(self.envs).source is not None:
                warnings.warn(
                    "predict was called without action_masks in an environment that has some: the"
                    " action may be a forbidden one",
                    UserWarning,
                    stacklevel=3,
                )
            return None
        if sizes is None:
            kind = type(self.policy.action_space).__name__
            raise ValueError(f"action_masks are for Discrete and MultiDiscrete actions, not {kind}")
        arrays = flat(self.policy.observation_space, batch)
        rows = len(next(iter(arrays.values())) if isinstance(arrays, dict) else arrays)
        try:
            masks = as_masks(action_masks, sizes, () if alone else (rows,))
        except ValueError as error:
            raise ValueError(f"action_masks cannot be used: {error}") from error
        return masks[None] if alone else masks

    def save(self, path: str | Path) -> None:
        """Write everything to a folder (safetensors and JSON with hashes).

        Raises:
            CheckpointError: The folder cannot be written.
        """
        meta = {
            "format": "acktr-agent",
            "config": to_dict(self.config),
            "env_origin": self._env_origin,
        }
        save_checkpoint(Path(path), self.trainer.state_dict(), meta)

    @classmethod
    def load(
        cls,
        path: str | Path,
        env: EnvLike | VectorEnv[Any, Any, Any] | None = None,
        *,
        device: str | None = None,
        num_envs: int | None = None,
        env_kwargs: Mapping[str, Any] | None = None,
        wrappers: Sequence[Wrapper] | None = None,
        network: NetworkSource | None = None,
        auxiliary: Mapping[str, Auxiliary] | None = None,
    ) -> Self:
        """Read an agent written by :meth:`save`, or the checkpoint of a training run.

        Args:
            path: The folder, or a run's folder.
            env: What to learn on, as the constructor takes it, with the saved arguments and
                wrappers unless others are given. None: the saved environment id, made anew; an
                agent of other environments than an id's needs them again.
            device: Overrides the saved device.
            num_envs: Overrides the saved number of environments.
            env_kwargs: Arguments of each environment given.
            wrappers: Wrappers of each environment given.
            network: The network of one's own that was trained: a checkpoint has its weights and
                its name, and imports nothing.
            auxiliary: The auxiliary losses that it was trained with.

        Raises:
            CheckpointError: The folder is damaged, foreign, or fits another environment, algorithm
                or network; or its environments cannot be made again.
            ConfigError: There is no such device, or other arguments than the saved ones are given
                without an environment.
        """
        folder = Path(path)
        last = folder / "checkpoints" / "last"
        saved = read_agent(last if checkpoint_exists(last) else folder)
        config = saved.config
        if config.algo != cls.algo:
            raise CheckpointError(
                f"{path}: an agent trained by {config.algo}; use {config.algo.upper()}.load"
            )
        if config.network.custom is not None and network is None:
            raise CheckpointError(
                f"{path}: trained with the network {config.network.custom}: pass it as network="
            )
        if env is None:
            saved.require_env()
            require_same(config, env_kwargs, wrappers)
            env = config.env
        elif isinstance(env, str) and env != config.env:
            config = dataclasses.replace(config, env=env, env_kwargs={}, wrappers=())
        agent = cls(
            env,
            config,
            device=device,
            num_envs=num_envs,
            env_kwargs=env_kwargs,
            wrappers=wrappers,
            network=network,
            auxiliary=auxiliary,
        )
        try:
            with restoring(saved.path):
                agent.trainer.load_state_dict(saved.state)
        except CheckpointError:
            agent.close()
            raise
        return agent

    def close(self) -> None:
        """Close the environments, if the agent made them."""
        if self._owns_envs:
            self.envs.close()


class ACKTR(Agent):
    """An agent trained by ACKTR (Wu et al. 2017); arguments as :class:`Agent`."""

    algo = "acktr"


class A2C(Agent):
    """An agent trained by A2C (Mnih et al. 2016); arguments as :class:`Agent`."""

    algo = "a2c"


class TRPO(Agent):
    """An agent trained by TRPO (Schulman et al. 2015); arguments as :class:`Agent`."""

    algo = "trpo"
