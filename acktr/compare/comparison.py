"""Training the runs of a grid, several at a time, from wherever each of them is."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from acktr.compare.grid import RunPlan, State, Status, status, survey, train_args
from acktr.compare.pool import Child, ChildProcess, Ended, Pool
from acktr.compare.progress import HOUR, CompareProgress, Row, RunView, Tally, result
from acktr.files import reason
from acktr.interrupts import Interrupts, Stopped, hangup_terminates
from acktr.runs.folder import RunError
from acktr.runs.progress import Meter

POLL = 0.25
"""Seconds between two looks at the processes."""

_STOPPED = {75, 130, -signal.SIGTERM}


class RunsFailed(RuntimeError):  # noqa: N818 - as TrainingFault
    """Some runs of a comparison failed; the message is one line."""


class Comparison:
    """Trains what is left of a grid and keeps account of it.

    Args:
        plans: The grid.
        statuses: How far each run is.
        workers: Runs at a time.
        launch: Starts the process of a run; True is for a run that has a checkpoint.
        progress: What the user sees; entered by the caller.
        clock: Seconds.
        sleep: Waits so many seconds.
    """

    def __init__(
        self,
        plans: Sequence[RunPlan],
        statuses: Sequence[Status],
        workers: int,
        launch: Callable[[RunPlan, bool], Child],
        progress: CompareProgress,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._launch = launch
        self._progress = progress
        self._clock, self._sleep = clock, sleep
        self._status = dict(zip((plan.path for plan in plans), statuses, strict=True))
        self._plans = list(plans)
        self._views: dict[Path, RunView] = {}
        self._stopping = False
        self._trained: dict[Path, int] = {}
        self._meter = Meter(clock(), 0, HOUR)
        self.failures: list[str] = []
        left = [plan for plan in plans if self._is(plan, State.NEW, State.UNFINISHED)]
        self._pool = Pool(left, workers, self._start)
        for plan in plans:
            if self._is(plan, State.STUCK):
                self._fail(plan, self._status[plan.path].reason)

    @property
    def finished(self) -> int:
        """Finished runs."""
        return sum(self._is(plan, State.FINISHED) for plan in self._plans)

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
                    self._stop()
                for end in pool.step():
                    self._account(end)
                rows = self._rows()
                self._progress.update(rows, self._tally(rows), last=not pool.busy)
                if pool.busy:
                    self._sleep(POLL)
            interrupts.check()

    def _is(self, plan: RunPlan, *states: State) -> bool:
        return self._status[plan.path].state in states

    def _start(self, plan: RunPlan) -> Child:
        found = self._status[plan.path]
        child = self._launch(plan, found.state is State.UNFINISHED)
        self._views[plan.path] = RunView(plan, found.timesteps, self._clock())
        return child

    def _stop(self) -> None:
        self._stopping = True
        count = len(self._pool.running)
        self._progress.note(f"stopping what runs ({count}); a second signal kills it")
        self._pool.stop()

    def _account(self, end: Ended[RunPlan]) -> None:
        """Take note of how a run ended."""
        plan = end.job
        self._views.pop(plan.path, None)
        if self._stopping and end.code in _STOPPED:
            steps = self._status[plan.path].timesteps + self._trained.get(plan.path, 0)
            self._status[plan.path] = Status(State.UNFINISHED, steps)
            return
        if end.code != 0:
            how = f"{_how(end.code)}: " if end.code is not None else ""
            self._fail(plan, f"{how}{end.line or 'without a word'}")
            return
        try:
            found = status(plan)
        except RunError as error:
            self._fail(plan, str(error))
            return
        self._status[plan.path] = found
        if found.state is State.FINISHED:
            self._progress.note(f"{self.finished}/{len(self._plans)} done: {result(plan)}")
        else:
            self._fail(plan, f"ended without its final evaluation: {end.line}")

    def _fail(self, plan: RunPlan, why: str) -> None:
        self._status[plan.path] = Status(State.STUCK, reason=why)
        self.failures.append(f"{plan.name}: {why}")
        self._progress.note(f"failed: {self.failures[-1]}")

    def _rows(self) -> list[Row]:
        now = self._clock()
        rows = [self._views[plan.path].read(now) for plan in self._pool.running]
        for row in rows:
            path = row.plan.path
            self._trained[path] = row.timesteps - self._status[path].timesteps
        self._meter.add(now, sum(self._trained.values()), {})
        return rows

    def _tally(self, rows: Sequence[Row]) -> Tally:
        running = {row.plan.path: row.timesteps for row in rows}
        done = total = 0
        for plan in self._plans:
            if not self._is(plan, State.STUCK):
                size = plan.config.total_timesteps
                total += size
                done += min(running.get(plan.path, self._status[plan.path].timesteps), size)
        counts = (self.finished, len(self.failures), self._pool.waiting, len(self._plans))
        return Tally(*counts, done, total, self._meter.rates().steps_per_second)


def compare(
    plans: Sequence[RunPlan],
    workers: int,
    interrupts: Interrupts,
    command: str,
    module: str | None = None,
) -> str:
    """Train all runs of a grid that are not finished, each in a process of one thread.

    Args:
        plans: The grid.
        workers: Runs at a time.
        interrupts: Entered by the caller.
        command: What the user types to go on after a stop.
        module: Python module that the processes import first.

    Returns:
        A line that sums the comparison up.

    Raises:
        ConfigError, EnvError, RunError: A run cannot be made or its folder holds another one;
            nothing was started or written.
        RunsFailed: Some runs failed; the others are finished.
        Stopped: A signal came; no process is left running.
    """
    statuses = survey(plans)
    if any(found.state in (State.NEW, State.UNFINISHED) for found in statuses):
        _make(plans[0].run_dir)

    def launch(plan: RunPlan, resume: bool) -> Child:
        return ChildProcess(train_args(plan, resume, module), plan.log)

    with CompareProgress() as progress, hangup_terminates():
        progress.note(_summary(statuses, workers))
        comparison = Comparison(plans, statuses, workers, launch, progress)
        try:
            comparison.run(interrupts)
        except Stopped as stop:
            name = signal.Signals(stop.signum).name
            done = f"{comparison.finished} of {len(plans)} runs finished"
            stop.note = f"stopped by {name}, {done}; continue with: {command}"
            raise
    run_dir = plans[0].run_dir
    failures = comparison.failures
    if failures:
        for failure in failures if len(failures) > 1 else ():
            progress.note(f"failed: {failure}")
        raise RunsFailed(
            f"{len(failures)} of {len(plans)} runs failed, see {run_dir / 'logs'};"
            f" the last: {failures[-1]}"
        )
    return f"done: {len(plans)} of {len(plans)} runs finished in {run_dir}"


def _make(run_dir: Path) -> None:
    """Make the folder of logs, which also shows whether the runs can be written."""
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{run_dir}: cannot create the folder: {reason(error)}") from error


def _summary(statuses: Sequence[Status], workers: int) -> str:
    counts = Counter(found.state for found in statuses)
    states = ", ".join(f"{counts[state]} {state.value}" for state in State if counts[state])
    return f"runs: {states}; {workers} at a time"


def _how(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
