"""One run: the updates that a budget of CPU seconds pays for, and somewhat more."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from scripts.contest import Report, Row, Setting, attempt
from scripts.contest import write_rows as write
from scripts.race.pace import Pace
from scripts.race.problems import Problem, measured
from scripts.race.racers import build

MARKS = (40, 120, 240, 480, 960)
"""Updates whose losses are reported."""
EVERY = 10
"""Updates between evaluations; the marks are multiples."""
_MARGIN = 1.1
"""Part of a run's updates that is made, so that a pace measured again needs no new runs."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """All that decides the outcome of a run, apart from the machine."""

    problem: str
    data: str
    optimizer: str
    setting: Setting
    constants: dict[str, Any]
    seed: int
    batch: int
    seconds: float
    """CPU seconds that are charged."""
    pace: Pace
    """What an update is charged with."""

    @property
    def size(self) -> float:
        """Updates to make."""
        return math.ceil(_MARGIN * self.pace.updates(self.seconds) / EVERY) * EVERY

    def identity(self) -> str:
        """One line of JSON; seconds and pace decide only how much of a run counts."""
        values = asdict(self)
        del values["seconds"], values["pace"]
        return json.dumps(values, sort_keys=True)

    def counted(self, rows: Sequence[Row]) -> list[Row] | None:
        """The evaluations that the seconds pay for, by the pace; None if the run is too short."""
        last = self.pace.updates(self.seconds)
        if rows[-1].update < last and math.isfinite(rows[-1].train_loss):
            return None
        return [
            replace(row, seconds=self.pace.seconds(row.update))
            for row in rows
            if row.update <= last
        ]


def run(spec: RunSpec, problem: Problem, report: Report) -> list[Row]:
    """Train and evaluate; a run that diverges ends at once with an infinite loss.

    Args:
        spec: The run.
        problem: Network and data.
        report: Called with every evaluation.
    """
    torch.manual_seed(spec.seed)
    network = problem.network()
    step = build(spec.optimizer, problem, network, spec.setting, spec.seed)

    def evaluated(update: int, seconds: float) -> Row:
        splits = (problem.train, problem.test)
        return Row.of(update, seconds, [measured(problem, network, pair) for pair in splits])

    rows, spent, update = [evaluated(0, 0.0)], 0.0, 0
    stream = problem.stream(spec.seed)
    while update < spec.size and math.isfinite(rows[-1].train_loss):
        inputs, targets = next(stream)
        started = time.process_time()
        healthy = attempt(step, inputs, targets)
        spent += time.process_time() - started
        update += 1
        if not healthy:
            rows.append(Row(update, spent, math.inf, math.inf))
        elif update % EVERY == 0:
            rows.append(evaluated(update, spent))
        else:
            continue
        report(rows[-1], update)
    return rows


def write_rows(path: Path, spec: RunSpec, rows: Sequence[Row]) -> None:
    """Write the CSV file of a finished run."""
    write(path, spec, rows, lambda row: {"update": row.update})
