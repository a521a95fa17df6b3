"""Progress of a comparison: a table on a terminal, one plain line per interval elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO

from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from acktr.compare.grid import RunPlan
from acktr.runs.folder import RunFolder
from acktr.runs.progress import BAR_WIDTH, PANEL_INTERVAL, Meter, Screen, duration, printable
from acktr.runs.tables import last_row

HOUR = 3600.0
"""Seconds over which the speed of the whole comparison is taken."""

_COLUMNS = ("env", "label", "seed", "steps", "return", "steps/s", "ETA")


@dataclass(frozen=True)
class Row:
    """A run in training."""

    plan: RunPlan
    timesteps: int
    """Environment steps done."""
    mean_return: float | None
    """Of the last 100 training episodes."""
    speed: float
    """Environment steps per second; NaN while unknown."""


@dataclass(frozen=True)
class Tally:
    """All runs together."""

    finished: int
    failed: int
    waiting: int
    """Runs that have not been started."""
    total: int
    timesteps: int
    """Environment steps done, of finished, running and waiting runs."""
    total_timesteps: int
    """Environment steps when all of them are finished."""
    speed: float
    """Environment steps per second of all processes; NaN while unknown."""


class RunView:
    """Follows a run in training by the end of its progress.csv.

    Args:
        plan: The run.
        timesteps: Steps that were done when its process started.
        now: Seconds.
    """

    def __init__(self, plan: RunPlan, timesteps: int, now: float) -> None:
        self._plan = plan
        self._timesteps = timesteps
        self._return: float | None = None
        self._meter = Meter(now, timesteps)

    def read(self, now: float) -> Row:
        """How far it is; what cannot be read is as it was."""
        row = last_row(RunFolder(self._plan.path).progress) or {}
        steps = _number(row.get("timesteps"))
        if steps is not None and steps >= 0:
            self._timesteps = min(int(steps), self._plan.config.total_timesteps)
            self._return = _number(row.get("rollout/ep_rew_mean"))
        self._meter.add(now, self._timesteps, {})
        speed = self._meter.rates().steps_per_second
        return Row(self._plan, self._timesteps, self._return, speed)


class CompareProgress:
    """Shows how a comparison goes on a text stream; a stream that fails is given up silently.

    Args:
        interval: Seconds between plain lines.
        stream: Where to write; standard error if None.
        clock: Seconds.
    """

    def __init__(
        self,
        *,
        interval: float = 60.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._screen = Screen(stream)
        self._interval = PANEL_INTERVAL if self._screen.live else interval
        self._clock = clock
        self._next = clock() + self._interval

    def note(self, text: str) -> None:
        """Write a line (above the table)."""
        self._screen.note(text)

    def update(self, rows: Sequence[Row], tally: Tally, last: bool = False) -> None:
        """Show this when it is time to, or because it is the last."""
        now = self._clock()
        if now < self._next and not (last and self._screen.live):
            return
        self._next = now + self._interval
        if self._screen.live:
            self._screen.show(panel(rows, tally))
        else:
            self._screen.note(plain(rows, tally))

    def __enter__(self) -> CompareProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._screen.close()


def result(plan: RunPlan) -> str:
    """A finished run in a line."""
    folder = RunFolder(plan.path)
    training = _number((last_row(folder.progress) or {}).get("rollout/ep_rew_mean"))
    evaluation = _number((last_row(folder.evaluations) or {}).get("mean_reward"))
    return f"{plan.name}, return {_decimal(training)}, evaluation {_decimal(evaluation)}"


def plain(rows: Sequence[Row], tally: Tally) -> str:
    """Everything in one line."""
    running = [
        f"{row.plan.name} {row.timesteps / row.plan.config.total_timesteps:.0%}"
        f" return {_decimal(row.mean_return)}"
        for row in rows
    ]
    return "  ".join([*_footer(tally), f"running {', '.join(running) or '-'}"])


def panel(rows: Sequence[Row], tally: Tally) -> Panel:
    """A bar, a table with a row per run in training, and a line for all runs."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in ("env", "label") else "right")
    for row in rows:
        config = row.plan.config
        cells = [config.env, row.plan.label, str(config.seed)]
        cells.append(_steps(row.timesteps, config.total_timesteps))
        cells += [
            _decimal(row.mean_return),
            *_pace(row.timesteps, config.total_timesteps, row.speed),
        ]
        table.add_row(*(Text(printable(cell)) for cell in cells))
    bar = ProgressBar(max(tally.total_timesteps, 1), tally.timesteps, width=BAR_WIDTH)
    grid = Table.grid()
    grid.add_row(bar)
    if rows:
        grid.add_row(table)
    grid.add_row(Text("  ".join(_footer(tally))))
    return Panel(grid, title="acktr compare", title_align="left", expand=False)


def _footer(tally: Tally) -> list[str]:
    speed, eta = _pace(tally.timesteps, tally.total_timesteps, tally.speed)
    failed = [f"failed {tally.failed}"] if tally.failed else []
    return [
        f"runs {tally.finished}/{tally.total} done",
        f"waiting {tally.waiting}",
        *failed,
        f"steps {_steps(tally.timesteps, tally.total_timesteps)}",
        f"steps/s {speed}",
        f"ETA {eta}",
    ]


def _steps(done: int, total: int) -> str:
    return f"{done:,}/{total:,} ({done / max(total, 1):.1%})"


def _pace(done: int, total: int, speed: float) -> tuple[str, str]:
    """Speed and time to the end; a dash while unknown."""
    if not speed > 0:
        return "-", "-"
    return f"{speed:,.0f}", duration(max(total - done, 0) / speed)


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _number(text: str | None) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
