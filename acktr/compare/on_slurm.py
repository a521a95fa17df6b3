"""Orders as jobs of a Slurm cluster, which submitit hands in."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from acktr.compare.orders import LOST, Order, Task, attend_job
from acktr.config import ConfigError
from acktr.files import one_line

_NOTICE = 120
"""Seconds before its time is over that a job is told."""


class SlurmTask:
    """An order that Slurm has.

    Args:
        job: Of submitit.
    """

    def __init__(self, job: Any) -> None:
        self._job = job

    def ended(self) -> tuple[int, str] | None:
        """As :class:`acktr.compare.orders.Task`."""
        if not self._job.done():
            return None
        try:
            code, line = self._job.result()
        except Exception as error:  # submitit's two, or what the job raised
            state = self._job.state
            last = str(error).strip().rpartition("\n")[2]
            return LOST, f"job {self._job.job_id} ended as {state}: {one_line(last):.300}"
        return int(code), str(line)

    def cancel(self) -> None:
        """As :class:`acktr.compare.orders.Task`; a job that has begun sees the order's file."""
        if self._job.state in ("PENDING", "UNKNOWN"):
            self._job.cancel(check=False)


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
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        limits = {"slurm_time": None, "slurm_signal_delay_s": _NOTICE}  # else five minutes
        executor.update_parameters(
            name="acktr", gpus_per_node=order.gpus, cpus_per_task=1, **limits
        )
        return SlurmTask(executor.submit(attend_job, order))

    yield begin
