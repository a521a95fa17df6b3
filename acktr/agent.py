"""The Python interface: an agent that learns, predicts, saves and loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

from gymnasium import Env
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from acktr.compute import resolve_device
from acktr.config import Algo, Config, ConfigError, preset, to_dict
from acktr.envs import EnvError, GuardedVectorEnv, batched, check_spaces
from acktr.runs.checkpoint import (
    CheckpointError,
    checkpoint_exists,
    restoring,
    save_checkpoint,
)
from acktr.runs.saved import read_agent
from acktr.train import Trainer, TrainStats, training_envs

Callback = Callable[[TrainStats], bool | None]
"""Receives the statistics of each update; returning False stops the training."""


class Agent:
    """An agent of any algorithm; :class:`ACKTR`, :class:`A2C` and :class:`TRPO` fix which.

    Args:
        env: Environment id, or a Gymnasium VectorEnv that declares its autoreset mode.
        config: Settings; the environment's preset if None. For a VectorEnv, num_envs is its own.
        seed: Overrides config.seed if given.
        device: Overrides config.device if given.

    Raises:
        EnvError: The environment cannot be made or has unsupported spaces.
        ConfigError: A setting cannot be used, or the configuration is another algorithm's.
        ValueError: The vector environment declares no supported autoreset mode.
    """

    algo: ClassVar[Algo]

    def __init__(
        self,
        env: str | VectorEnv[Any, Any, Any],
        config: Config | None = None,
        seed: int | None = None,
        device: str | None = None,
    ) -> None:
        if isinstance(env, Env):
            raise EnvError(
                f"{_env_id(env)} is given as one gymnasium.Env: give its id, or a VectorEnv as"
                " gymnasium.make_vec returns it"
            )
        name = env if isinstance(env, str) else _env_id(env)
        config = config or preset(name, self.algo)[0]
        if config.algo != self.algo:
            raise ConfigError(
                f"algo is {config.algo!r} in the configuration: use {config.algo.upper()}"
            )
        if isinstance(env, str) and config.env != env:
            raise ConfigError(f"env is {env!r} but the configuration is for {config.env!r}")
        if seed is not None:
            config = dataclasses.replace(config, seed=seed)
        if device is not None:
            config = dataclasses.replace(config, device=device)
        resolve_device(config.device)
        self._owns_envs = isinstance(env, str)
        if isinstance(env, str):
            self.envs = training_envs(config)
        else:
            check_spaces(env.single_observation_space, env.single_action_space)
            config = dataclasses.replace(config, env=name, num_envs=env.num_envs)
            self.envs = _guarded(env, name, config.seed)
        self.config = config
        self.trainer = Trainer(config, self.envs)
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
        for stats in self.trainer.run(start + total_timesteps, start=start):
            if callback is not None and callback(stats) is False:
                break
        return self

    def predict(
        self,
        observation: Any,
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = False,
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        """Action of one observation, or actions of a batch of them.

        Args:
            observation: Raw observation (*shape) or batch (N, *shape), as ``envs`` gives it, with a
                dict or tuple of arrays for Dict and Tuple spaces (Discrete spaces of environments
                made from an id start at zero).
            state: Recurrent state; passed through, the networks have none.
            episode_start: Ignored, for recurrent policies.
            deterministic: The most likely action instead of a sample.

        Returns:
            Action or actions as the environment takes them, and the state.

        Raises:
            ValueError: The observation has another shape or other parts than the environment's.
        """
        batch, alone = batched(self.policy.observation_space, observation)
        actions = self.policy.act(batch, deterministic)
        return actions[0] if alone else actions, state

    def save(self, path: str | Path) -> None:
        """Write everything to a folder (safetensors and JSON with hashes).

        Raises:
            CheckpointError: The folder cannot be written.
        """
        meta = {"format": "acktr-agent", "config": to_dict(self.config)}
        save_checkpoint(Path(path), self.trainer.state_dict(), meta)

    @classmethod
    def load(
        cls,
        path: str | Path,
        env: VectorEnv[Any, Any, Any] | None = None,
        *,
        device: str | None = None,
    ) -> Self:
        """Read an agent written by :meth:`save`, or the checkpoint of a training run.

        Args:
            path: The folder, or a run's folder.
            env: Vector environment to use; the saved environment id is made anew if None.
            device: Overrides the saved device.

        Raises:
            CheckpointError: The folder is damaged, foreign, or fits another environment or
                algorithm.
            ConfigError: There is no such device.
        """
        folder = Path(path)
        last = folder / "checkpoints" / "last"
        saved = read_agent(last if checkpoint_exists(last) else folder)
        config = saved.config
        if config.algo != cls.algo:
            raise CheckpointError(
                f"{path}: an agent trained by {config.algo}; use {config.algo.upper()}.load"
            )
        agent = cls(config.env if env is None else env, config, device=device)
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


def _env_id(env: VectorEnv[Any, Any, Any] | Env[Any, Any]) -> str:
    return env.spec.id if env.spec is not None else type(env.unwrapped).__name__


def _guarded(env: VectorEnv[Any, Any, Any], name: str, seed: int) -> VectorEnv[Any, Any, Any]:
    """Add finite checks and episode statistics unless the environment has them from make_vec."""
    layer: Any = env
    while layer is not None:
        if getattr(type(layer), "reports_episodes", False):
            return env
        layer = getattr(layer, "env", None)
    return GuardedVectorEnv(env, name, seed, foreign=True)
