"""Command lines of the scripts, refused with one line that says what is right."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
from collections.abc import Callable, Sequence

_LARGEST = 2**63 - 1
"""What torch takes as a seed or a size."""


def parsed(
    parser: argparse.ArgumentParser, argv: Sequence[str], error: type[Exception] = ValueError
) -> argparse.Namespace:
    """Options of a command line; help is printed and ends in SystemExit.

    Args:
        parser: What it may say.
        argv: The command line.
        error: Raised with one line that says what is wrong.
    """
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return parser.parse_args(argv)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        message = captured.getvalue().strip().splitlines()[-1]
        raise error(message.partition(" error: ")[2] or message) from None


def given_once(found: argparse.Namespace, flags: Sequence[str], error: type[Exception]) -> None:
    """Refuse values that are repeated in one of the options."""
    for flag in flags:
        values = getattr(found, flag)
        if len(set(values)) != len(values):
            raise error(f"argument --{flag}: each value may be given once")


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """A parser for argparse of integers in [least, most]; without ``most`` below 2^63.

    Its argparse.ArgumentTypeError says what was wrong and what would be right.
    """

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        limit = _LARGEST if most is None else most
        if not least <= value <= limit:
            open_end = most is None and value < least
            wanted = f">= {least}" if open_end else f"in [{least}, {limit}]"
            raise argparse.ArgumentTypeError(f"needs an integer {wanted}, got {text!r}")
        return value

    return parse


def positive(most: float = math.inf) -> Callable[[str], float]:
    """A parser for argparse of finite numbers in (0, most].

    Its argparse.ArgumentTypeError says what was wrong and what would be right.
    """
    wanted = "finite number > 0" if most == math.inf else f"number in (0, {most:g}]"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (0 < value <= most and value < math.inf):
            raise argparse.ArgumentTypeError(f"needs a {wanted}, got {text!r}")
        return value

    return parse


def finite(text: str) -> float:
    """A parser for argparse of finite numbers.

    Raises:
        argparse.ArgumentTypeError: It says what was wrong and what would be right.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"needs a finite number, got {text!r}")
    return value
