"""Several runs in worker processes, each of which is this script with one run."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import IO

from acktr.interrupts import Interrupts
from scripts.peers.runs import Job

_POLL = 0.2
_INTERVAL = 30.0
"""Seconds between lines that say how far the runs are."""
_PATIENCE = 30.0
"""Seconds that a worker has to clean up before it is killed."""
_SHARE = re.compile(r"\((\d+\.\d)%\)")


@dataclass
class _Worker:
    job: Job
    process: subprocess.Popen[bytes]
    output: IO[bytes]

    def last_line(self) -> str:
        """What the worker said last."""
        size = self.output.seek(0, 2)
        self.output.seek(max(0, size - 4096))
        lines = self.output.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "starting"

    def share(self) -> float:
        """Part of its run that is done, 0 to 1."""
        found = _SHARE.search(self.last_line())
        return float(found.group(1)) / 100 if found else 0.0


class Grid:
    """Makes runs with a number of worker processes at a time.

    Args:
        jobs: The runs.
        workers: Processes at a time.
        options: Arguments of every worker besides peer, environment and seed.
        say: Takes lines for the user.
        interrupts: Who handles SIGINT and SIGTERM.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        workers: int,
        options: Sequence[str],
        say: Callable[[str], None],
        interrupts: Interrupts,
    ) -> None:
        self._waiting = list(jobs)
        self._total = len(jobs)
        self._workers = workers
        self._options = list(options)
        self._say = say
        self._interrupts = interrupts
        self._running: list[_Worker] = []
        self._done = 0
        self._failed: list[str] = []

    def run(self) -> list[str]:
        """Make all runs; one that fails does not stop the others.

        Returns:
            Names of the runs that failed.
        """
        started = time.monotonic()
        shown = started
        try:
            while self._waiting or self._running:
                with self._interrupts.deferred():  # a process that starts is not lost sight of
                    self._start_some()
                self._interrupts.check()
                time.sleep(_POLL)
                self._reap()
                if time.monotonic() - shown >= _INTERVAL:
                    shown = time.monotonic()
                    self._show(shown - started)
        finally:
            self._stop()
        return self._failed

    def _start_some(self) -> None:
        while self._waiting and len(self._running) < self._workers:
            job = self._waiting.pop(0)
            which = ["--peer", job.peer, "--env", job.env, "--seed", str(job.seed)]
            output = tempfile.TemporaryFile()  # noqa: SIM115 - _reap and _stop close it
            process = subprocess.Popen(
                [sys.executable, "-m", "scripts.peers", *which, *self._options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches the workers through _stop alone
            )
            self._running.append(_Worker(job, process, output))

    def _reap(self) -> None:
        for worker in list(self._running):
            code = worker.process.poll()
            if code is None:
                continue
            self._running.remove(worker)
            self._done += 1
            if code != 0:
                self._failed.append(worker.job.name)
            result = "" if code == 0 else f"{worker.job.name} failed with code {code}: "
            self._say(f"[{self._done}/{self._total}] {result}{worker.last_line()}")
            worker.output.close()

    def _show(self, elapsed: float) -> None:
        share = (self._done + sum(worker.share() for worker in self._running)) / self._total
        left = "-" if share == 0 else str(timedelta(seconds=round(elapsed * (1 - share) / share)))
        self._say(f"{self._done} of {self._total} runs made, {share:.1%}, ETA {left}")
        for worker in self._running:
            self._say(f"  {worker.job.name}: {worker.last_line()}")

    def _stop(self) -> None:
        """End what still runs; the workers remove their unfinished folders."""
        for worker in self._running:
            worker.process.terminate()
        deadline = time.monotonic() + _PATIENCE
        for worker in self._running:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.output.close()
        self._running = []
