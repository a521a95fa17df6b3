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
from acktr.files import blanked, reason, write_atomic
from acktr.interrupts import STOPPED, Interrupts, Stopped, end_with_parent
from acktr.runs.folder import RunError, versions

FAILED, BAD_INPUT = 1, 2
_CPU_INFO = Path("/proc/cpuinfo")
_ENVIRONMENTS = ("gymnasium", "ale-py", "mujoco")


class ScriptError(ValueError):
    """Bad input, or a result that cannot be written; the message is one line."""


def run(name: str, work: Callable[[Interrupts], int], stopped: str) -> int:
    """Do a script's work and return its exit code: its own, 2 bad input, 130 Ctrl-C, 75 SIGTERM.

    A closed terminal and the end of the process that started this one count as SIGTERM, so that
    processes that were started are stopped then too.

    Args:
        name: The script, for messages.
        work: What to do; its result is the exit code.
        stopped: What the user is told after a signal.
    """
    end_with_parent()
    try:
        with Interrupts() as interrupts:
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
    sys.stderr.write(f"{name}: {blanked(text)}\n")
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


def integer(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """A parser for argparse of integers in [least, most], by default those that torch takes.

    Its argparse.ArgumentTypeError says what was wrong and what would be right.
    """

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= int(text) <= most:
                return int(text)
        wanted = f">= {least} and < 2^63" if most == 2**63 - 1 else f"in [{least}, {most}]"
        raise argparse.ArgumentTypeError(f"needs an integer {wanted}, got {text!r}")

    return parse


def positive(most: float) -> Callable[[str], float]:
    """A parser for argparse of numbers in (0, most].

    Its argparse.ArgumentTypeError says what was wrong and what would be right.
    """

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if 0 < float(text) <= most:
                return float(text)
        raise argparse.ArgumentTypeError(f"needs a number in (0, {most:g}], got {text!r}")

    return parse


def finite(text: str) -> float:
    """A parser for argparse of finite numbers.

    Raises:
        argparse.ArgumentTypeError: It says what was wrong and what would be right.
    """
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    raise argparse.ArgumentTypeError(f"needs a finite number, got {text!r}")


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
    known = {key: value for key, value in versions().items() if value is not None}
    return {**known, "cpu": cpu_model()}


def described_machine(*, environments: bool = False) -> str:
    """Versions, those of environments if asked for, processor, threads and commit in one line."""
    others = () if environments else _ENVIRONMENTS
    known = {key: value for key, value in machine().items() if key not in others}
    return f"Machine: {', '.join(f'{key} {value}' for key, value in known.items())}\n"


def cpu_model() -> str:
    """Name of the processor, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in _CPU_INFO.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def cores() -> int:
    """Number of processors that this process may use."""
    known = hasattr(os, "sched_getaffinity")  # not on every system
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
