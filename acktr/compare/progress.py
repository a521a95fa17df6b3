"""Progress of a comparison: a table on a terminal, one plain line per interval elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.table import Table
from rich.text import Text

from acktr.compare.grid import RunPlan
from acktr.runs.folder import RunFolder
from acktr.runs.progress import Display, Meter, pace, printable, share
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
        self._display = Display("acktr compare", interval, stream, clock)
        self._display.due()  # nothing is shown before the first interval is over

    def note(self, text: str) -> None:
        """Write a line (above the table)."""
        self._display.note(text)

    def update(self, rows: Sequence[Row], tally: Tally, last: bool = False) -> None:
        """Show this when it is time to, or because it is the last."""
        if self._display.due() or (last and self._display.live):
            body = [table(rows)] if rows else []
            footer = Text("  ".join(_footer(tally)))
            done, total = tally.timesteps, tally.total_timesteps
            self._display.show(plain(rows, tally), done, total, *body, footer)

    def __enter__(self) -> CompareProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._display.close()


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


def table(rows: Sequence[Row]) -> Table:
    """A table with a row per run in training."""
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in _COLUMNS:
        grid.add_column(name, justify="left" if name in ("env", "label") else "right")
    for row in rows:
        config = row.plan.config
        total = config.total_timesteps
        cells = [config.env, row.plan.label, str(config.seed), share(row.timesteps, total)]
        cells += [_decimal(row.mean_return), *pace(row.timesteps, total, row.speed)]
        grid.add_row(*(Text(printable(cell)) for cell in cells))
    return grid


def _footer(tally: Tally) -> list[str]:
    speed, eta = pace(tally.timesteps, tally.total_timesteps, tally.speed)
    failed = [f"failed {tally.failed}"] if tally.failed else []
    return [
        f"runs {tally.finished}/{tally.total} done",
        f"waiting {tally.waiting}",
        *failed,
        f"steps {share(tally.timesteps, tally.total_timesteps)}",
        f"steps/s {speed}",
        f"ETA {eta}",
    ]


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _number(text: str | None) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
