"""Everything that defines a peer's training, apart from environment, seed and steps."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gymnasium import spaces

from acktr.config import Config, ConfigError, from_dict
from acktr.envs import make_vec
from acktr.files import read_object
from acktr.presets import preset
from acktr.schema import build, overlay
from scripts.common import ScriptError
from scripts.peers.translate import OURS, translate

_PUBLISHED = Path(__file__).with_name("ppo.json")
_VERSION = re.compile(r"-v\d+$")
_MOST = 2**31
_LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("hidden", "critic_hidden", "num_envs"), (1, 16_384)),
    **dict.fromkeys(("gamma", "gae_lambda", "alpha", "line_search_shrinking_factor"), (0, 1)),
    "log_std_init": (-20, 2),
}
"""Least and largest value of some fields; others are at least 1 (counts) or 0."""


class _Checked:
    """Settings that are checked when they are made."""

    def __post_init__(self) -> None:
        """Check every number; raises ConfigError naming the field."""
        for name, value in vars(self).items():
            for one in value if isinstance(value, tuple) else (value,):
                if type(one) in (int, float):
                    low, high = _LIMITS.get(name, (1 if type(one) is int else 0, _MOST))
                    if not low <= one <= high:
                        raise ConfigError(f"{name} must lie in [{low}, {high}], got {one}")


@dataclass(frozen=True, kw_only=True)
class Network(_Checked):
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
class Optimizer(_Checked):
    """The first-order optimizer: of all parameters, or of TRPO's critic."""

    name: Literal["adam", "rmsprop_tf"]
    """Adam, or RMSprop as TensorFlow defines it (eps inside the root, mean square from one)."""
    lr: float
    lr_schedule: Literal["constant", "linear"]
    """linear: from lr at the first update to 0 after the last."""
    eps: float
    alpha: float | None
    """Decay of the mean square; None for Adam, whose betas are (0.9, 0.999)."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError naming the field."""
        super().__post_init__()
        if (self.name == "rmsprop_tf") != (self.alpha is not None):
            raise ConfigError("alpha belongs to rmsprop_tf, which needs it")


@dataclass(frozen=True, kw_only=True)
class A2C(_Checked):
    """Loss of A2C."""

    ent_coef: float
    vf_coef: float
    """Weight of the mean squared value error."""
    max_grad_norm: float


@dataclass(frozen=True, kw_only=True)
class TRPO(_Checked):
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
class PPO(_Checked):
    """Loss and epochs of PPO; value predictions are not clipped."""

    ent_coef: float
    vf_coef: float
    max_grad_norm: float
    n_epochs: int
    batch_size: int
    clip_range: float


@dataclass(frozen=True, kw_only=True)
class Settings(_Checked):
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

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError naming the field."""
        super().__post_init__()
        if self.num_envs * self.num_steps < 2:
            raise ConfigError("num_envs * num_steps must be at least 2")


@dataclass(frozen=True, kw_only=True)
class _OfA2C(Settings):
    algorithm: A2C


@dataclass(frozen=True, kw_only=True)
class _OfTRPO(Settings):
    algorithm: TRPO


@dataclass(frozen=True, kw_only=True)
class _OfPPO(Settings):
    algorithm: PPO


_KINDS: dict[str, type[Settings]] = {"sb3-a2c": _OfA2C, "sb3-trpo": _OfTRPO, "sb3-ppo": _OfPPO}


def read_settings(peer: str, values: Any) -> Settings:
    """The settings of a peer from JSON values.

    Raises:
        ConfigError: An unknown or missing key, a wrong type or a value out of range.
    """
    settings: Settings = build(_KINDS[peer], values)
    return settings


@dataclass(frozen=True)
class Origin:
    """Settings and one line that says where they come from."""

    settings: Settings
    source: str


def choose(peer: str, env: str, like: Path | None, changes: Path | None) -> Origin:
    """The settings of a peer for an environment.

    Args:
        peer: sb3-a2c, sb3-trpo or sb3-ppo.
        env: Environment id.
        like: Run or config.json of ours to equal (sb3-a2c and sb3-trpo); our preset if None.
        changes: JSON file with settings that replace others.

    Raises:
        ScriptError, ConfigError: There are none, or a file cannot be used; one line.
        EnvError: The environment cannot be made.
    """
    edits = None if changes is None else _read(changes)
    if peer == "sb3-ppo":
        values, source = _published(env, edits is not None)
    else:
        config, source = _like(env, like) if like is not None else preset(env, OURS[peer])
        parts = kl_parts(env)
        values = translate(peer, config, parts)
        source = f"translated from {source if like is None else f'a run of {OURS[peer]}'}"
        if peer == "sb3-trpo" and parts > 1:
            source += f"; KL and damping divided by {parts} action dimensions"
    if edits is None:
        return Origin(read_settings(peer, values), source)
    try:
        settings = read_settings(peer, overlay(values, edits))
    except ConfigError as error:
        raise ScriptError(f"{changes}: {error}") from error
    return Origin(settings, f"{source}, changed by a file of settings")


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except ValueError as error:
        raise ScriptError(str(error)) from error


def _like(env: str, like: Path) -> tuple[Config, str]:
    """Our configuration in a run's folder or file."""
    path = like / "config.json" if like.is_dir() else like
    values = _read(path)
    if values.get("env") != env:
        raise ScriptError(f"{path}: a configuration for {values.get('env')!r}, not for {env!r}")
    try:
        return from_dict(values), str(path)
    except ConfigError as error:
        raise ScriptError(f"{path}: {error}") from error


def kl_parts(env: str) -> int:
    """Numbers over which the peers average what is one KL: the dimensions of a vector of actions.

    Raises:
        EnvError: The environment cannot be made.
    """
    envs = make_vec(env, 1)
    space = envs.single_action_space
    envs.close()
    return math.prod(space.shape) if isinstance(space, spaces.Box | spaces.MultiBinary) else 1


def _published(env: str, changed: bool) -> tuple[dict[str, Any], str]:
    """The published settings; the library's defaults with normalisation for a file to change."""
    table = _read(_PUBLISHED)
    environments: Mapping[str, Any] = table["environments"]
    name = _VERSION.sub("", env)
    if name not in environments and not changed:
        raise ScriptError(
            f"no published settings of PPO for {env}: there are some for"
            f" {', '.join(environments)}; or give --settings FILE"
        )
    values = overlay(table["defaults"], environments.get(name, {}))
    return values, table["source"] if name in environments else "defaults of stable-baselines3"


def to_dict(settings: Settings) -> dict[str, Any]:
    """The settings as JSON values."""
    return asdict(settings)
