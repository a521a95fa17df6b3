"""The peers themselves: environments, normalisation and model, as stable-baselines3 wants them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import sb3_contrib
import stable_baselines3
from numpy.typing import NDArray
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import nn, optim

from acktr.envs import MASK, AnyVectorEnv
from scripts.common import ScriptError
from scripts.peers.settings import A2C, PPO, TRPO, MaskablePPO, Settings

_ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU}
_ALGORITHMS = {
    A2C: stable_baselines3.A2C,
    TRPO: sb3_contrib.TRPO,
    PPO: stable_baselines3.PPO,
    MaskablePPO: sb3_contrib.MaskablePPO,
}
_CLIP = 10.0
_ASKS_MASKS = "action_masks"

Array = NDArray[Any]


class PeerEnvs(VecEnv):
    """Our parallel environments behind the interface of stable-baselines3.

    So the peers get the same environments, seeds and checks as our runs. Ended episodes are in
    ``infos[i]["episode"]`` with the environment's own reward. Action masks, where there are some,
    are handed out as sb3-contrib asks for them.

    Args:
        envs: Of ``envs.make_vec``; closed by the caller.
        masked: Whether the model takes action masks.
    """

    def __init__(self, envs: AnyVectorEnv, masked: bool = True) -> None:
        self._envs = envs
        self._masked = masked
        self._actions: Array | None = None
        self._masks: Array | None = None
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> Array:
        """First observations; the seed is the one that the environments were made with.

        Raises:
            ScriptError: There are masks, and the model takes none.
        """
        obs, found = self._envs.reset()
        self._masks = found.get(MASK)
        if self._masks is not None and not self._masked:
            raise ScriptError("the environment has action masks: the peer is sb3-maskable-ppo")
        return np.array(obs)

    def step_async(self, actions: Array) -> None:
        """Remember the actions; those that are no numbers are the policy's fault, not the game's.

        Raises:
            ArithmeticError: An action is NaN or Inf.
        """
        if not np.isfinite(actions).all():
            raise ArithmeticError("the policy's actions are NaN or Inf")
        self._actions = actions

    def step_wait(self) -> tuple[Array, Array, Array, list[dict[str, Any]]]:
        """Step all environments; an ended episode's successor has begun."""
        obs, rewards, terminated, truncated, found = self._envs.step(self._actions)
        self._masks = found.get(MASK)
        dones = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for index in np.flatnonzero(dones):
            infos[index] = {
                "terminal_observation": np.array(found["final_obs"][index]),
                "TimeLimit.truncated": bool(truncated[index] and not terminated[index]),
                "episode": {key: float(found["episode"][key][index]) for key in ("r", "l", "t")},
            }
        return np.array(obs), rewards.astype(np.float32), dones, infos

    def close(self) -> None:
        """Nothing: the environments are the caller's."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The render mode, and whether there are masks; others are not handed out."""
        if attr_name != "render_mode" and (attr_name != _ASKS_MASKS or self._masks is None):
            raise AttributeError(attr_name)
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refused."""
        raise AttributeError(attr_name)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> Any:
        """The present action masks; all else is refused."""
        if method_name != _ASKS_MASKS or self._masks is None:
            raise AttributeError(method_name)
        return list(self._masks)

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        """No environment is wrapped in the library's sense."""
        return [False] * self.num_envs


def linear(lr: float, batch_part: float) -> Callable[[float], float]:
    """The step size of every update as our linear schedule has it.

    The library asks after a batch was collected, with the part of the steps that remains; our
    schedule counts the steps done before the batch: lr at the first update.

    Args:
        lr: At the first update.
        batch_part: Steps of a batch over all steps.
    """
    return lambda remaining: lr * min(1.0, max(0.0, remaining + batch_part))


def make_model(
    settings: Settings, envs: AnyVectorEnv, seed: int, total_timesteps: int
) -> tuple[OnPolicyAlgorithm, VecNormalize]:
    """A model ready to learn, and its environments' normalisation.

    Args:
        settings: What to build.
        envs: Of ``envs.make_vec`` with ``settings.num_envs`` environments.
        seed: Of weights and action noise.
        total_timesteps: Length of the schedule.
    """
    normalized = VecNormalize(
        PeerEnvs(envs, masked=isinstance(settings.algorithm, MaskablePPO)),
        norm_obs=settings.normalize_observation,
        norm_reward=settings.normalize_reward,
        clip_obs=_CLIP,
        clip_reward=_CLIP,
        gamma=settings.gamma,
    )
    lr: float | Callable[[float], float] = settings.optimizer.lr
    if settings.optimizer.lr_schedule == "linear":
        batch = settings.num_envs * settings.num_steps
        lr = linear(settings.optimizer.lr, batch / total_timesteps)
    with warnings.catch_warnings():
        # Published settings have minibatches that do not divide the batch.
        warnings.filterwarnings("ignore", message="You have specified a mini-batch size")
        model = make_on(settings, normalized, lr, seed)
    model.set_logger(Logger(folder=None, output_formats=[]))
    return model, normalized


def make_on(
    settings: Settings,
    envs: VecNormalize,
    lr: float | Callable[[float], float],
    seed: int,
) -> OnPolicyAlgorithm:
    """A model ready to learn on any environments of the library.

    Args:
        settings: What to build; its schedule and normalisation are the caller's.
        envs: Environments.
        lr: Step size, or step size by the part of the steps that remains.
        seed: Of weights and action noise.
    """
    algorithm = settings.algorithm
    of: Any = _ALGORITHMS[type(algorithm)]
    model: OnPolicyAlgorithm = of(
        "MlpPolicy",
        envs,
        learning_rate=lr,
        n_steps=settings.num_steps,
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
        normalize_advantage=settings.normalize_advantage,
        policy_kwargs=_policy(settings),
        seed=seed,
        device="cpu",
        **asdict(algorithm),
    )
    return model


def _policy(settings: Settings) -> dict[str, Any]:
    """Constructor arguments of the policy, which owns network and optimizer."""
    network, optimizer = settings.network, settings.optimizer
    arguments: dict[str, Any] = {"eps": optimizer.eps}
    if optimizer.alpha is not None:
        arguments["alpha"] = optimizer.alpha
    # There are no masks of continuous actions, and so no deviation.
    masked = isinstance(settings.algorithm, MaskablePPO)
    return {
        "net_arch": {"pi": list(network.hidden), "vf": list(network.critic_hidden)},
        "activation_fn": _ACTIVATIONS[network.activation],
        "ortho_init": network.ortho_init,
        **({} if masked else {"log_std_init": network.log_std_init}),
        "optimizer_class": optim.Adam if optimizer.name == "adam" else RMSpropTFLike,
        "optimizer_kwargs": arguments,
    }
