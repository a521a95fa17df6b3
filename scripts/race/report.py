"""The tables of a race: what was tuned, and losses by updates and by CPU seconds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from acktr.report.tables import markdown as table
from scripts.common import described_machine
from scripts.contest import Outcome, Row, describe
from scripts.race.pace import Pace
from scripts.race.problems import Problem
from scripts.race.running import MARKS

Runs = Mapping[tuple[str, int], Sequence[Row]]
"""Evaluations by optimizer and seed."""


def at_seconds(rows: Sequence[Row], mark: float) -> float:
    """The training loss of the last evaluation within so many CPU seconds; infinite if diverged."""
    if not math.isfinite(rows[-1].train_loss):
        return math.inf
    return [row for row in rows if row.seconds <= mark][-1].train_loss


def at_update(rows: Sequence[Row], mark: int) -> float | None:
    """The training loss after so many updates; None if the run made fewer."""
    if not math.isfinite(rows[-1].train_loss):
        return math.inf
    return next((row.train_loss for row in rows if row.update == mark), None)


def markdown(
    problem: Problem,
    outcome: Outcome,
    *,
    paces: Mapping[str, Pace],
    seconds: Sequence[float],
    tune_seconds: float,
    left_out: Mapping[str, str],
    command: str,
) -> str:
    """The report of one problem."""
    names, runs = list(outcome.settings), outcome.runs
    parts = [
        f"# {problem.name} on {problem.source}, batch {problem.batch}\n",
        f"Command: `{command}`\n",
        "Training loss on fixed samples, mean over the seeds and their range. CPU seconds of"
        " training alone on one thread, as the optimizers' updates cost when they take turns.\n",
        *(
            f"Left out: {name} ({package} is not installed).\n"
            for name, package in left_out.items()
        ),
        _by_seconds(names, runs, paces, seconds),
        _by_updates(names, runs),
        f"Tuned for {tune_seconds:g} CPU seconds each; chosen by the training loss at their end."
        f" {outcome.edges()}".rstrip()
        + "\n",
        _tuning(outcome),
        f"Data: SHA-256 {problem.data}.\n",
        described_machine(),
    ]
    return "\n".join(parts)


def _by_seconds(
    names: Sequence[str], runs: Runs, paces: Mapping[str, Pace], marks: Sequence[float]
) -> str:
    body = []
    for name in names:
        mine = [rows for (of, _), rows in runs.items() if of == name]
        cells = [_cell([at_seconds(rows, mark) for rows in mine]) for mark in marks]
        test = _cell([rows[-1].test_loss for rows in mine])
        body.append([name, f"{1000 * paces[name].each:.1f}", *cells, test])
    head = [
        "optimizer",
        "ms per update",
        *(f"{mark:g} s" for mark in marks),
        "test loss at the end",
    ]
    return table(head, body)


def _by_updates(names: Sequence[str], runs: Runs) -> str:
    body = []
    for name in names:
        mine = [rows for (of, _), rows in runs.items() if of == name]
        losses = [[at_update(rows, mark) for rows in mine] for mark in MARKS]
        known = [[loss for loss in each if loss is not None] for each in losses]
        body.append([name, *(_cell(k) if len(k) == len(mine) else "" for k in known)])
    return table(["optimizer", *(f"{mark} updates" for mark in MARKS)], body)


def _tuning(outcome: Outcome) -> str:
    body = [
        [
            *(name, describe(setting), str(row.update), _number(row.train_loss)),
            "yes" if setting == outcome.settings[name] else "",
        ]
        for name, tried in outcome.tuning.items()
        for setting, row in tried
    ]
    return table(["optimizer", "setting", "updates", "training loss", "chosen"], body, left=2)


def _cell(losses: Sequence[float]) -> str:
    if not all(map(math.isfinite, losses)):
        return "diverged"
    mean = _number(statistics.fmean(losses))
    if len(losses) == 1:
        return mean
    return f"{mean} ({_number(min(losses))} to {_number(max(losses))})"


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "diverged"
