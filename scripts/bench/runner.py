"""Measures cases one after another, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from acktr.files import read_object
from acktr.interrupts import Interrupts
from scripts.bench.cases import Turn
from scripts.bench.worker import OUTPUT, RESULT, write_task

WORKER = "--worker"
"""First argument of a process that measures; the folder with its task is the second."""
_POLL = 0.1
_INTERVAL = 30.0
"""Seconds between lines that say how far it is."""
_PATIENCE = 5.0
"""Seconds that a stopped process has before it is killed."""
_START = 6.0
"""Seconds of a case outside of warm-up and windows, until a first one has shown it."""
_CONTESTANTS = 4
"""Windows' worth of blocks that a supervised case takes at most: SGD, twice K-FAC, a first look."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    found: dict[str, Any] | None
    """The measurement; None if it failed."""
    failure: str = ""
    """The last line that a failed process has said."""


class Runner:
    """Measures the cases of all suites in turn.

    Args:
        planned: All measurements there will be, for the time left.
        say: Takes lines for the user.
        interrupts: Who handles SIGINT and SIGTERM.
    """

    def __init__(
        self,
        planned: Sequence[Turn],
        say: Callable[[str], None],
        interrupts: Interrupts,
    ) -> None:
        self._waiting = list(planned)
        self._total = len(planned)
        self._say = say
        self._interrupts = interrupts
        self._spent = 0.0
        self._expected = 0.0

    def run(self, turn: Turn) -> Outcome:
        """Measure one case; a process that fails stops nothing."""
        self._waiting.remove(turn)
        case = turn.case
        number = self._total - len(self._waiting)
        name = " ".join(part for part in (case.what, case.env) if part)
        self._say(f"[{number}/{self._total}] {name}, ETA {self._left(turn, 0.0)}")
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            outcome = self._measure(turn, Path(folder), started)
        self._spent += time.monotonic() - started
        self._expected += _estimate(turn)
        if outcome.found is None:
            self._say(f"  failed: {outcome.failure}")
        return outcome

    def _measure(self, turn: Turn, folder: Path, started: float) -> Outcome:
        write_task(folder, turn.case, turn.timing)
        # A stop while the process starts would lose sight of it.
        with (folder / OUTPUT).open("wb") as output, self._interrupts.deferred():
            process = subprocess.Popen(
                [sys.executable, "-m", "scripts.bench", WORKER, str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches it, and its own processes, through _stop
            )
            try:
                with self._interrupts.at_once():
                    self._wait(process, turn, started)
            finally:
                _stop(process)
        self._interrupts.check()  # a stop that came meanwhile
        if process.returncode != 0:
            return Outcome(None, _last_line(folder / OUTPUT) or f"code {process.returncode}")
        return Outcome(read_object(folder / RESULT))

    def _wait(self, process: subprocess.Popen[bytes], turn: Turn, started: float) -> None:
        shown = started
        while process.poll() is None:
            time.sleep(_POLL)
            now = time.monotonic()
            if now - shown >= _INTERVAL:
                shown = now
                elapsed = timedelta(seconds=round(now - started))
                self._say(f"  measuring for {elapsed}, ETA {self._left(turn, now - started)}")

    def _left(self, turn: Turn, elapsed: float) -> timedelta:
        """Time until all cases are measured, by what the finished ones took."""
        factor = self._spent / self._expected if self._expected else 1.0
        current = max(0.0, factor * _estimate(turn) - elapsed)
        others = factor * sum(_estimate(other) for other in self._waiting)
        return timedelta(seconds=round(current + others))


def _estimate(turn: Turn) -> float:
    measured = turn.timing.warm_up + turn.timing.windows * turn.timing.seconds
    return _START + measured * (_CONTESTANTS if turn.case.kind == "supervised" else 1)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process with all processes that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)


def _last_line(path: Path) -> str:
    lines = path.read_text("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else ""
