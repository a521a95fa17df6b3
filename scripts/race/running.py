"""One run: updates until a budget of CPU seconds is spent, and the CSV file of its evaluations."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from acktr.kfac import FactorError
from scripts.common import save
from scripts.race.problems import Problem, measured
from scripts.race.racers import Setting, Step, build
from scripts.supervised.training import Row

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

    def identity(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)


_COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def describe(setting: Setting) -> str:
    """For example kl_clip=10,damping=0.1."""
    return ",".join(f"{name}={value:g}" for name, value in setting.items()) or "as it comes"


def run(spec: RunSpec, problem: Problem, report: Callable[[Row], None]) -> list[Row]:
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
        losses = [measured(problem, network, pair) for pair in (problem.train, problem.test)]
        return Row(update, seconds, *(loss if math.isfinite(loss) else math.inf for loss in losses))

    rows, spent, update, due = [evaluated(0, 0.0)], 0.0, 0, spec.every
    stream = problem.stream(spec.seed)
    while spent < spec.seconds and math.isfinite(rows[-1].train_loss):
        inputs, targets = next(stream)
        started = time.process_time()
        healthy = _attempt(step, inputs, targets)
        spent += time.process_time() - started
        update += 1
        if not healthy:
            rows.append(Row(update, spent, math.inf, math.inf))
        elif spent >= due or update in MARKS:
            rows.append(evaluated(update, spent))
            due = spec.every * (spent // spec.every + 1)
        else:
            continue
        report(rows[-1])
    return rows


def _attempt(step: Step, *batch: torch.Tensor) -> bool:
    """Make an update; False if it breaks down."""
    try:
        return math.isfinite(float(step(*batch)))
    except FactorError:
        return False


def write_rows(path: Path, spec: RunSpec, rows: Sequence[Row]) -> None:
    """Write the CSV file of a finished run; its first line is the run's identity."""
    text = io.StringIO()
    text.write(f"#{spec.identity()}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        numbers = (row.seconds, row.train_loss, row.test_loss)
        writer.writerow([row.update, *(f"{number:.9g}" for number in numbers)])
    save(path.parent, {path.name: text.getvalue().encode()})
