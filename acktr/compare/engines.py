"""Where the processes of a comparison run: on this machine, or on those of a Ray or Slurm cluster.

Other machines see the same folders: orders, output and what a run writes go through files, and so
does the wish that a run stops.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from acktr.compare.grid import RunPlan, train_args
from acktr.compare.orders import LOST, Order, Task
from acktr.compare.pool import Child, ChildProcess
from acktr.compare.status import State, status
from acktr.interrupts import STOPPED
from acktr.runs.folder import RunError

Engine = Literal["local", "ray", "slurm"]
Launch = Callable[[RunPlan, bool], Child]
"""Starts the process of a run, and is told whether that has a checkpoint."""

_TRIES = 3
"""Starts of a run in a row without a newer checkpoint after which it has failed."""
_PATIENCE = 300.0
"""Seconds in which a process on a lost machine may still hold the run."""


def ordered(plan: RunPlan, resume: bool, module: str | None) -> Order:
    """The order to train a run; with ``resume`` it has a checkpoint, ``module`` is --import's."""
    there = dataclasses.replace(plan, run_dir=plan.run_dir.absolute())
    log, gpus = there.log, int(plan.config.device.startswith("cuda"))
    args = tuple(train_args(there, resume, module))
    return Order(args, log, Path.cwd(), log.with_suffix(".stop"), gpus)


class RemoteChild:
    """The process of a run on another machine.

    Where the machine is lost, or a scheduler stops the run (which saves it), it begins again from
    its checkpoint, as long as that moves on.

    Args:
        plan: The run.
        resume: Whether it has a checkpoint.
        begin: Hands an order out.
        module: What --import names.
        clock: Seconds.
    """

    def __init__(
        self,
        plan: RunPlan,
        resume: bool,
        begin: Callable[[Order], Task],
        module: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan, self._begin, self._module, self._clock = plan, begin, module, clock
        self._steps, self._tries, self._code, self._line = 0, 1, LOST, ""
        self._stopping = False
        self._since = 0.0
        self._task: Task | None = self._started(resume)

    def poll(self) -> int | None:
        """Its exit code, or ``LOST``; None while it runs or waits."""
        if self._task is None:
            return self._again()
        found = self._task.ended()
        if found is None:
            return None
        self._code, self._line = found
        gone = self._code == LOST or self._code in STOPPED.values()
        if gone and not self._stopping:
            self._task, self._since = None, self._clock()
            return self._again()
        self._order.stop.unlink(missing_ok=True)
        return self._code

    def _again(self) -> int | None:
        """Begin again where nobody trains the run any more; its code where that is no use."""
        if self._stopping:
            return self._code
        try:
            there = status(self._plan)
        except RunError as error:
            late = self._clock() - self._since > _PATIENCE
            self._line = str(error) if late else self._line
            return LOST if late else None
        if there.state is State.FINISHED:
            return 0
        if there.state is State.STUCK:
            self._line = there.reason
            return self._code
        self._tries = 1 if there.timesteps > self._steps else self._tries + 1
        if self._tries > _TRIES:
            return self._code
        self._steps = there.timesteps
        self._task = self._started(there.state is State.UNFINISHED)
        return None

    def _started(self, resume: bool) -> Task:
        self._order = ordered(self._plan, resume, self._module)
        self._order.log.parent.mkdir(parents=True, exist_ok=True)
        self._order.stop.unlink(missing_ok=True)
        return self._begin(self._order)

    def terminate(self) -> None:
        """Let it write a checkpoint and end."""
        self._stopping = True
        if self._task is not None:
            self._order.stop.touch()
            self._task.cancel()

    def kill(self) -> None:
        """Let go of it; it ends in some seconds, with a checkpoint."""
        with suppress(OSError):
            self.terminate()

    def last_line(self) -> str:
        """The last line of its output, or why there is none."""
        return self._line


@contextmanager
def launching(engine: Engine, run_dir: Path, module: str | None) -> Iterator[Launch]:
    """What starts runs on an engine, while entered.

    Args:
        engine: Its name.
        run_dir: Folder of all runs.
        module: What --import names.

    Raises:
        ConfigError: Its package or its cluster is not there; one line.
    """
    if engine == "local":
        yield lambda plan, resume: ChildProcess(train_args(plan, resume, module), plan.log)
        return
    if engine == "ray":
        from acktr.compare.on_ray import tasks
    else:
        from acktr.compare.on_slurm import tasks
    with tasks(run_dir) as begin:
        yield lambda plan, resume: RemoteChild(plan, resume, begin, module)
