"""CPU seconds of every optimizer's updates, measured in turn.

A processor that is shared with others is slow for minutes. The optimizers therefore take turns,
update by update, and a run is charged what its updates cost there, not what they took when the run
happened to be made.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from acktr.report.tables import as_csv
from acktr.runs.tables import read_table
from scripts.common import ScriptError, save
from scripts.race.problems import Problem
from scripts.race.racers import GRIDS, build

START = 20
"""First updates, which are charged apart: K-FAC takes more statistics and inverses in them."""
CYCLES = 40
"""Updates after them, a multiple of every period of refreshes here."""
ROUNDS = 3
"""Times that all is measured with new networks; the median counts."""
_COLUMNS = ("start", "each")


@dataclass(frozen=True)
class Pace:
    """What an optimizer's updates cost."""

    start: float
    """CPU seconds of one of the first START updates, on average."""
    each: float
    """CPU seconds of a later one, on average over whole cycles of refreshes."""

    def seconds(self, update: int) -> float:
        """CPU seconds of so many updates."""
        return self.start * min(update, START) + self.each * max(update - START, 0)

    def updates(self, seconds: float) -> int:
        """The whole updates that so many CPU seconds pay for."""
        early = START * self.start
        if seconds <= early:
            return int(seconds / self.start)
        return START + int((seconds - early) / self.each)


def measured(
    problem: Problem, names: Sequence[str], path: Path, note: Callable[[str], None]
) -> Mapping[str, Pace]:
    """The pace of each optimizer, from a file that has them all or measured now and written there.

    Args:
        problem: Network and data.
        names: Optimizers; a setting in the middle of the grid is measured.
        path: The CSV file.
        note: Takes a line before the measurement.

    Raises:
        ScriptError: The file is damaged.
    """
    known = _read(path) if path.exists() else {}
    if known.keys() >= set(names):
        return known
    note(f"measuring what updates cost, {ROUNDS} rounds; nothing else should run")
    paces = _measure(problem, names)
    body = [[name, f"{pace.start:.6g}", f"{pace.each:.6g}"] for name, pace in paces.items()]
    save(path.parent, {path.name: as_csv(("optimizer", *_COLUMNS), body)})
    return paces


def _measure(problem: Problem, names: Sequence[str]) -> dict[str, Pace]:
    updates = START + CYCLES
    spent: dict[str, list[list[float]]] = {name: [[] for _ in range(updates)] for name in names}
    for number in range(ROUNDS):
        stream, steps = problem.stream(number), {}
        for name in names:
            torch.manual_seed(number)
            grid = GRIDS[problem.name][name]
            steps[name] = build(name, problem, problem.network(), grid[len(grid) // 2], number)
        for update in range(updates):
            inputs, targets = next(stream)
            for name, step in steps.items():
                started = time.process_time()
                step(inputs, targets)
                spent[name][update].append(time.process_time() - started)
    costs = {name: [statistics.median(each) for each in lists] for name, lists in spent.items()}
    return {
        name: Pace(statistics.fmean(cost[:START]), statistics.fmean(cost[START:]))
        for name, cost in costs.items()
    }


def _read(path: Path) -> dict[str, Pace]:
    try:
        rows = read_table(path).rows
        paces = {row["optimizer"]: Pace(*(float(row[name]) for name in _COLUMNS)) for row in rows}
        if not all(pace.start > 0 and pace.each > 0 for pace in paces.values()):
            raise ValueError("seconds must be positive")
    except (KeyError, ValueError) as error:
        raise ScriptError(f"{path}: {error}; delete it to measure again") from error
    return paces
