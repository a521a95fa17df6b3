"""Everything that defines a peer's training, apart from environment, seed and steps."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gymnasium import spaces

from acktr.config import build, overlay, preset
from acktr.envs import make_vec
from acktr.files import read_object
from scripts.peers.translate import OURS, translate

_PUBLISHED = Path(__file__).with_name("ppo.json")
_VERSION = re.compile(r"-v\d+$")


@dataclass(frozen=True, kw_only=True)
class Network:
    """Separate actor and critic; hidden layers and value head start as the library's do."""

    hidden: tuple[int, ...]
    """Widths of the actor's hidden layers."""
    critic_hidden: tuple[int, ...]
    """Widths of the critic's hidden layers."""
    activation: Literal["tanh", "relu", "elu"]
    ortho_init: bool
    """Orthogonal weights, gains sqrt 2 (hidden), 0.01 (policy head) and 1 (value head)."""
    log_std_init: float


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The first-order optimizer: of all parameters, or of TRPO's critic."""

    name: Literal["adam", "rmsprop_tf"]
    """Adam, or RMSprop as TensorFlow defines it (eps inside the root, mean square from one)."""
    lr: float
    lr_schedule: Literal["constant", "linear"]
    """linear: from lr at the first update to 0 after the last."""
    eps: float
    alpha: float | None
    """Decay of the mean square; None for Adam, whose betas are (0.9, 0.999)."""


@dataclass(frozen=True, kw_only=True)
class A2C:
    """Loss of A2C; here and below the fields are arguments of the library's class."""

    ent_coef: float
    vf_coef: float
    """Weight of the mean squared value error."""
    max_grad_norm: float


@dataclass(frozen=True, kw_only=True)
class TRPO:
    """Policy step and critic of TRPO."""

    target_kl: float
    cg_max_steps: int
    cg_damping: float
    line_search_shrinking_factor: float
    line_search_max_iter: int
    n_critic_updates: int
    """Epochs of the critic on each batch."""
    batch_size: int
    """Samples of the critic's minibatches."""


@dataclass(frozen=True, kw_only=True)
class PPO(A2C):
    """Loss and epochs of PPO; value predictions are not clipped."""

    n_epochs: int
    batch_size: int
    clip_range: float


@dataclass(frozen=True, kw_only=True)
class MaskablePPO(PPO):
    """The same, in environments with action masks."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The whole of it. Normalisation is VecNormalize with clips of 10 and the same gamma."""

    num_envs: int
    num_steps: int
    """Steps of each environment per update."""
    gamma: float
    gae_lambda: float
    normalize_advantage: bool
    normalize_observation: bool
    normalize_reward: bool
    network: Network
    optimizer: Optimizer
    algorithm: A2C | TRPO | PPO


_ALGORITHMS = {
    "sb3-a2c": A2C,
    "sb3-trpo": TRPO,
    "sb3-ppo": PPO,
    "sb3-maskable-ppo": MaskablePPO,
}


def read_settings(peer: str, values: Mapping[str, Any]) -> Settings:
    """The settings of a peer from JSON values.

    Raises:
        ConfigError: An unknown or missing key in a group, or a wrong type.
    """
    groups = {"network": Network, "optimizer": Optimizer, "algorithm": _ALGORITHMS[peer]}
    built = {name: build(kind, values[name], name) for name, kind in groups.items()}
    return Settings(**{**values, **built})


def choose(peer: str, env: str) -> tuple[Settings, str]:
    """The settings of a peer for an environment, and one line that says where they come from.

    Raises:
        EnvError: The environment cannot be made.
    """
    if issubclass(_ALGORITHMS[peer], PPO):
        values, source = _published(env)
    else:
        config, source = preset(env, OURS[peer])
        parts = kl_parts(env)
        values, source = translate(peer, config, parts), f"translated from {source}"
        if peer == "sb3-trpo" and parts > 1:
            source += f"; KL and damping divided by {parts} action dimensions"
    return read_settings(peer, values), source


def kl_parts(env: str) -> int:
    """Numbers over which the peers average what is one KL: the dimensions of a vector of actions.

    Raises:
        EnvError: The environment cannot be made.
    """
    envs = make_vec(env, 1)
    space = envs.single_action_space
    envs.close()
    return math.prod(space.shape) if isinstance(space, spaces.Box | spaces.MultiBinary) else 1


def _published(env: str) -> tuple[dict[str, Any], str]:
    """PPO's settings for an environment, the library's defaults for one that has none."""
    table = read_object(_PUBLISHED)
    environments, name = table["environments"], _VERSION.sub("", env)
    if name not in environments:
        source = "defaults of stable-baselines3, with running normalisation"
        return table["defaults"], f"{source}; none are published for {env}"
    return overlay(table["defaults"], environments[name]), table["source"]
