"""Starting configurations by environment: exact id, then family, then default."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable

from acktr.config.network import NetworkConfig
from acktr.config.schema import ConfigError
from acktr.config.settings import (
    ACKTRConfig,
    Algo,
    Config,
    CriticConfig,
    SampledKFACConfig,
    TRPOConfig,
)
from acktr.envs import EnvError, PixelSettings, is_atari

ALGOS: tuple[Algo, ...] = typing.get_args(Algo)
"""Algorithms that --algo takes."""

PRESETS = ("default", "family", "paper")
"""Names that --preset takes: our values, with those that exact ids have of their own; our values
for the family of the environment, the same for all of it; or the published ones."""

_MUJOCO = re.compile(
    r"^(Ant|HalfCheetah|Hopper|Humanoid|HumanoidStandup|InvertedDoublePendulum|InvertedPendulum"
    r"|Pusher|Reacher|Swimmer|Walker2d)(-v\d+)?$"
)


def _atari(env: str) -> Config:
    """Shared 32-64-32-512 network, joint Fisher, 32 x 20 samples (Wu et al. 2017)."""
    return Config(
        env=env,
        total_timesteps=10_000_000,
        num_envs=32,
        num_steps=20,
        gae_lambda=1.0,
        ent_coef=0.01,
        vf_coef=0.25,
        checkpoint_freq=500_000,
        network=NetworkConfig(shared=True),
        acktr=ACKTRConfig(
            actor=SampledKFACConfig(
                lr=0.25,
                kl_clip=0.001,
                structure="cholesky",
                stat_fraction=0.125,
                stat_interval=2,
                cold_steps=10,
            )
        ),
    )


def _atari_paper(env: str) -> Config:
    """The first public release's values: value Fisher 4, lr 0.25 linear, 11 cold steps at 0.25."""
    base = _atari(env)
    actor = dataclasses.replace(
        base.acktr.actor,
        structure="kfac",
        stat_fraction=1.0,
        stat_interval=1,
        cold_steps=11,
        cold_lr=0.25,
    )
    acktr = dataclasses.replace(base.acktr, actor=actor, value_sigma=0.5)
    return dataclasses.replace(base, acktr=acktr)


def _mujoco(env: str) -> Config:
    """Separate tanh networks; the policy's KL predicted exactly, 0.01 until the lr decays."""
    return Config(
        env=env,
        total_timesteps=1_000_000,
        num_envs=8,
        num_steps=128,
        gae_lambda=0.95,
        normalize_advantage=True,
        normalize_observation=True,
        normalize_reward=True,
        network=NetworkConfig(shared=False, log_std_init=-1.0),
        acktr=ACKTRConfig(
            actor=SampledKFACConfig(
                lr=0.1, kl_clip=0.02, quadratic="exact", momentum=0.0, refresh_interval=1
            ),
            critic=SampledKFACConfig(
                lr=0.3,
                kl_clip=0.3,
                damping=0.1,
                stat_decay=0.77,
                stat_interval=5,
                refresh_interval=5,
            ),
            critic_steps=20,
            lr_schedule="linear",
        ),
    )


def _mujoco_paper(env: str) -> Config:
    """The authors' MuJoCo values: one environment, 2500 steps, KL 0.002, 25 ELU-critic steps."""
    return Config(
        env=env,
        total_timesteps=1_000_000,
        num_envs=1,
        num_steps=2500,
        gae_lambda=0.97,
        normalize_advantage=True,
        normalize_observation=True,
        network=NetworkConfig(shared=False, critic_activation="elu", policy_gain=0.1),
        acktr=ACKTRConfig(
            actor=SampledKFACConfig(
                lr=0.03, kl_clip=0.01, refresh_interval=2, cold_steps=2, cold_lr=0.003
            ),
            critic=SampledKFACConfig(
                lr=0.001,
                kl_clip=0.3,
                damping=0.1,
                stat_decay=0.95,
                weight_decay=3e-4,
                refresh_interval=2,
                cold_steps=51,
                cold_lr=1e-4,
                cold_max_grad_norm=1.0,
            ),
            critic_steps=25,
            target_kl=0.002,
            value_sigma=0.5,
            lr_schedule="constant",
        ),
    )


_SKIPS = {"Hopper": 4, "Walker2d": 4, "Reacher": 2}
"""Steps per picture: 8 ms are half a pixel at 2 m/s. HalfCheetah takes 50 ms a step."""


def _pixels(env: str) -> Config:
    """Shared 32-64-32-512 network, joint Fisher, 16 x 64 samples of three pictures 64 x 64."""
    atari = _atari(env)
    actor = dataclasses.replace(atari.acktr.actor, kl_clip=0.002, cold_steps=0)
    return dataclasses.replace(
        atari,
        total_timesteps=2_000_000,
        num_envs=16,
        num_steps=64,
        gae_lambda=0.95,
        ent_coef=0.0,
        normalize_advantage=True,
        normalize_reward=True,
        checkpoint_freq=100_000,
        network=NetworkConfig(shared=True, log_std_init=-1.0),
        acktr=ACKTRConfig(actor=actor),
        pixels=PixelSettings(frame_skip=_SKIPS.get(_robot(env), 1)),
    )


