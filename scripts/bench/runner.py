"""Measures cases in turn, each measurement in a process of its own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from acktr.compare.pool import ChildProcess
from acktr.files import read_object
from acktr.interrupts import Interrupts
from scripts.bench.cases import Case, Timing
from scripts.bench.measure import OUTPUT, RESULT, write_task

_POLL = 0.1

Outcome = dict[str, Any]
"""A measurement, or its ``failure``: the last line that the process has said."""


def turns(cases: Iterable[Case], timing: Timing, rounds: int) -> list[tuple[Case, Timing]]:
    """The cases in the order in which they are measured.

    Comparisons of optimizers alternate between them by themselves: one turn has the windows of
    all rounds.
    """
    once = replace(timing, windows=rounds * timing.windows)
    return [
        (case, once if case.kind == "kfac" else timing)
        for number in range(rounds)
        for case in cases
        if number == 0 or case.kind != "kfac"
    ]


def together(first: Outcome, second: Outcome) -> Outcome:
    """Two measurements of a case as one; a failure of either is one of both."""
    for each in (first, second):
        if "failure" in each:
            return each
    both, seconds = (first, second), first["seconds"] + second["seconds"]
    joined: Outcome = {
        "rates": [*first["rates"], *second["rates"]],
        "updates": first["updates"] + second["updates"],
        "seconds": seconds,
        "steps": first["steps"] + second["steps"],
        "processor": None,
        "peak_mib": max((e["peak_mib"] for e in both if e["peak_mib"] is not None), default=None),
    }
    if None not in (first["processor"], second["processor"]):
        joined["processor"] = first["processor"] + second["processor"]
    if "shares" in first:
        joined["shares"] = {
            part: sum(each["seconds"] * each["shares"].get(part, 0.0) for each in both) / seconds
            for part in first["shares"] | second["shares"]
        }
    if "messages" in first:
        joined["messages"] = {
            what: sum(e["updates"] * e["messages"][what] for e in both) / joined["updates"]
            for what in first["messages"]
        }
    return joined


def measure(case: Case, timing: Timing, interrupts: Interrupts) -> Outcome:
    """Measure a case once; a signal ends the process and everything that it has started."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        write_task(folder, case, timing)
        with interrupts.deferred():  # a stop while the process starts would lose sight of it
            child = ChildProcess(
                [name], folder / OUTPUT, module="scripts.bench.measure", threads=timing.threads
            )
            try:
                with interrupts.at_once():
                    while (code := child.poll()) is None:
                        time.sleep(_POLL)
            finally:
                child.kill()
        interrupts.check()  # a stop that came meanwhile
        if code != 0:
            return {"failure": child.last_line() or f"code {code}"}
        return read_object(folder / RESULT)
