"""One run: updates until a budget of CPU seconds is spent."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.contest import Report, Row, Setting, attempt
from scripts.contest import write_rows as write
from scripts.race.problems import Problem, measured
from scripts.race.racers import build

MARKS = (40, 120, 240, 480, 960)
"""Updates after which losses are always measured."""


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
    """CPU seconds of training."""
    every: float
    """CPU seconds between evaluations."""

    @property
    def size(self) -> float:
        """CPU seconds of training."""
        return self.seconds

    def identity(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)


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

    rows, spent, update, due = [evaluated(0, 0.0)], 0.0, 0, spec.every
    stream = problem.stream(spec.seed)
    while spent < spec.seconds and math.isfinite(rows[-1].train_loss):
        inputs, targets = next(stream)
        started = time.process_time()
        healthy = attempt(step, inputs, targets)
        spent += time.process_time() - started
        update += 1
        if not healthy:
            rows.append(Row(update, spent, math.inf, math.inf))
        elif spent >= due or update in MARKS:
            rows.append(evaluated(update, spent))
            due = spec.every * (spent // spec.every + 1)
        else:
            continue
        report(rows[-1], spent)
    return rows


def write_rows(path: Path, spec: RunSpec, rows: Sequence[Row]) -> None:
    """Write the CSV file of a finished run."""
    write(path, spec, rows, lambda row: {"update": row.update})