def _pixels_paper(env: str) -> Config:
    """The authors' values: 8000 samples of two pictures 42 x 42, KL 0.002, 25 ELU-critic steps."""
    state = _mujoco_paper(env)
    actor = dataclasses.replace(
        state.acktr.actor, kl_clip=0.002, cold_lr=0.01, structure="cholesky"
    )
    critic = dataclasses.replace(state.acktr.critic, structure="cholesky", stat_interval=5)
    return dataclasses.replace(
        state,
        total_timesteps=40_000_000,
        num_steps=8000,
        gae_lambda=1.0,
        normalize_observation=False,
        normalize_reward=True,
        network=NetworkConfig(
            shared=False,
            trunk="strided",
            activation="relu",
            critic_activation="elu",
            policy_gain=1.0,
        ),
        acktr=dataclasses.replace(state.acktr, actor=actor, critic=critic),
        pixels=PixelSettings(size=42, frame_stack=2, blank_start=True),
    )


def _swimmer(env: str) -> Config:
    """The MuJoCo family's values with gamma 0.9999, lambda 0.99, standard deviation 1 at first."""
    network = NetworkConfig(shared=False)  # whose log_std begins at 0
    return dataclasses.replace(_mujoco(env), gamma=0.9999, gae_lambda=0.99, network=network)


def _hopper(env: str) -> Config:
    """The MuJoCo family's values with gamma 0.995, lambda 0.97."""
    return dataclasses.replace(_mujoco(env), gamma=0.995, gae_lambda=0.97)


def _ant(env: str) -> Config:
    """The MuJoCo family's values with a standard deviation of 0.22 (log -1.5) at first."""
    network = NetworkConfig(shared=False, log_std_init=-1.5)
    return dataclasses.replace(_mujoco(env), network=network)


def _inverted_pendulum(env: str) -> Config:
    """The MuJoCo family's values, advantages as they are, standard deviation 0.14 (log -2)."""
    network = NetworkConfig(shared=False, log_std_init=-2.0)
    # Standardised advantages are noise once all episodes last 1000 steps, and the policy drifts.
    return dataclasses.replace(_mujoco(env), normalize_advantage=False, network=network)


def _general(env: str) -> Config:
    """Separate tanh networks and running normalisation, for any other environment."""
    return Config(
        env=env,
        total_timesteps=500_000,
        num_envs=8,
        num_steps=32,
        gae_lambda=0.95,
        normalize_advantage=True,
        normalize_observation=True,
        normalize_reward=True,
        network=NetworkConfig(shared=False),
        acktr=ACKTRConfig(
            actor=SampledKFACConfig(lr=0.25, kl_clip=0.01, quadratic="exact", momentum=0.0),
            critic=SampledKFACConfig(lr=0.25, kl_clip=1.0, quadratic="exact"),
            critic_steps=5,
        ),
    )


def _cartpole(env: str) -> Config:
    """CartPole-v1 within 100,000 steps."""
    return dataclasses.replace(_general(env), total_timesteps=100_000, normalize_observation=False)


def _atari_a2c(env: str) -> Config:
    """Baselines' values: 16 x 5 samples, lr 7e-4 falling to 0, the ACKTR network."""
    return dataclasses.replace(_atari(env), algo="a2c", num_envs=16, num_steps=5, vf_coef=0.5)


def _atari_trpo(env: str) -> Config:
    """Baselines' values (KL 0.001, CG 10, lambda 1), 8 x 64 samples, separate networks."""
    return dataclasses.replace(
        _atari(env),
        algo="trpo",
        num_envs=8,
        num_steps=64,
        gamma=0.98,
        ent_coef=0.0,
        normalize_advantage=True,
        network=NetworkConfig(shared=False),
        trpo=TRPOConfig(
            max_kl=0.001,
            cg_iterations=10,
            cg_damping=1e-3,
            fisher_fraction=0.2,
            backtrack_factor=0.5,
            critic=CriticConfig(lr=1e-4, epochs=3, batch_size=64),
        ),
    )


def _mujoco_a2c(env: str) -> Config:
    """Separate tanh networks, 16 x 5 samples, lr 7e-4 falling to 0, running normalisation."""
    return dataclasses.replace(
        _mujoco(env),
        algo="a2c",
        num_envs=16,
        num_steps=5,
        vf_coef=0.5,
        normalize_advantage=False,
    )


def _pixels_a2c(env: str) -> Config:
    """The ACKTR network and pictures, 16 x 5 samples, lr 7e-4 falling to 0."""
    return dataclasses.replace(
        _pixels(env), algo="a2c", num_steps=5, vf_coef=0.5, normalize_advantage=False
    )


