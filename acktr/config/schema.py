"""Dataclasses of settings: limits written into the types, checked, and built from JSON values."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from acktr.envs import is_json

_MOST_INTEGER, _MOST_FLOAT = 2**63 - 1, 1e30
"""What torch's numbers hold, with room to multiply."""


class ConfigError(ValueError):
    """A hyper-parameter that cannot be used; the message is one line."""


@dataclass(frozen=True)
class Limits:
    """The finite numbers that a setting may be, from ``low`` to ``high``; for ``Annotated``."""

    low: float
    high: float = math.inf
    above: bool = False
    """Whether ``low`` itself is left out."""

    def check(self, name: str, value: Any, kind: type) -> None:
        """Raise ConfigError unless the value is such a number of this kind, int or float."""
        number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        most = min(self.high, _MOST_INTEGER if kind is int else _MOST_FLOAT)
        inside = number and self.low <= value <= most
        if not inside or (self.above and value == self.low):
            noun = "an integer" if kind is int else "a finite number"
            below = self.high < math.inf or (number and value > most)
            limit = f" and <= {most:.10g}" if below else ""
            sign = ">" if self.above else ">="
            raise ConfigError(
                f"{name} must be {noun} {sign} {self.low:g}{limit}, got {value!s:.60}"
            )


Positive = Annotated[float, Limits(0, above=True)]
NonNegative = Annotated[float, Limits(0)]
Share = Annotated[float, Limits(0, 1)]
PositiveShare = Annotated[float, Limits(0, 1, above=True)]
BelowOne = Annotated[float, Limits(0, math.nextafter(1.0, 0.0))]
Count = Annotated[int, Limits(1)]
CountOrZero = Annotated[int, Limits(0)]
JsonObject = Mapping[str, Any]
"""JSON values by name."""
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    JsonObject: "a dict of JSON values",
}


class Checked:
    """Base of dataclasses that check their values when they are constructed."""

    def __post_init__(self) -> None:
        """Raise ConfigError, which names the field, for a value that cannot be used."""
        check(self)


def check(settings: Any) -> None:
    """Check the values of a dataclass against the types of its fields, with limits and choices.

    Also in a frozen one, numbers of numpy become Python's, integers floats, and lists tuples where
    these are due.
    """
    kind: Any = type(settings)
    for name, hint in _hints(kind).items():
        object.__setattr__(settings, name, _checked(name, hint, getattr(settings, name)))


def _checked(name: str, hint: Any, value: Any) -> Any:
    """Value in the type of its field; ConfigError if it does not fit."""
    if isinstance(value, np.generic):
        value = value.item()
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(hint):
        return value if _is_word(value, args) else _checked(name, args[0], value)
    if origin is Annotated:
        for limits in args[1:]:
            limits.check(name, value, args[0])
        return _checked(name, args[0], value)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_checked(f"each of {name}", args[0], item) for item in value)
    if not _fits(hint, value):
        raise ConfigError(f"{name} must be {_wanted(hint)}, got {value!r:.60}")
    if hint == JsonObject:
        _check_json(name, value)
    if hint is float and abs(value) <= sys.float_info.max:  # others are the class's to refuse
        return float(value)
    return value


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value is of a type, where an integer is a float, but a bool no integer."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in hint.__args__
    if origin is not None:
        return bool(hint == JsonObject) and isinstance(value, Mapping)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _wanted(hint: Any) -> str:
    """What a field takes, in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return f"a list of {'names' if args[0] is str else 'integers'}"
    return _WORDS.get(hint) or f"of the class {hint.__name__}"


def _check_json(name: str, value: JsonObject) -> None:
    for key, item in value.items():
        if not (isinstance(key, str) and is_json(item)):
            raise ConfigError(
                f"{name}: {key} must be a JSON value (null, true, false, a number, text, a list or"
                f" an object), got {item!r:.60}"
            )


def build(kind: Any, values: Any, path: str = "") -> Any:
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
    hints = _hints(kind)
    group = f"{path}." if path else ""
    given = {}
    for key, value in values.items():
        where = f"{group}{key}"
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, 1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(f"configuration: unknown setting {where:.120}{meant}")
        hint = hints[key]
        nested = dataclasses.is_dataclass(hint)
        given[key] = build(hint, value, where) if nested else _checked(where, hint, value)
    for item in dataclasses.fields(kind):
        needed = item.default is item.default_factory is dataclasses.MISSING
        if needed and item.name not in given:
            raise ConfigError(f"configuration: {group}{item.name} is missing")
    try:
        return kind(**given)
    except ValueError as error:
        raise ConfigError(f"{group}{error}") from None


def overlay(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with part of them replaced, nested ones one by one."""
    merged = dict(base)
    for key, value in values.items():
        old = base.get(key)
        nested = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = overlay(old or {}, value) if nested else value
    return merged


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _is_word(value: Any, kinds: tuple[Any, ...]) -> bool:
    """Whether a value of a union is None or a word such as auto rather than of the first kind."""
    words = [word for kind in kinds if typing.get_origin(kind) is Literal for word in kind.__args__]
    return (value is None and type(None) in kinds) or (isinstance(value, str) and value in words)
