"""Orders as jobs of a Slurm cluster, which submitit hands in as job arrays."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from acktr.compare.orders import LOST, Order, Task, attend_job
from acktr.config import ConfigError
from acktr.files import blanked

_NOTICE = 120
"""Seconds before its time is over that a job is told."""
_ASK = 20.0
"""Seconds between two questions about a job."""
_GONE = ""
_UNKNOWN = "UNKNOWN"

Submit = Callable[[Sequence[Order]], Sequence[Any]]
"""Makes one job array of orders that need the same, and returns its jobs."""


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
    """An order that Slurm has, or gets at the first question how it is with it.

    Args:
        order: The order.
        hand_in: Gives this task its ``job``, or says in ``refused`` why there is none.
        state: Says how it is with a job of submitit.
        clock: Seconds.
    """

    def __init__(
        self,
        order: Order,
        hand_in: Callable[[], None],
        state: Callable[[Any], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.order, self.refused, self.cancelled = order, "", False
        self.job: Any = None
        self._hand_in, self._state, self._clock = hand_in, state, clock
        self._asked, self._missed = clock(), 0

    def ended(self) -> tuple[int, str] | None:
        """As :class:`acktr.compare.orders.Task`."""
        if self.cancelled:
            return -signal.SIGTERM, "stopped before it began"
        if self.job is None and not self.refused:
            self._hand_in()
        if self.refused:
            return LOST, self.refused
        if not self.job.paths.result_pickle.exists():
            return self._lost()
        try:
            code, line = self.job.result()
        except Exception as error:  # whatever the job raised
            return LOST, f"job {self.job.job_id} failed: {_last_line(error)}"
        return int(code), str(line)

    def _lost(self) -> tuple[int, str] | None:
        """The end of a job that left no result; its file may be seen here a while after it."""
        now = self._clock()
        if now - self._asked < _ASK:
            return None
        self._asked = now
        self._missed = self._missed + 1 if self._state(self.job) == _GONE else 0
        if self._missed < 2:
            return None
        return LOST, f"job {self.job.job_id} is gone and has left no result"

    def cancel(self) -> None:
        """As :class:`acktr.compare.orders.Task`; a job that has begun sees the order's file."""
        if self.job is None:
            self.cancelled = True
        elif self._state(self.job) == "PENDING":
            self.job.cancel(check=False)
            self.cancelled = True


class Arrays:
    """Hands in together what was begun since the last question about any of it.

    So the runs of ``--workers`` begin as one array, and those that follow them as small ones.

    Args:
        submit: Told the orders of an array.
        state: Says how it is with a job of submitit.
    """

    def __init__(self, submit: Submit, state: Callable[[Any], str]) -> None:
        self._submit, self._state = submit, state
        self._begun: list[SlurmTask] = []

    def begin(self, order: Order) -> SlurmTask:
        """The task of an order that is handed in later."""
        self._begun.append(SlurmTask(order, self.hand_in, self._state))
        return self._begun[-1]

    def hand_in(self) -> None:
        """An array for all that need as many GPUs; what was cancelled before is left out."""
        begun, self._begun = [task for task in self._begun if not task.cancelled], []
        for gpus in sorted({task.order.gpus for task in begun}):
            alike = [task for task in begun if task.order.gpus == gpus]
            try:
                with redirect_stderr(StringIO()):  # submitit repeats there what it raises
                    jobs = self._submit([task.order for task in alike])
            except Exception as error:  # what sbatch refuses, and files that cannot be written
                for task in alike:
                    task.refused = f"not handed in: {_last_line(error)}"
                continue
            for task, job in zip(alike, jobs, strict=True):
                task.job = job


def _last_line(error: Exception) -> str:
    last = str(error).strip().rpartition("\n")[2].strip()
    return f"{blanked(last):.300}"


@contextmanager
def tasks(run_dir: Path, cluster: str = "slurm") -> Iterator[Callable[[Order], Task]]:
    """What hands orders in as job arrays; the limits of jobs are those of Slurm's ``SBATCH_*``.

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

    def submit(orders: Sequence[Order]) -> Sequence[Any]:
        if cluster != "slurm":
            executor = submitit.LocalExecutor(folder)
        else:
            executor = submitit.SlurmExecutor(folder)
            executor.update_parameters(
                job_name="acktr",
                time=None,  # which submitit takes for five minutes
                # A signal that runs know, which submitit's USR2 is not; and a job that loses its
                # machine is begun again from its checkpoint, where Slurm repeats the first order.
                additional_parameters={"signal": f"USR1@{_NOTICE}", "no-requeue": True},
                array_parallelism=len(orders),  # --workers is the limit
                cpus_per_task=1,
                gpus_per_node=orders[0].gpus or None,
            )
        jobs: list[Any] = executor.map_array(attend_job, orders)
        return jobs

    def state(job: Any) -> str:
        if cluster == "slurm":
            return state_of(str(job.job_id))
        return "RUNNING" if job.state == "RUNNING" else _GONE

    yield Arrays(submit, state).begin
