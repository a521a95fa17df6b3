"""The algorithms of stable-baselines3 on that library's own environments."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import ale_py
import gymnasium
import stable_baselines3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecFrameStack,
    VecNormalize,
)

from scripts.bench.cases import Case, Timing
from scripts.bench.measure import Windows, peak_mib
from scripts.peers.models import make_on
from scripts.peers.settings import read_settings

_ENDLESS = 10**12
_SEED = 0
_STACK = 4


class _Marks(BaseCallback):
    """Tells the windows when an update has ended, and stops training after the last one."""

    def __init__(self, windows: Windows) -> None:
        super().__init__()
        self._windows = windows

    def _on_rollout_start(self) -> None:
        if self.num_timesteps > 0:
            self._windows.end_update(self.num_timesteps)

    def _on_step(self) -> bool:
        return not self._windows.done


def measure_peer(case: Case, timing: Timing) -> dict[str, Any]:
    """Train it.

    Returns:
        JSON values of :class:`Windows`, and the ``peak_mib`` of all processes.
    """
    model = _atari_model(case) if case.kind == "atari peer" else _mujoco_model(case)
    model.set_logger(Logger(folder=None, output_formats=[]))
    windows = Windows(timing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.learn(_ENDLESS, callback=_Marks(windows), log_interval=_ENDLESS)
        return windows.result() | {"peak_mib": peak_mib()}
    finally:
        assert model.env is not None
        model.env.close()


def _atari_model(case: Case) -> OnPolicyAlgorithm:
    """On the library's Atari environments: its wrapper, four frames, one or many processes."""
    values, where = case.settings["values"], case.settings["where"]
    vectors = SubprocVecEnv if where == "SubprocVecEnv" else DummyVecEnv
    games = make_atari_env(partial(_game, case.env), case.num_envs, _SEED, vec_env_cls=vectors)
    of: Any = stable_baselines3.PPO
    common: dict[str, Any] = {"n_steps": case.num_steps, "seed": _SEED, "device": "cpu"}
    if case.settings["peer"] == "sb3-a2c":
        of = stable_baselines3.A2C
        optimizer = {"optimizer_class": RMSpropTFLike}
        common["policy_kwargs"] = optimizer | {"optimizer_kwargs": {"eps": values["rms_eps"]}}
    model: OnPolicyAlgorithm = of(
        "CnnPolicy", VecFrameStack(games, _STACK), **common, **values["model"]
    )
    return model


def _game(env_id: str) -> gymnasium.Env[Any, Any]:
    """One game without skipped frames, which the wrapper skips; also in a process of its own."""
    gymnasium.register_envs(ale_py)
    return gymnasium.make(env_id, frameskip=1)


def _mujoco_model(case: Case) -> OnPolicyAlgorithm:
    """On the library's vector environment, in this process, and normalisation."""
    settings = read_settings(case.settings["peer"], case.settings["values"])
    envs = VecNormalize(
        make_vec_env(case.env, case.num_envs, _SEED),
        norm_obs=settings.normalize_observation,
        norm_reward=settings.normalize_reward,
        gamma=settings.gamma,
    )
    return make_on(settings, envs, settings.optimizer.lr, _SEED)
