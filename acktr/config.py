"""The configuration of a training run: frozen dataclasses, checked when constructed."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from acktr.envs import AtariSettings, Workers
from acktr.files import read_object
from acktr.kfac import KFACConfig, Structure

Activation = Literal["tanh", "relu", "elu"]
Algo = Literal["acktr", "a2c", "trpo"]
Schedule = Literal["constant", "linear"]

_WIDEST = 16_384

_FORMER: dict[str, Any] = {
    "env_backend": "gymnasium",
    "acktr.actor.norm_clip": None,
    "acktr.actor.refresh_staleness": None,
    "acktr.critic.norm_clip": None,
    "acktr.critic.refresh_staleness": None,
}
"""Settings that earlier versions wrote to their files, with the value that changed nothing.

Files with this value are still read; any other value is refused, as nothing follows it any more.
"""

_STRUCTURES: dict[tuple[str, str, bool], str] = {
    ("kfac", "eigen", False): "kfac",
    ("kfac", "eigen", True): "kfac_factored",
    ("kfac", "cholesky", True): "cholesky",
    ("ekfac", "eigen", False): "ekfac",
    ("tridiagonal", "eigen", True): "tridiagonal",
    ("tridiagonal", "cholesky", True): "tridiagonal",
}
"""K-FAC's structure by what files of earlier versions say: structure, inverse, factored_damping."""


class ConfigError(ValueError):
    """A hyper-parameter that cannot be used; the message is one line."""


