"""Processes: an `acktr` command that is forked and may be killed, and what is left of it. Linux."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from acktr.cli.main import main

_PROC = Path("/proc")


class Command:
    """An ``acktr`` command in a process of its own, forked from this one, leader of a session.

    It is the command from ``main()`` on, with the same handlers; what is imported is imported
    already, so that a random moment is one of training.

    Args:
        argv: The command's words, without the first.
        here: Its working directory; what it prints goes to ``here/said.txt``.
        before: Done in that process before the command.
    """

    def __init__(
        self, argv: Sequence[str], here: Path, before: Callable[[], None] | None = None
    ) -> None:
        self.log = here / "said.txt"
        self._begin = self.log.stat().st_size if self.log.exists() else 0
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        self._code: int | None = None
        if self.pid == 0:
            _obey(argv, here, self.log, before)

    @property
    def said(self) -> str:
        """What it has printed."""
        return self.log.read_bytes()[self._begin :].decode("utf-8", "replace")

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self, limit: float) -> int:
        """Its exit code; TimeoutError after so many seconds, when it is killed."""
        until = time.monotonic() + limit
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                kill({self.pid, *descendants(self.pid)})
                raise TimeoutError(f"{limit:g} s were not enough; {self.said[-300:]}")
            time.sleep(0.005)
        return code

    def wait_at_most(self, seconds: float) -> int | None:
        """Its exit code, or None if it still runs then."""
        until = time.monotonic() + seconds
        while (code := self.poll()) is None and time.monotonic() < until:
            time.sleep(0.002)
        return code

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


def _obey(
    argv: Sequence[str], here: Path, log: Path, before: Callable[[], None] | None
) -> NoReturn:
    code = 1
    try:
        os.setsid()
        os.chdir(here)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.close(handle)
        sys.argv = ["acktr", *argv]
        if before is not None:
            before()
        code = main()
    except BaseException:  # a traceback is what must not be
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def descendants(pid: int) -> set[int]:
    """Children of a process, their children, and so on; those that live."""
    parents: dict[int, int] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (fields := _fields(int(entry.name))) is not None:
            parents[int(entry.name)] = int(fields[1])
    found: set[int] = set()
    waiting = {pid}
    while waiting:
        waiting = {child for child, parent in parents.items() if parent in waiting} - found
        found |= waiting
    return found


def alive(pids: Iterable[int]) -> set[int]:
    """Those of the processes that run; zombies do not."""
    return {pid for pid in pids if (fields := _fields(pid)) is not None and fields[0] not in "ZX"}


def gone(pids: Iterable[int], within: float) -> set[int]:
    """Those that are still there so many seconds later; it ends as soon as there are none."""
    until = time.monotonic() + within
    while (left := alive(pids)) and time.monotonic() < until:
        time.sleep(0.02)
    return left


def kill(pids: Iterable[int]) -> None:
    """Kill processes that may be gone already."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _fields(pid: int) -> list[str] | None:
    """State, parent and what follows in /proc/PID/stat; None if there is no such process."""
    try:
        text = (_PROC / str(pid) / "stat").read_text("utf-8", "replace")
    except OSError:
        return None
    return text[text.rindex(")") + 2 :].split()