def _pixels_trpo(env: str) -> Config:
    """The pictures of ACKTR, separate networks, 16 x 64 samples, KL 0.01 as on MuJoCo."""
    trpo = dataclasses.replace(_atari_trpo(env).trpo, max_kl=0.01)
    network = NetworkConfig(shared=False, log_std_init=-1.0)
    return dataclasses.replace(_pixels(env), algo="trpo", network=network, trpo=trpo)


def _mujoco_trpo(env: str) -> Config:
    """Separate tanh networks, 8 x 256 samples, KL 0.01, running normalisation."""
    network = NetworkConfig(shared=False)
    return dataclasses.replace(_mujoco(env), algo="trpo", num_steps=256, network=network)


def _general_a2c(env: str) -> Config:
    """Separate tanh networks, 8 x 5 samples and running normalisation."""
    return dataclasses.replace(
        _general(env), algo="a2c", num_steps=5, vf_coef=0.5, normalize_advantage=False
    )


def _general_trpo(env: str) -> Config:
    """Separate tanh networks, 8 x 128 samples and running normalisation."""
    return dataclasses.replace(_general(env), algo="trpo", num_steps=128)


_MAKERS: dict[tuple[str, str, str | None], Callable[[str], Config]] = {
    ("acktr", "default", "CartPole-v1"): _cartpole,
    ("acktr", "default", "Atari"): _atari,
    ("acktr", "paper", "Atari"): _atari_paper,
    ("acktr", "default", "MuJoCo"): _mujoco,
    ("acktr", "paper", "MuJoCo"): _mujoco_paper,
    ("acktr", "default", "Ant-v4"): _ant,
    ("acktr", "default", "Ant-v5"): _ant,
    ("acktr", "default", "Hopper-v4"): _hopper,
    ("acktr", "default", "Hopper-v5"): _hopper,
    ("acktr", "default", "InvertedPendulum-v4"): _inverted_pendulum,
    ("acktr", "default", "InvertedPendulum-v5"): _inverted_pendulum,
    ("acktr", "default", "Swimmer-v4"): _swimmer,
    ("acktr", "default", "Swimmer-v5"): _swimmer,
    ("acktr", "default", "Pixels"): _pixels,
    ("acktr", "paper", "Pixels"): _pixels_paper,
    ("acktr", "default", None): _general,
    ("a2c", "default", "Atari"): _atari_a2c,
    ("a2c", "default", "MuJoCo"): _mujoco_a2c,
    ("a2c", "default", "Pixels"): _pixels_a2c,
    ("a2c", "default", None): _general_a2c,
    ("trpo", "default", "Atari"): _atari_trpo,
    ("trpo", "default", "MuJoCo"): _mujoco_trpo,
    ("trpo", "default", "Pixels"): _pixels_trpo,
    ("trpo", "default", None): _general_trpo,
}
"""Presets by algorithm, name, and exact id, family or None for any environment.

The docstring of each is what the command line says about it.
"""

PUBLISHED = tuple(dict.fromkeys(algo for algo, name, _ in _MAKERS if name == "paper"))
"""Algorithms with a paper preset."""


def known_presets() -> list[tuple[str, str, str, str]]:
    """Algorithm, name, environments and description of each preset."""
    return [
        (algo, name, place or "any other environment", (maker.__doc__ or "").strip())
        for (algo, name, place), maker in _MAKERS.items()
    ]


def has_own(env: str, algo: str) -> bool:
    """Whether the default preset of this algorithm has values for this very environment."""
    return (algo, "default", env) in _MAKERS


def _family(env: str) -> str | None:
    """Atari, MuJoCo, Pixels or None (also for an environment that Gymnasium does not know)."""
    if env.rpartition(":")[2].startswith("Pixels/"):
        return "Pixels"
    if _MUJOCO.match(env):
        return "MuJoCo"
    try:
        return "Atari" if is_atari(env) else None
    except EnvError:
        return None


def _robot(env: str) -> str:
    """Name of an environment without namespace and version."""
    return env.rpartition("/")[2].partition("-v")[0]


def preset(env: str, algo: str = "acktr", name: str = "default") -> tuple[Config, str]:
    """The configuration to start from, and one line that says where it comes from.

    Raises:
        ConfigError: Unknown algorithm or preset, or no published values for this environment.
    """
    if algo not in ALGOS:
        raise ConfigError(f"algo must be one of {', '.join(ALGOS)}, got {algo!r}")
    if name not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    family = _family(env)
    places = {env: f"exact id {env}", family: f"{family} family", None: "any environment"}
    if name == "family":
        del places[env]
    values = "default" if name == "family" else name
    for place, where in places.items():
        maker = _MAKERS.get((algo, values, place))
        if maker is not None:
            config = dataclasses.replace(maker(env), preset=name)
            return config, f"preset {name} for {algo}, {where}: {(maker.__doc__ or '').strip()}"
    if algo in PUBLISHED:
        raise ConfigError(f"the paper has no configuration for {env}: use --preset default")
    raise ConfigError(f"the paper preset is ACKTR's only: use --preset default with {algo}")