def _check_integer(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer >= {least}, got {value}")


def _check_number(name: str, value: float, low: float, high: float, *, open_low: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number, got {value!r}")
    inside = math.isfinite(value) and (low < value if open_low else low <= value) and value <= high
    if not inside:
        limit = f" and <= {high:g}" if math.isfinite(high) else ""
        sign = ">" if open_low else ">="
        raise ConfigError(f"{name} must be a finite number {sign} {low:g}{limit}, got {value}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Actor and critic networks."""

    shared: bool = True
    """One trunk with two heads (joint Fisher) instead of a separate actor and critic."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the actor's (or the shared trunk's) hidden layers, for vector observations."""
    critic_hidden: tuple[int, ...] = (64, 64)
    """Widths of a separate critic's hidden layers, for vector observations."""
    activation: Activation = "tanh"
    """Activation of the actor (or shared trunk), for vector observations; conv nets use ReLU."""
    critic_activation: Activation = "tanh"
    """Activation of a separate critic, for vector observations."""
    policy_gain: float = 0.01
    """Gain of the orthogonal initialisation of the policy head."""
    log_std_init: float = 0.0
    """Initial log standard deviation of Gaussian policies (independent of the state)."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError naming the field."""
        for name in ("hidden", "critic_hidden"):
            for width in getattr(self, name):
                _check_integer(f"each width of {name}", width, 1)
                if width > _WIDEST:
                    raise ConfigError(f"each width of {name} must be <= {_WIDEST}, got {width}")
        for name in ("activation", "critic_activation"):
            _check_choice(name, getattr(self, name), typing.get_args(Activation))
        _check_number("policy_gain", self.policy_gain, 0, math.inf, open_low=True)
        _check_number("log_std_init", self.log_std_init, -20, 2, open_low=False)


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """A separate critic's fit by a first-order optimizer (TRPO, and ACKTR's ablations)."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam, or SGD with momentum (steepest descent in the Euclidean norm)."""
    lr: float = 1e-3
    """Step size, constant."""
    epochs: int = 10
    """Passes over each batch."""
    batch_size: int | None = 128
    """Samples per step; None: the whole batch."""
    momentum: float = 0.9
    """Of SGD."""
    adam_eps: float = 1e-5
    """Added to Adam's root."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError naming the field."""
        _check_choice("optimizer", self.optimizer, ("adam", "sgd"))
        _check_number("lr", self.lr, 0, math.inf, open_low=True)
        _check_number("adam_eps", self.adam_eps, 0, math.inf, open_low=True)
        _check_number("momentum", self.momentum, 0, math.nextafter(1.0, 0.0), open_low=False)
        _check_integer("epochs", self.epochs, 1)
        if self.batch_size is not None:
            _check_integer("batch_size", self.batch_size, 1)


@dataclass(frozen=True, kw_only=True)
class A2CConfig:
    """A2C (Mnih et al. 2016): one RMSprop step per batch."""

    lr: float = 7e-4
    """Step size."""
    lr_schedule: Schedule = "linear"
    """Schedule of lr over total_timesteps; the linear one ends at 0."""
    rms_alpha: float = 0.99
    """Decay of RMSprop's mean square, which starts at 1."""
    rms_eps: float = 1e-5
    """Added to the mean square, inside the root."""
    max_grad_norm: float = 0.5
    """Largest norm of the gradient over all parameters."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError naming the field."""
        for name in ("lr", "rms_eps", "max_grad_norm"):
            _check_number(name, getattr(self, name), 0, math.inf, open_low=True)
        _check_number("rms_alpha", self.rms_alpha, 0, math.nextafter(1.0, 0.0), open_low=False)
        _check_choice("lr_schedule", self.lr_schedule, typing.get_args(Schedule))


@dataclass(frozen=True, kw_only=True)
class TRPOConfig:
    """TRPO (Schulman et al. 2015); the actor and the critic must be separate."""

    max_kl: float = 0.01
    """Largest mean KL(old || new) of a step, in nats."""
    cg_iterations: int = 15
    """Most iterations of conjugate gradient."""
    cg_damping: float = 0.1
    """Added to the Fisher matrix."""
    cg_tolerance: float = 1e-10
    """Squared norm of the residual at which conjugate gradient stops."""
    fisher_fraction: float = 1.0
    """Part of the batch for Fisher products: every round(1/fraction)-th sample."""
    backtrack_factor: float = 0.8
    """What the line search multiplies the step by."""
    backtrack_steps: int = 10
    """Most steps that the line search tries."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """How the critic is fitted."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError naming the field."""
        _check_number("max_kl", self.max_kl, 0, math.inf, open_low=True)
        _check_number("cg_damping", self.cg_damping, 0, math.inf, open_low=False)
        _check_number("cg_tolerance", self.cg_tolerance, 0, math.inf, open_low=False)
        _check_number("fisher_fraction", self.fisher_fraction, 0, 1, open_low=True)
        below_one = math.nextafter(1.0, 0.0)
        _check_number("backtrack_factor", self.backtrack_factor, 0, below_one, open_low=True)
        for name in ("cg_iterations", "backtrack_steps"):
            _check_integer(name, getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class SampledKFACConfig(KFACConfig):
    """K-FAC whose factors are computed from a part of each batch."""

    stat_fraction: float = 1.0
    """Part of the batch that the factors are computed from: every round(1/fraction)-th sample.

    ACKTR measures the KL of a step, train/approx_kl, on as many samples.
    """

    def __post_init__(self) -> None:
        """Check every value; raises ValueError naming the field."""
        super().__post_init__()
        _check_number("stat_fraction", self.stat_fraction, 1e-6, 1, open_low=False)


@dataclass(frozen=True, kw_only=True)
class ACKTRConfig:
    """ACKTR (Wu et al. 2017): K-FAC steps for actor and critic."""

    actor: SampledKFACConfig = field(default_factory=SampledKFACConfig)
    """K-FAC of the actor, or of the whole network when the trunk is shared."""
    critic: SampledKFACConfig = field(default_factory=SampledKFACConfig)
    """K-FAC of a separate critic (Gauss-Newton metric)."""
    critic_steps: int = 1
    """K-FAC steps of a separate critic on each batch."""
    critic_optimizer: Literal["kfac", "first_order"] = "kfac"
    """Gauss-Newton steps by K-FAC, or (the paper's ablations) the first-order fit below."""
    first_order: CriticConfig = field(
        default_factory=lambda: CriticConfig(epochs=50, batch_size=None)
    )
    """A separate critic's fit without K-FAC: Adam, or SGD for the Euclidean norm."""
    target_kl: float | None = None
    """KL per update to which the actor's lr adapts by factors of 1.5, in place of the schedule."""
    value_sigma: float = 1.0
    """Standard deviation of the critic's Gaussian observation model; its Fisher is 1/sigma^2."""
    lr_schedule: Schedule = "linear"
    """Schedule of the actor's lr over total_timesteps."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError naming the field."""
        for name in ("actor", "critic"):
            if not isinstance(getattr(self, name), SampledKFACConfig):
                raise ConfigError(f"acktr.{name} must be an acktr.config.SampledKFACConfig")
        _check_integer("critic_steps", self.critic_steps, 1)
        if self.target_kl is not None:
            _check_number("target_kl", self.target_kl, 0, math.inf, open_low=True)
        _check_number("value_sigma", self.value_sigma, 0, math.inf, open_low=True)
        _check_choice("lr_schedule", self.lr_schedule, typing.get_args(Schedule))
        _check_choice("critic_optimizer", self.critic_optimizer, ("kfac", "first_order"))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a training run."""

    env: str
    """Environment id, for example HalfCheetah-v5, PongNoFrameskip-v4 or module:Id-v0."""
    algo: Algo = "acktr"
    """Algorithm."""
    preset: str = "default"
    """Preset that the values started from: default (tuned here) or paper (as published)."""
    seed: int = 0
    """Seed of environments, networks and sampling."""
    total_timesteps: int = 1_000_000
    """Environment steps to train for, summed over the parallel environments."""
    num_envs: int = 8
    """Parallel environments."""
    env_workers: Workers = "auto"
    """Processes that step them, without influence on results; auto: for MuJoCo one per core."""
    num_steps: int = 32
    """Steps of each environment per update."""
    micro_batch: int | None = None
    """Most samples whose activations an update of acktr or a2c keeps; None: the whole batch's."""
    gamma: float = 0.99
    """Discount factor."""
    gae_lambda: float = 1.0
    """Lambda of generalised advantage estimation; 1 gives n-step returns."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    vf_coef: float = 0.25
    """Weight of the mean squared value error in a shared network's loss."""
    normalize_advantage: bool = False
    """Standardise advantages over the batch."""
    normalize_observation: bool = False
    """Standardise observations by running statistics, clipped to +-10."""
    normalize_reward: bool = False
    """Divide rewards by the running deviation of the discounted return, clipped to +-10."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type of convolutional networks; auto: bfloat16 where the hardware is fast at it."""
    compile: bool = False
    """Compile acting (on CUDA into a CUDA graph) and update of ACKTR and A2C by torch.compile."""
    eval_freq: int = 0
    """Steps between evaluations during training; 0: only at the end."""
    eval_episodes: int = 10
    """Episodes of each evaluation, the one at the end included."""
    checkpoint_freq: int = 100_000
    """Steps between checkpoints; one is always written at the end or when stopped."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """Networks."""
    acktr: ACKTRConfig = field(default_factory=ACKTRConfig)
    """Settings of ACKTR."""
    a2c: A2CConfig = field(default_factory=A2CConfig)
    """Settings of A2C."""
    trpo: TRPOConfig = field(default_factory=TRPOConfig)
    """Settings of TRPO."""
    atari: AtariSettings = field(default_factory=AtariSettings)
    """Atari protocol; ignored by other environments."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError naming the field."""
        if not self.env:
            raise ConfigError("env must be an environment id such as HalfCheetah-v5, got nothing")
        least = {"seed": 0, "total_timesteps": 1, "num_envs": 1, "num_steps": 1}
        least |= {"eval_freq": 0, "eval_episodes": 1, "checkpoint_freq": 1}
        least |= {} if self.micro_batch is None else {"micro_batch": 1}
        for name, minimum in least.items():
            _check_integer(name, getattr(self, name), minimum)
        if self.env_workers != "auto":
            _check_integer("env_workers", self.env_workers, 1)
        if self.seed >= 2**31 - 2**20:
            raise ConfigError(f"seed must be below {2**31 - 2**20}, got {self.seed}")
        for name in ("gamma", "gae_lambda"):
            _check_number(name, getattr(self, name), 0, 1, open_low=False)
        for name in ("ent_coef", "vf_coef"):
            _check_number(name, getattr(self, name), 0, math.inf, open_low=False)
        _check_choice("algo", self.algo, typing.get_args(Algo))
        _check_choice("precision", self.precision, ("auto", "float32", "bfloat16"))
        self._check_together()

    def _check_together(self) -> None:
        if self.num_envs * self.num_steps < 2:
            raise ConfigError("num_envs * num_steps must be at least 2")
        if self.algo == "trpo" and self.micro_batch is not None:
            raise ConfigError("trpo takes whole batches: micro_batch must be null")
        if self.algo == "trpo" and self.network.shared:
            raise ConfigError("trpo needs a separate critic: network.shared must be false")
        if self.algo == "acktr" and self.network.shared and self.acktr.critic_optimizer != "kfac":
            raise ConfigError(
                "acktr.critic_optimizer applies to a separate critic: network.shared must be false"
            )


def refuse_import(env: str) -> None:
    """Refuse an id from a file that would import a module which is not imported already.

    Raises:
        ConfigError: ``module:Id`` with a module that nobody asked for.
    """
    module, colon, _ = env.rpartition(":")
    if colon and module not in sys.modules:
        raise ConfigError(
            f"its environment {env} would import the module {module}; import it first if you"
            f" trust it (on the command line: --import {module})"
        )


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as JSON values."""
    return dataclasses.asdict(config)


def read_settings(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file of settings, which :func:`merge` checks.

    Raises:
        ConfigError: It cannot be read, is larger than 1 MiB or is no JSON object.
    """
    try:
        return read_object(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def from_dict(values: Mapping[str, Any]) -> Config:
    """The configuration of :func:`to_dict`, or part of one.

    Raises:
        ConfigError: An unknown key (with a suggestion), a wrong type or a value out of range.
    """
    config: Config = build(Config, values)
    return config


def merge(config: Config, values: Any) -> Config:
    """The configuration with part of it replaced, nested settings one by one.

    Raises:
        ConfigError: As :func:`from_dict`.
    """
    if not isinstance(values, Mapping):
        raise ConfigError("configuration: the file must be an object of settings")
    return from_dict(overlay(to_dict(config), values))


def overlay(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with part of them replaced, nested ones one by one."""
    merged = dict(base)
    for key, value in _structured(base.get("structure"), values).items():
        old = base.get(key)
        nested = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = overlay(old or {}, value) if nested else value
    return merged


def former_setting(name: str) -> str | None:
    """One line on a setting of K-FAC that earlier versions had; None for any other name."""
    group, _, last = name.rpartition(".")
    if last in ("inverse", "factored_damping"):
        return f"write {group}.structure ({', '.join(typing.get_args(Structure))}) instead"
    if last in ("norm_clip", "refresh_staleness"):
        return "it was removed; an earlier version of acktr can use it"
    return None


def _structured(base: str | None, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of K-FAC with ``structure`` alone in place of the three that files had before it.

    Args:
        base: The structure that the settings are laid over; None for settings of something else.
        values: The settings.

    Raises:
        ConfigError: The former three cannot go together.
    """
    former = ("structure", "inverse", "factored_damping")
    if base is None or not set(values).intersection(former[1:]):
        return values
    start = next(three for three, name in _STRUCTURES.items() if name == base)
    three = tuple(values.get(key, old) for key, old in zip(former, start, strict=True))
    for known, name in _STRUCTURES.items():
        if known == three:
            kept = {key: value for key, value in values.items() if key not in former}
            return {**kept, "structure": name}
    said = ", ".join(f"{key}={value!r:.40}" for key, value in zip(former, three, strict=True))
    raise ConfigError(
        f"configuration: {said} cannot go together; write structure as one of"
        f" {', '.join(typing.get_args(Structure))} alone"
    )


def build(kind: type[Any], values: Any, path: str = "") -> Any:
    """A dataclass of settings from JSON values.

    Args:
        kind: Its class.
        values: An object with its fields; those that are left out have their defaults.
        path: Where it is in a larger one, for messages.

    Raises:
        ConfigError: An unknown or missing key, a wrong type or a value out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"configuration: {path or 'the file'} must be an object of settings")
    values = _structured("kfac" if issubclass(kind, KFACConfig) else None, values)
    hints = typing.get_type_hints(kind)
    chosen = {}
    for key, value in values.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in hints and where in _FORMER:
            _require_unused(where, value)
            continue
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(f"configuration: unknown setting {where}{hint}")
        chosen[key] = _convert(hints[key], value, where)
    for item in dataclasses.fields(kind):
        free = item.default is item.default_factory is dataclasses.MISSING
        if free and item.name not in chosen:
            where = f"{path}.{item.name}" if path else item.name
            raise ConfigError(f"configuration: {where} is missing")
    try:
        return kind(**chosen)
    except ValueError as error:
        raise ConfigError(f"{path}.{error}" if path else str(error)) from None


def _require_unused(name: str, value: Any) -> None:
    """Refuse a former setting whose value would have changed the run."""
    if value != _FORMER[name]:
        raise ConfigError(
            f"configuration: {name} was removed and only {_FORMER[name]!r} can still be read,"
            f" got {value!r:.40}; an earlier version of acktr can use it"
        )


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Value as the field's type; JSON has lists for tuples and may write 1 for 1.0."""
    if dataclasses.is_dataclass(hint):
        return build(typing.cast("type[Any]", hint), value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint == Workers and value == "auto":
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(next(arg for arg in args if arg is not type(None)), value, where)
    if origin is Literal:
        _check_choice(where, value, args)
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(args[0], item, where) for item in value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"configuration: {where} is too large") from None
    if hint in (int, str, bool) and type(value) is hint:
        return value
    wanted = "a list of integers" if origin is tuple else getattr(hint, "__name__", str(hint))
    raise ConfigError(f"configuration: {where} must be {wanted}, got {value!r}")
