"""Child processes that train, several at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from acktr.files import reason
from acktr.interrupts import PARENT

_LIBRARIES = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM")
_TAIL = 8192

Job = TypeVar("Job")


@dataclass(frozen=True)
class Ended(Generic[Job]):
    """A job that no longer runs."""

    job: Job
    code: int | None
    """Exit code; None if it could not be started."""
    line: str
    """The last line of its output, or why it could not be started."""


class Child(Protocol):
    """A process of a job, here or elsewhere."""

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""

    def terminate(self) -> None:
        """Ask it to write a checkpoint and to end."""

    def kill(self) -> None:
        """End it."""

    def last_line(self) -> str:
        """The last line of its output, or nothing."""


class ChildProcess:
    """A child in a session of its own, so that Ctrl-C reaches only the parent.

    The parent holds one end of a pipe; where it is closed, even by ``kill -9``, a child of this
    package stops as after SIGTERM (:func:`acktr.interrupts.end_with_parent`).

    Args:
        args: Arguments of ``python -m MODULE``.
        log: File that its output is added to.
        module: What it runs.
        threads: Threads of its numerical libraries.
        folder: Its working directory; this process's if not given.

    Raises:
        OSError: The file cannot be written or the process not be started.
    """

    def __init__(
        self,
        args: Sequence[str],
        log: Path,
        module: str = "acktr",
        threads: int = 1,
        folder: Path | None = None,
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        watched, life = os.pipe()
        self._life: int | None = life
        passed = () if sys.platform == "win32" else (watched,)
        environment = child_environment(os.environ, sys.path, threads)
        if passed:
            environment[PARENT] = str(watched)
        try:
            with log.open("ab") as output:
                self._begin = output.tell()
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", module, *args],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    cwd=folder,
                    pass_fds=passed,
                    start_new_session=True,
                )
        except BaseException:
            os.close(life)
            raise
        finally:
            os.close(watched)

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        code = self._process.poll()
        if code is not None:
            self._let_go()
        return code

    def terminate(self) -> None:
        """Send SIGTERM, upon which it writes a checkpoint."""
        self._process.terminate()

    def kill(self) -> None:
        """Kill its session and wait for its end."""
        if self._process.poll() is None:
            if sys.platform == "win32":
                self._process.kill()
            else:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._let_go()

    def _let_go(self) -> None:
        """Close the end of the pipe that its life hangs on."""
        if self._life is not None:
            os.close(self._life)
            self._life = None

    def last_line(self) -> str:
        """The last line of its output, or nothing."""
        try:
            with self._log.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._begin, size - _TAIL))
                text = file.read(_TAIL).decode("utf-8", "replace")
        except OSError:
            return ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1].removeprefix("acktr: ") if lines else ""


def child_environment(
    base: Mapping[str, str], path: Sequence[str], threads: int = 1
) -> dict[str, str]:
    """Environment of a child that imports what a process with this one and ``sys.path`` would.

    An empty entry of ``path`` is the working directory.
    """
    limits = {f"{name}_NUM_THREADS": str(threads) for name in _LIBRARIES}
    entries = os.pathsep.join(entry or os.getcwd() for entry in path)
    return {**base, **limits, "PYTHONPATH": entries}


class Pool(Generic[Job]):
    """Runs jobs in their order, at most so many at a time; on leaving it, none is left running.

    ``launch`` starts a job; an OSError counts as its end.
    """

    def __init__(self, jobs: Sequence[Job], workers: int, launch: Callable[[Job], Child]) -> None:
        self._waiting = deque(jobs)
        self._workers = workers
        self._launch = launch
        self._running: list[tuple[Job, Child]] = []
        self._stopping = False

    @property
    def running(self) -> list[Job]:
        """Jobs with a process, oldest first."""
        return [job for job, _ in self._running]

    @property
    def waiting(self) -> int:
        """Jobs that have not been started."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether anything runs or will run."""
        return bool(self._running) or (bool(self._waiting) and not self._stopping)

    def step(self) -> list[Ended[Job]]:
        """Take note of children that ended and start others in their place."""
        ended: list[Ended[Job]] = []
        for job, child in list(self._running):
            code = child.poll()
            if code is not None:
                self._running.remove((job, child))
                ended.append(Ended(job, code, child.last_line()))
        while self._waiting and not self._stopping and len(self._running) < self._workers:
            job = self._waiting.popleft()
            try:
                self._running.append((job, self._launch(job)))
            except OSError as error:
                where = f"{error.filename}: " if error.filename else ""
                ended.append(Ended(job, None, f"cannot start: {where}{reason(error)}"))
        return ended

    def stop(self) -> None:
        """Start nothing more and ask what runs to end."""
        self._stopping = True
        for _, child in self._running:
            child.terminate()

    def __enter__(self) -> Pool[Job]:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        left = [child for _, child in self._running]
        while left:
            with suppress(KeyboardInterrupt):  # one more signal must not leave anything behind
                while left:
                    left[-1].kill()
                    left.pop()
