"""Training the runs of a grid, several at a time, from wherever each of them is."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing

from acktr.compare.engines import Engine, Launch, launching
from acktr.compare.grid import RunPlan, unequal_presets
from acktr.compare.pool import Child, Ended, Pool
from acktr.compare.progress import Run, result, show
from acktr.compare.status import State, Status, claimed, status, survey
from acktr.interrupts import STOPPED, Interrupts, Stopped
from acktr.runs.folder import RunError
from acktr.runs.progress import Display, Meter

POLL = 0.25
"""Seconds between two looks at the processes."""
HOUR = 3600.0
"""Seconds over which the speed of the whole comparison is taken."""
LINES = 60.0
"""Seconds between two lines about the comparison where there is no terminal."""

_STOPPED = {*STOPPED.values(), -signal.SIGTERM}


class RunsFailed(RuntimeError):  # noqa: N818 - as TrainingFault
    """Some runs of a comparison failed; the message is one line."""


class Comparison:
    """Trains what is left of a grid and keeps account of it.

    The processes are looked at four times a second, when their progress is read as well: one
    thread, in which a signal finds everything as it is.

    ``launch`` starts the process of a run and is told whether that has a checkpoint. The caller
    closes ``display``.
    """

    def __init__(
        self,
        plans: Sequence[RunPlan],
        statuses: Sequence[Status],
        workers: int,
        launch: Launch,
        display: Display,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._launch = launch
        self._display = display
        self._clock, self._sleep = clock, sleep
        self._stopping = False
        self.failures: list[str] = []
        self._runs = []
        for plan, found in zip(plans, statuses, strict=True):
            self._runs.append(Run(plan, found.state, found.timesteps))
            if found.state is State.STUCK:
                self._fail(self._runs[-1], found.reason)
        left = [run for run in self._runs if run.state in (State.NEW, State.UNFINISHED)]
        self._pool = Pool(left, workers, self._start)
        self._meter = Meter(clock(), self._timesteps, HOUR)
        display.due()  # nothing is shown before the first interval is over

    @property
    def finished(self) -> int:
        """Finished runs."""
        return sum(run.state is State.FINISHED for run in self._runs)

    def run(self, interrupts: Interrupts) -> None:
        """Train until nothing is left to do.

        Args:
            interrupts: Entered by the caller. After the first signal the runs are asked to stop
                and waited for; a second one raises Stopped at once, and they are killed.

        Raises:
            Stopped: A signal came.
        """
        with self._pool as pool, interrupts.deferred():
            while pool.busy:
                if interrupts.requested is not None and not self._stopping:
                    self._stopping = True
                    count = len(pool.running)
                    self._display.note(f"stopping what runs ({count}); a second signal kills it")
                    pool.stop()
                for end in pool.step():
                    self._account(end)
                self._show()
                if pool.busy:
                    self._sleep(POLL)
            interrupts.check()

    @property
    def _timesteps(self) -> int:
        return sum(run.timesteps for run in self._runs)

    def _start(self, run: Run) -> Child:
        child = self._launch(run.plan, run.state is State.UNFINISHED)
        run.meter = Meter(self._clock(), run.timesteps)
        return child

    def _account(self, end: Ended[Run]) -> None:
        """Take note of how a run ended."""
        run = end.job
        if self._stopping and end.code in _STOPPED:
            run.state = State.UNFINISHED
            return
        if end.code != 0:
            how = f"{_how(end.code)}: " if end.code is not None else ""
            self._fail(run, f"{how}{end.line or 'without a word'}")
            return
        try:
            there = status(run.plan)
        except RunError as error:
            self._fail(run, str(error))
            return
        run.state, run.timesteps = there.state, there.timesteps
        if run.state is State.FINISHED:
            count = f"{self.finished}/{len(self._runs)}"
            self._display.note(f"{count} done: {result(run.plan)}")
        else:
            self._fail(run, f"ended without its final evaluation: {end.line}")

    def _fail(self, run: Run, why: str) -> None:
        run.state = State.STUCK
        self.failures.append(f"{run.plan.name}: {why}")
        self._display.note(f"failed: {self.failures[-1]}")

    def _show(self) -> None:
        """Read how far the runs are, and show it if it is time to, or for the last time."""
        now = self._clock()
        for run in self._pool.running:
            run.read(now)
        self._meter.add(now, self._timesteps, {})
        last = self._display.live and not self._pool.busy
        if self._display.due() or last:
            speed = self._meter.speed()
            show(self._display, self._runs, self._pool.running, self._pool.waiting, speed)


def compare(
    plans: Sequence[RunPlan],
    workers: int,
    interrupts: Interrupts,
    command: str,
    module: str | None = None,
    engine: Engine = "local",
) -> str:
    """Train all runs of a grid that are not finished, each in a process of one thread.

    Args:
        plans: The grid.
        workers: Runs at a time.
        interrupts: Entered by the caller.
        command: What the user types to go on after a stop.
        module: Python module that the processes import first.
        engine: Where they run.

    Returns:
        A line that sums the comparison up.

    Raises:
        ConfigError, EnvError, RunError: A run cannot be made, its folder holds another one, or
            another comparison trains it, or the engine is not there; nothing was started or
            written.
        RunsFailed: Some runs failed; the others are finished.
        Stopped: A signal came; no process is left running.
    """
    with launching(engine, plans[0].run_dir, module) as launch:
        statuses = survey(plans)
        left = [each.state in (State.NEW, State.UNFINISHED) for each in statuses]
        with claimed([plan for plan, is_left in zip(plans, left, strict=True) if is_left]):
            for place, plan in enumerate(plans):
                if left[place]:  # another comparison may have trained it since
                    statuses[place] = status(plan)
            return _train(plans, statuses, workers, interrupts, command, launch)


def _train(
    plans: Sequence[RunPlan],
    statuses: Sequence[Status],
    workers: int,
    interrupts: Interrupts,
    command: str,
    launch: Launch,
) -> str:
    """Train what is left, which this process alone does."""
    run_dir = plans[0].run_dir
    counts = Counter(found.state for found in statuses)
    display = Display("acktr compare", LINES)
    with closing(display):
        states = ", ".join(f"{counts[state]} {state.value}" for state in State if counts[state])
        display.note(f"runs: {states}; {workers} at a time")
        for line in unequal_presets(plans):
            display.note(line)
        comparison = Comparison(plans, statuses, workers, launch, display)
        try:
            comparison.run(interrupts)
        except Stopped as stop:
            name = signal.Signals(stop.signum).name
            done = f"{comparison.finished} of {len(plans)} runs finished"
            stop.note = f"stopped by {name}, {done}; continue with: {command}"
            raise
    failures = comparison.failures
    if failures:
        for failure in failures if len(failures) > 1 else ():
            display.note(f"failed: {failure}")
        raise RunsFailed(
            f"{len(failures)} of {len(plans)} runs failed, see {run_dir / 'logs'};"
            f" the last: {failures[-1]}"
        )
    return f"done: {len(plans)} of {len(plans)} runs finished in {run_dir}"


def _how(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
