"""Errors of the environment layer, each with a message of one line."""

from __future__ import annotations

import numpy as np


class EnvError(ValueError):
    """An environment id, setting or space that cannot be used; the message is one line."""


class EnvFault(RuntimeError):  # noqa: N818 - a fault at run time, not a misuse
    """An environment misbehaved while running (NaN, Inf, out-of-range); names index and step."""


class UnsavedError(EnvError):
    """An environment that has no state to save; the message is one line."""


class EnvWarning(UserWarning):
    """An environment does what it should not, and training goes on; the message is one line."""


def one_line(error: BaseException) -> str:
    """The message of an exception on one line, with its type if there is no message."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


def named(error: BaseException) -> str:
    """The type and the message of an exception on one line."""
    return f"{type(error).__name__}: {one_line(error)}"


def check_integer(name: str, value: object, low: int, high: int) -> int:
    """Return an integer that lies in a range.

    Raises:
        EnvError: It does not, or is no integer.
    """
    value = int(value) if isinstance(value, np.integer) else value
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise EnvError(f"{name} must be an integer from {low} to {high}, got {value!r}")
    return value
