"""What the scripts share: command lines, exit codes, progress, result files and the machine."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import platform
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from acktr.config import ConfigError
from acktr.envs import EnvError
from acktr.files import reason, write_atomic
from acktr.interrupts import STOPPED, Interrupts, Stopped, hangup_terminates
from acktr.runs.folder import RunError, versions
from acktr.runs.progress import duration

FAILED, BAD_INPUT = 1, 2
_LARGEST = 2**63 - 1
"""What torch takes as a seed or a size."""
_CPU_INFO = Path("/proc/cpuinfo")


class ScriptError(ValueError):
    """Bad input, or a result that cannot be written; the message is one line."""


def run(name: str, work: Callable[[Interrupts], int], stopped: str) -> int:
    """Do a script's work and return its exit code: its own, 2 bad input, 130 Ctrl-C, 75 SIGTERM.

    A closed terminal counts as SIGTERM, so that processes that were started are stopped then too.

    Args:
        name: The script, for messages.
        work: What to do; its result is the exit code.
        stopped: What the user is told after a signal.
    """
    try:
        with Interrupts() as interrupts, hangup_terminates():
            return work(interrupts)
    except (ScriptError, ConfigError, EnvError, RunError) as error:
        complain(name, f"error: {error}")
        return BAD_INPUT
    except Stopped as stop:
        complain(name, f"stopped; {stopped}")
        return STOPPED[signal.Signals(stop.signum)]


def on_files(name: str, work: Callable[[], None]) -> int:
    """Make results of files and return the exit code: 0, or 2 with one line on bad input.

    Args:
        name: The script, for messages.
        work: What to do.
    """
    try:
        work()
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        complain(name, f"error: {where}{reason(error)}")
    except (ValueError, RunError) as error:
        complain(name, f"error: {error}")
    else:
        return 0
    return BAD_INPUT


def complain(name: str, text: str) -> None:
    """Write one line on standard error."""
    line = "".join(c if c.isprintable() else " " for c in text)
    sys.stderr.write(f"{name}: {line}\n")
    sys.stderr.flush()


def command_line(name: str, argv: Sequence[str]) -> str:
    """What the user has typed, for the results."""
    return shlex.join(["python", "-m", f"scripts.{name}", *argv])


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Options of a command line; help is printed and ends in SystemExit.

    Raises:
        ScriptError: One line that says what is wrong.
    """
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return parser.parse_args(argv)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        message = captured.getvalue().strip().splitlines()[-1]
        raise ScriptError(message.partition(" error: ")[2] or message) from None


def given_once(found: argparse.Namespace, *flags: str) -> None:
    """Refuse values that are repeated in one of the options."""
    for flag in flags:
        values = getattr(found, flag)
        if len(set(values)) != len(values):
            raise ScriptError(f"argument --{flag}: each value may be given once")


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
        value = _float(text)
        if not (0 < value <= most and value < math.inf):
            raise argparse.ArgumentTypeError(f"needs a {wanted}, got {text!r}")
        return value

    return parse


def finite(text: str) -> float:
    """A parser for argparse of finite numbers.

    Raises:
        argparse.ArgumentTypeError: It says what was wrong and what would be right.
    """
    value = _float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"needs a finite number, got {text!r}")
    return value


def _float(text: str) -> float:
    """The number; NaN for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


class TimeLeft:
    """Estimate of the time that planned work still takes, each kind of it at its own speed.

    Args:
        planned: Amount of work by kind.
        guess: Seconds per amount as long as nothing was measured; None for no estimate then.
    """

    def __init__(self, planned: Mapping[str, float], guess: float | None = None) -> None:
        self._left = dict(planned)
        self._total = sum(planned.values())
        self._guess = guess
        self._done: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    def add(self, kind: str, amount: float, seconds: float) -> None:
        """Record work that is done and the seconds that it took."""
        self._left[kind] -= amount
        self._done[kind] = self._done.get(kind, 0.0) + amount
        self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds

    def drop(self, kind: str, amount: float) -> None:
        """Take work out of the plan."""
        self._left[kind] -= amount
        self._total -= amount

    @property
    def share(self) -> float:
        """Part of the work that is done, 0 to 1."""
        return sum(self._done.values()) / max(self._total, 1e-9)

    def seconds(self) -> float | None:
        """Seconds left; kinds that were not measured go at the mean speed."""
        done = sum(self._done.values())
        mean = sum(self._seconds.values()) / done if done else self._guess
        if mean is None:
            return None
        paces = {kind: self._seconds[kind] / amount for kind, amount in self._done.items()}
        return sum(paces.get(kind, mean) * left for kind, left in self._left.items())

    def __str__(self) -> str:
        seconds = self.seconds()
        return "-" if seconds is None else duration(max(0.0, seconds))


def save(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write or replace files of a folder, which is made if need be.

    Raises:
        ScriptError: One of them cannot be written.
    """
    for name, data in files.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / name, data)
        except OSError as error:
            raise ScriptError(f"{folder / name}: cannot write: {reason(error)}") from error


def check_folder(out: Path) -> None:
    """Find out before the work whether its results could be written.

    Raises:
        ScriptError: They could not.
    """
    try:
        place = next(path for path in (out, *out.absolute().parents) if path.exists())
    except OSError as error:
        raise ScriptError(f"argument --out: {reason(error)}") from error
    if not place.is_dir():
        raise ScriptError(f"argument --out: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ScriptError(f"argument --out: cannot write to {place}")


def machine() -> dict[str, Any]:
    """Versions, processor, threads and commit; what is unknown is left out."""
    found = {key: value for key, value in versions().items() if value is not None}
    return {**found, "cpu": cpu_model()}


def cpu_model() -> str:
    """Name of the processor, as far as the system tells it."""
    try:
        lines = _CPU_INFO.read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def cores() -> int:
    """Number of processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
