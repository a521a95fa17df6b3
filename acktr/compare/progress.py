"""What a comparison shows: a table of the runs in training, a line for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from acktr.compare.grid import RunPlan
from acktr.compare.status import State
from acktr.runs.folder import RunFolder
from acktr.runs.progress import Display, Meter, pace, printable, score, share
from acktr.runs.tables import last_row

_COLUMNS = ("env", "label", "seed", "steps", "return", "steps/s", "ETA")


@dataclass
class Run:
    """A run of the grid, and how far it is."""

    plan: RunPlan
    state: State
    timesteps: int = 0
    """Environment steps done."""
    mean_return: float | None = None
    """Return of the last 100 training episodes."""
    meter: Meter | None = None
    """Speed of its process; None before that was started."""

    @property
    def total(self) -> int:
        """Environment steps that it is to make."""
        return self.plan.goal

    @property
    def pace(self) -> tuple[str, str]:
        """Speed and time to the end."""
        speed = math.nan if self.meter is None else self.meter.speed()
        return pace(self.timesteps, self.total, speed)

    def read(self, now: float) -> None:
        """Follow its process by the end of progress.csv; what cannot be read stays as it was."""
        row = last_row(RunFolder(self.plan.path).progress) or {}
        steps = _number(row.get("timesteps"))
        if steps is not None and steps >= 0:
            self.timesteps = min(int(steps), self.total)
            self.mean_return = _number(row.get("rollout/ep_rew_mean"))
        if self.meter is not None:
            self.meter.add(now, self.timesteps, {})


def result(plan: RunPlan) -> str:
    """A finished run in a line."""
    folder = RunFolder(plan.path)
    training = _number((last_row(folder.progress) or {}).get("rollout/ep_rew_mean"))
    evaluation = _number((last_row(folder.evaluations) or {}).get("mean_reward"))
    return f"{plan.name}, return {score(training)}, evaluation {score(evaluation)}"


def show(
    display: Display, runs: Sequence[Run], training: Sequence[Run], waiting: int, speed: float
) -> None:
    """Show all runs and, apart, those in training; so many wait, and stuck ones count as failed.

    ``speed`` is in environment steps per second of all processes; NaN while unknown.
    """
    finished = sum(run.state is State.FINISHED for run in runs)
    failed = sum(run.state is State.STUCK for run in runs)
    able = [run for run in runs if run.state is not State.STUCK]
    done, total = sum(min(run.timesteps, run.total) for run in able), sum(run.total for run in able)
    steps_per_second, eta = pace(done, total, speed)
    counts = [f"runs {finished}/{len(runs)} done", f"waiting {waiting}"]
    counts += [f"failed {failed}"] if failed else []
    parts = [f"steps {share(done, total)}", f"steps/s {steps_per_second}", f"ETA {eta}"]
    footer = ["  ".join(counts), "  ".join(parts)]
    each = (
        f"{run.plan.name} {run.timesteps / run.total:.0%} return {score(run.mean_return)}"
        for run in training
    )
    line = f"{'  '.join(footer)}  running {', '.join(each) or '-'}"
    display.show(line, done, total, *([table(training)] if training else []), *map(Text, footer))


def table(training: Sequence[Run]) -> Table:
    """A table with a row per run in training, narrow enough for a terminal of 80 columns."""
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in _COLUMNS:
        grid.add_column(name, justify="left" if name in ("env", "label") else "right")
    for run in training:
        config = run.plan.config
        steps = f"{run.timesteps:,} {run.timesteps / run.total:.0%}"
        cells = [config.env, run.plan.label, str(config.seed), steps]
        cells += [score(run.mean_return), *run.pace]
        grid.add_row(*(Text(printable(cell)) for cell in cells))
    return grid


def _number(text: str | None) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
