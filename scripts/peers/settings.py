"""Everything that defines a peer's training, apart from environment, seed and steps."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from scripts.peers.errors import PeerError

PEERS = ("sb3-a2c", "sb3-trpo", "sb3-ppo")
_LARGEST = 2**31


def _number(least: float, most: float = math.inf, *, positive: bool = False) -> Any:
    return field(metadata={"least": least, "most": most, "positive": positive})


@dataclass(frozen=True, kw_only=True)
class Network:
    """Separate actor and critic; hidden layers and value head start as the library's do."""

    hidden: tuple[int, ...] = _number(1, 16_384)
    """Widths of the actor's hidden layers."""
    critic_hidden: tuple[int, ...] = _number(1, 16_384)
    """Widths of the critic's hidden layers."""
    activation: Literal["tanh", "relu", "elu"]
    ortho_init: bool
    """Orthogonal weights, gains sqrt 2 (hidden), 0.01 (policy head) and 1 (value head)."""
    log_std_init: float = _number(-20, 2)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The first-order optimizer: of all parameters, or of TRPO's critic."""

    name: Literal["adam", "rmsprop_tf"]
    """Adam, or RMSprop as TensorFlow defines it (eps inside the root, mean square from one)."""
    lr: float = _number(0, positive=True)
    lr_schedule: Literal["constant", "linear"]
    """linear: from lr at the first update to 0 after the last."""
    eps: float = _number(0)
    alpha: float | None = _number(0, 1)
    """Decay of the mean square; None for Adam, whose betas are (0.9, 0.999)."""


@dataclass(frozen=True, kw_only=True)
class A2C:
    """Loss of A2C."""

    ent_coef: float = _number(0)
    vf_coef: float = _number(0)
    """Weight of the mean squared value error."""
    max_grad_norm: float = _number(0, positive=True)


@dataclass(frozen=True, kw_only=True)
class TRPO:
    """Policy step and critic of TRPO."""

    target_kl: float = _number(0, positive=True)
    cg_max_steps: int = _number(1)
    cg_damping: float = _number(0)
    line_search_shrinking_factor: float = _number(0, 1, positive=True)
    line_search_max_iter: int = _number(1)
    n_critic_updates: int = _number(1)
    """Epochs of the critic on each batch."""
    batch_size: int = _number(1)
    """Samples of the critic's minibatches."""


@dataclass(frozen=True, kw_only=True)
class PPO:
    """Loss and epochs of PPO; value predictions are not clipped."""

    ent_coef: float = _number(0)
    vf_coef: float = _number(0)
    max_grad_norm: float = _number(0, positive=True)
    n_epochs: int = _number(1)
    batch_size: int = _number(2)
    clip_range: float = _number(0, positive=True)


Algorithm = A2C | TRPO | PPO
_ALGORITHMS: dict[str, type[Any]] = {"sb3-a2c": A2C, "sb3-trpo": TRPO, "sb3-ppo": PPO}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The whole of it. Normalisation is VecNormalize with clips of 10 and the same gamma."""

    num_envs: int = _number(1, 16_384)
    num_steps: int = _number(1)
    """Steps of each environment per update."""
    gamma: float = _number(0, 1)
    gae_lambda: float = _number(0, 1)
    normalize_advantage: bool
    normalize_observation: bool
    normalize_reward: bool
    network: Network
    optimizer: Optimizer
    algorithm: Algorithm


def read_settings(peer: str, values: Any) -> Settings:
    """The settings of a peer from JSON values.

    Raises:
        PeerError: An unknown or missing key, a wrong type or a value out of range.
    """
    settings: Settings = _build(Settings, values, "", {"algorithm": _ALGORITHMS[peer]})
    if settings.num_envs * settings.num_steps < 2:
        raise PeerError("num_envs * num_steps must be at least 2")
    if (settings.optimizer.name == "rmsprop_tf") != (settings.optimizer.alpha is not None):
        raise PeerError("optimizer.alpha belongs to rmsprop_tf, which needs it")
    return settings


def overlay(base: Mapping[str, Any], values: Any) -> dict[str, Any]:
    """The JSON values with part of them replaced, nested ones one by one.

    Raises:
        PeerError: ``values`` is no object.
    """
    if not isinstance(values, Mapping):
        raise PeerError("the settings must be a JSON object")
    merged = dict(base)
    for key, value in values.items():
        old = base.get(key)
        nested = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = overlay(typing.cast("Mapping[str, Any]", old), value) if nested else value
    return merged


def to_dict(settings: Settings) -> dict[str, Any]:
    """The settings as JSON values."""
    return dataclasses.asdict(settings)


def _build(kind: type[Any], values: Any, path: str, special: Mapping[str, type[Any]]) -> Any:
    if not isinstance(values, Mapping):
        raise PeerError(f"{path or 'the settings'} must be a JSON object")
    fields = {item.name: item for item in dataclasses.fields(kind)}
    hints = {**typing.get_type_hints(kind), **special}
    where = f"{path}." if path else ""
    for key in values:
        if key not in fields:
            raise PeerError(f"unknown setting {where}{key}; there are {', '.join(fields)}")
    for name in fields:
        if name not in values:
            raise PeerError(f"setting {where}{name} is missing")
    return kind(
        **{
            name: _convert(hints[name], values[name], where + name, item.metadata)
            for name, item in fields.items()
        }
    )


def _convert(hint: Any, value: Any, where: str, limits: Mapping[str, Any]) -> Any:
    """The value as the field's type, within its limits."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast("type[Any]", hint), value, where, {})
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _convert(args[0], value, where, limits)
    if origin is Literal:
        if value not in args:
            raise PeerError(f"{where} must be one of {', '.join(args)}, got {value!r}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(int, item, f"each of {where}", limits) for item in value)
    if hint is float and type(value) is int and abs(value) < _LARGEST:
        value = float(value)
    if hint not in (int, float, bool) or type(value) is not hint:
        wanted = "a list of integers" if origin is tuple else getattr(hint, "__name__", str(hint))
        raise PeerError(f"{where} must be {wanted}, got {value!r}")
    if hint is not bool:
        _check_range(value, where, limits)
    return value


def _check_range(value: float, where: str, limits: Mapping[str, Any]) -> None:
    least, most = limits["least"], min(limits["most"], _LARGEST)
    low = least < value if limits["positive"] else least <= value
    if not (low and value <= most):
        sign = ">" if limits["positive"] else ">="
        raise PeerError(f"{where} must be {sign} {least:g} and <= {most:g}, got {value}")
