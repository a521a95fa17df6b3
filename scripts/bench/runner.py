"""Measures cases in turn, each measurement in a process of its own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from acktr.compare.pool import ChildProcess
from acktr.files import read_object
from acktr.interrupts import Interrupts
from acktr.runs.progress import duration
from scripts.bench.cases import Case, Suite, Timing
from scripts.bench.measure import OUTPUT, RESULT, write_task
from scripts.common import TimeLeft

_POLL = 0.1
_INTERVAL = 30.0
"""Seconds between lines that say how far it is."""
_START = 6.0
"""Seconds of a case outside of warm-up and windows, until a first one has shown it."""
_CONTESTANTS = 4
"""Windows' worth of blocks that K-FAC beside SGD takes: SGD, twice K-FAC, a first look."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One measurement of a case."""

    case: Case
    """What is measured."""
    timing: Timing
    """For how long."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    found: dict[str, Any] | None
    """The measurement; None if it failed."""
    failure: str = ""
    """The last line that a failed process has said."""


def turns(
    cases: Sequence[Case], timing: Timing, rounds: int, skipped: Collection[str]
) -> list[Turn]:
    """The cases in the order in which they are measured, without the keys that are skipped.

    Comparisons of optimizers alternate between them by themselves: one turn has the windows of
    all rounds.
    """
    once = replace(timing, windows=rounds * timing.windows)
    return [
        Turn(case=case, timing=once if case.kind == "kfac" else timing)
        for number in range(rounds)
        for case in cases
        if case.key not in skipped and (number == 0 or case.kind != "kfac")
    ]


def together(first: Outcome, second: Outcome) -> Outcome:
    """Two measurements of a case as one; a failure of either is one of both."""
    if first.found is None or second.found is None:
        return first if first.found is None else second
    both = (first.found, second.found)
    peaks = [each["peak_mib"] for each in both if each["peak_mib"] is not None]
    seconds = sum(each["seconds"] for each in both)
    joined: dict[str, Any] = {
        "rates": [rate for each in both for rate in each["rates"]],
        "updates": sum(each["updates"] for each in both),
        "seconds": seconds,
        "peak_mib": max(peaks, default=None),
    }
    if "shares" in first.found:
        joined["shares"] = {
            part: sum(each["seconds"] * each["shares"].get(part, 0.0) for each in both) / seconds
            for part in {**first.found["shares"], **second.found["shares"]}
        }
    return Outcome(joined)


class Runner:
    """Measures the cases of suites.

    Args:
        planned: All measurements there will be, by suite.
        say: Takes lines for the user; a panel would take time from what is measured.
        interrupts: Who handles SIGINT and SIGTERM.
    """

    def __init__(
        self,
        planned: Mapping[str, Sequence[Turn]],
        say: Callable[[str], None],
        interrupts: Interrupts,
    ) -> None:
        expected = sum(_expected(turn) for each in planned.values() for turn in each)
        self._planned = planned
        self._total = sum(map(len, planned.values()))
        self._number = 0
        self._left = TimeLeft({"": expected}, guess=1.0)
        self._say = say
        self._interrupts = interrupts

    def run(self, suite: Suite) -> dict[str, Outcome]:
        """What became of the cases of a suite, by key; one that fails stops nothing."""
        outcomes: dict[str, Outcome] = {}
        for turn in self._planned[suite.name]:
            key, outcome = turn.case.key, self.measure(turn)
            outcomes[key] = together(outcomes[key], outcome) if key in outcomes else outcome
        return outcomes

    def measure(self, turn: Turn) -> Outcome:
        """Measure one case once."""
        self._number += 1
        name = " ".join(part for part in (turn.case.what, turn.case.env) if part)
        self._say(f"[{self._number}/{self._total}] {name}, ETA {self._left}")
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            outcome = self._measure(turn, Path(folder), started)
        self._left.add("", _expected(turn), time.monotonic() - started)
        if outcome.found is None:
            self._say(f"  failed: {outcome.failure}")
        return outcome

    def _measure(self, turn: Turn, folder: Path, started: float) -> Outcome:
        write_task(folder, turn.case, turn.timing)
        with self._interrupts.deferred():  # a stop while the process starts would lose sight of it
            child = ChildProcess(
                [str(folder)],
                folder / OUTPUT,
                module="scripts.bench.measure",
                threads=turn.timing.threads,
            )
            try:
                with self._interrupts.at_once():
                    code = self._wait(child, started)
            finally:
                child.kill()
        self._interrupts.check()  # a stop that came meanwhile
        if code != 0:
            return Outcome(None, child.last_line() or f"code {code}")
        return Outcome(read_object(folder / RESULT))

    def _wait(self, child: ChildProcess, started: float) -> int:
        shown = 0.0
        while (code := child.poll()) is None:
            time.sleep(_POLL)
            elapsed = time.monotonic() - started
            if elapsed - shown >= _INTERVAL:
                shown = elapsed
                left = max(0.0, (self._left.seconds() or 0.0) - elapsed)
                self._say(f"  measuring for {duration(elapsed)}, ETA {duration(left)}")
        return code


def _expected(turn: Turn) -> float:
    """Seconds that a measurement takes, at a guess."""
    measured = turn.timing.warm_up + turn.timing.windows * turn.timing.seconds
    return _START + measured * (_CONTESTANTS if turn.case.kind == "kfac" else 1)
