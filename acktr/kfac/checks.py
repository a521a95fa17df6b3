"""Checks of numbers and of stored states; a complaint is one line that names the field."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any

_MOST = 1e30
"""Numbers beyond it are no setting, and float32 has no room to multiply them."""


def check_integer(name: str, value: object, least: int) -> None:
    """Raise ValueError unless value is an integer >= least, of at most 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 63:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r:.60}")


def check_number(
    name: str,
    value: object,
    low: float = 0.0,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise ValueError unless value is a finite number between the limits.

    Args:
        name: What the message calls it.
        value: What to check.
        low: Smallest value.
        high: Largest value.
        open_low: The value must be above low.
        open_high: The value must be below high.
    """
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):  # an integer beyond all floating-point numbers
            number = float(value)
    above = number > low if open_low else number >= low
    below = number < high if open_high else number <= high
    if abs(number) <= _MOST and above and below:
        return
    if math.isinf(high) and _MOST < abs(number) < math.inf:
        limits = f"at most {_MOST:g}"
    elif math.isinf(high):
        limits = f"a finite number {'>' if open_low else '>='} {low:g}"
    else:
        limits = (
            f"a number in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        )
    raise ValueError(f"{name} must be {limits}, got {value!r:.60}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(choices)}, got {value!r}")


def check_flags(settings: object, *names: str) -> None:
    """Raise ValueError unless these attributes are True or False."""
    for name in names:
        value = getattr(settings, name)
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r:.60}")


def refuse_settings(owner: object, names: Iterable[str], config: type[Any]) -> None:
    """Raise TypeError for arguments that a class does not have, as settings of its configuration.

    Args:
        owner: The object that is constructed.
        names: The arguments.
        config: The dataclass of its settings.
    """
    kind = type(owner).__name__
    for name in names:
        hint = ""
        if name in {field.name for field in fields(config)}:
            whole = config.__name__
            hint = f": settings are those of {whole}, as in {kind}(model, {whole}({name}=...))"
        raise TypeError(f"{kind} has no argument {name}{hint}")
