"""What other machines are told to run, and how they run it; little is imported for that."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from acktr.compare.pool import ChildProcess

LOST = 77
"""Code of a run whose machine or job went away, which left none."""
_LOOK = 0.5
"""Seconds between two looks of another machine at its process."""


@dataclass(frozen=True)
class Order:
    """What another machine is told to run; all paths are absolute."""

    args: tuple[str, ...]
    """Arguments of ``acktr``."""
    log: Path
    """File that the output is added to."""
    folder: Path
    """Working directory."""
    stop: Path
    """File whose existence is the wish that the run stops."""
    gpus: int
    """GPUs that the run needs."""


class Task(Protocol):
    """An order that another machine has, or waits for."""

    def ended(self) -> tuple[int, str] | None:
        """What :func:`attend` found there; ``LOST`` and why if it cannot tell. None before."""

    def cancel(self) -> None:
        """End it: not begun, it never does; begun, as after SIGTERM."""


def attend(order: Order) -> tuple[int, str]:
    """Run an order on the machine that has it, until its end; the code, and its last line.

    KeyboardInterrupt, and the file of the order, let it stop as after SIGTERM.
    """
    if order.stop.exists():
        return -signal.SIGTERM, "stopped before it began"
    child = ChildProcess(order.args, order.log, folder=order.folder)
    told = False
    while (code := child.poll()) is None:
        try:
            wanted = order.stop.exists()
            time.sleep(_LOOK)
        except KeyboardInterrupt:
            wanted = True
        if wanted and not told:
            child.terminate()
            told = True
    return code, child.last_line()


def attend_job(order: Order) -> tuple[int, str]:
    """As :func:`attend`, in a job: Slurm's warning of a time limit, and SIGTERM, let it stop."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGUSR1):  # which the run gets as well
        signal.signal(number, stop)
    return attend(order)
