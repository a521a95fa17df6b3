"""Orders as jobs of a Slurm cluster, which submitit hands in."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from acktr.compare.orders import LOST, Order, Task, attend_job
from acktr.config import ConfigError
from acktr.files import one_line

_NOTICE = 120
"""Seconds before its time is over that a job is told."""
_ASK = 20.0
"""Seconds between two questions about a job."""
_GONE = ""
_UNKNOWN = "UNKNOWN"


def state_of(job_id: str) -> str:
    """Slurm's word for the state of a job, ``""`` for one that has ended or never was."""
    words = ["squeue", "--noheader", "--format=%T", f"--jobs={job_id}"]
    try:
        told = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return _UNKNOWN
    if told.returncode == 0 or "Invalid job id" in told.stderr:
        return told.stdout.strip()
    return _UNKNOWN  # nobody answers: that is no end


class SlurmTask:
    """An order that Slurm has.

    Args:
        job: Of submitit.
        state: Says how it is with the job.
        clock: Seconds.
    """

    def __init__(
        self, job: Any, state: Callable[[], str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._job, self._state, self._clock = job, state, clock
        self._asked, self._missed, self._cancelled = clock(), 0, False

    def ended(self) -> tuple[int, str] | None:
        """As :class:`acktr.compare.orders.Task`."""
        if self._cancelled:
            return -signal.SIGTERM, "stopped before it began"
        if not self._job.paths.result_pickle.exists():
            return self._lost()
        try:
            code, line = self._job.result()
        except Exception as error:  # whatever the job raised
            last = str(error).strip().rpartition("\n")[2].strip()
            return LOST, f"job {self._job.job_id} failed: {one_line(last):.300}"
        return int(code), str(line)

    def _lost(self) -> tuple[int, str] | None:
        """The end of a job that left no result; its file may be seen here a while after it."""
        now = self._clock()
        if now - self._asked < _ASK:
            return None
        self._asked = now
        self._missed = self._missed + 1 if self._state() == _GONE else 0
        if self._missed < 2:
            return None
        return LOST, f"job {self._job.job_id} is gone and has left no result"

    def cancel(self) -> None:
        """As :class:`acktr.compare.orders.Task`; a job that has begun sees the order's file."""
        if self._state() == "PENDING":
            self._job.cancel(check=False)
            self._cancelled = True


@contextmanager
def tasks(run_dir: Path, cluster: str = "slurm") -> Iterator[Callable[[Order], Task]]:
    """What hands in a job for every order; the limits of jobs are those of Slurm's ``SBATCH_*``.

    Args:
        run_dir: Its ``logs/slurm`` holds what submitit writes.
        cluster: Of submitit: slurm, or local for processes of this machine.

    Raises:
        ConfigError: There is no submitit, or no Slurm.
    """
    try:
        import submitit
    except ImportError as error:
        raise ConfigError(
            'the engine slurm needs the package submitit: pip install "acktr[slurm]"'
        ) from error
    if cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise ConfigError(
            "the engine slurm needs the commands sbatch and srun: start it on a machine of a"
            " Slurm cluster"
        )
    folder = run_dir.absolute() / "logs" / "slurm"

    def begin(order: Order) -> SlurmTask:
        if cluster != "slurm":
            job = submitit.LocalExecutor(folder).submit(attend_job, order)
            return SlurmTask(job, lambda: "RUNNING" if job.state == "RUNNING" else _GONE)
        executor = submitit.SlurmExecutor(folder)
        executor.update_parameters(
            job_name="acktr",
            time=None,  # which submitit takes for five minutes
            additional_parameters={"signal": f"USR1@{_NOTICE}"},  # which runs know; not USR2
            cpus_per_task=1,
            gpus_per_node=order.gpus or None,
        )
        job = executor.submit(attend_job, order)
        return SlurmTask(job, lambda: state_of(str(job.job_id)))

    yield begin
