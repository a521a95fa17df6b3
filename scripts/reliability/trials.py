"""Trials that are done once each: a row of a CSV file says how each came out.

Every trial runs in a process forked from this one, so that whatever it does to its process ends
with it, and the process that counts stays as it was. Linux only.
"""

from __future__ import annotations

import csv
import io
import json
import os
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from acktr.files import append_whole, blanked, write_atomic
from acktr.runs.progress import duration
from acktr.runs.tables import read_table
from scripts.reliability.processes import descendants, kill

COLUMNS = ("what", "seed", "cases", "wrong", "seconds", "said")


@dataclass(frozen=True)
class Trial:
    """One thing to try."""

    what: str
    seed: int
    cases: int = 1
    """How many cases it counts for."""

    @property
    def name(self) -> str:
        """Name of a folder."""
        return f"{''.join(c if c.isalnum() else '_' for c in self.what)[:80]}-{self.seed}"


@dataclass(frozen=True)
class Outcome:
    """How a trial came out."""

    said: str
    wrong: int = 0
    """Cases that came out wrong."""


Work = Callable[[Trial, Path], str | Outcome]
"""Tries it in an empty folder; whatever it raises is wrong."""


@dataclass(frozen=True)
class Part:
    """A kind of trials."""

    name: str
    holds: str
    """What must hold, for the table."""
    full: int
    """Cases of the whole campaign."""
    plan: Callable[[int, Path], list[Trial]]
    """Trials of so many cases; the folder is for what all trials need."""
    work: Work
    limit: float = 3600.0
    """Seconds that a trial may take."""


@dataclass(frozen=True)
class Row:
    """A trial that is done."""

    trial: Trial
    outcome: Outcome
    seconds: float


def done(path: Path) -> list[Row]:
    """The trials in a CSV file.

    Raises:
        ValueError: It is not such a file.
    """
    if not path.exists():
        return []
    return [
        Row(
            Trial(row["what"], int(row["seed"]), int(row["cases"])),
            Outcome(row["said"], int(row["wrong"])),
            float(row["seconds"]),
        )
        for row in read_table(path).rows
    ]


def campaign(part: Part, count: int, out: Path, tell: Callable[[str], None]) -> list[Row]:
    """Do the trials of a part that are not done yet; all of those that are planned.

    Folders of trials that came out wrong stay in ``out/scratch/PART``.
    """
    table, scratch = out / f"{part.name}.csv", out / "scratch" / part.name
    scratch.mkdir(parents=True, exist_ok=True)
    trials = part.plan(count, scratch)
    rows = {(row.trial.what, row.trial.seed): row for row in done(table)}
    if not rows:
        write_atomic(table, (",".join(COLUMNS) + "\n").encode())
    open_ones = [trial for trial in trials if (trial.what, trial.seed) not in rows]
    began = time.monotonic()
    for number, trial in enumerate(open_ones, 1):
        row = _tried(part, trial, scratch)
        append_whole(table, _line(row))
        rows[trial.what, trial.seed] = row
        spent = time.monotonic() - began
        left = duration(spent / number * (len(open_ones) - number))
        verdict = f"WRONG: {row.outcome.said}" if row.outcome.wrong else row.outcome.said
        tell(f"{part.name} {number}/{len(open_ones)}, {left} left: {trial.what}: {verdict:.300}")
    return [rows[trial.what, trial.seed] for trial in trials]


def summary(parts: Iterable[tuple[Part, list[Row]]], about: str) -> str:
    """A table in Markdown."""
    lines = [
        "| part | what must hold | trials | cases | wrong | minutes |",
        "|---|---|---|---|---|---|",
    ]
    failures = []
    for part, rows in parts:
        wrong = sum(row.outcome.wrong for row in rows)
        cases = sum(row.trial.cases for row in rows)
        minutes = sum(row.seconds for row in rows) / 60
        lines.append(
            f"| {part.name} | {part.holds} | {len(rows):,} | {cases:,} | {wrong} | {minutes:.1f} |"
        )
        failures += [
            f"- {part.name}, {row.trial.what}, seed {row.trial.seed}: {row.outcome.said:.300}"
            for row in rows
            if row.outcome.wrong
        ]
    head = "## What came out wrong\n\n"
    return (
        f"{about}\n\n"
        + "\n".join(lines)
        + "\n"
        + (f"\n{head}" + "\n".join(failures) + "\n" if failures else "")
    )


def _tried(part: Part, trial: Trial, scratch: Path) -> Row:
    here = scratch / trial.name
    began = time.monotonic()
    remove(here)
    here.mkdir()
    outcome = forked(lambda: part.work(trial, here), here / "log.txt", part.limit)
    if not outcome.wrong:
        remove(here)
    return Row(trial, outcome, time.monotonic() - began)


def forked(work: Callable[[], str | Outcome], log: Path, limit: float) -> Outcome:
    """What the work gives, done in a process of its own.

    It is killed with all that it started if it takes longer.

    Args:
        work: What to do.
        log: File for what is printed, and the traceback of what it raises.
        limit: Seconds.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receiving)
        _work_and_leave(work, log, sending)
    os.close(sending)
    answer, until = b"", time.monotonic() + limit
    try:
        while select.select([receiving], [], [], max(0.0, until - time.monotonic()))[0]:
            if not (part := os.read(receiving, 65_536)):
                break
            answer += part
    finally:
        os.close(receiving)
        family = descendants(pid)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        kill(family)
    if not answer:
        late = time.monotonic() >= until
        said = f"not done in {limit:g} s" if late else f"ended with status {status}"
        return Outcome(said, 1)
    said, wrong = json.loads(answer)
    return Outcome(said, wrong)


def _work_and_leave(work: Callable[[], str | Outcome], log: Path, sending: int) -> NoReturn:
    try:
        redirect(log)
        try:
            found = work()
            outcome = found if isinstance(found, Outcome) else Outcome(found)
        except BaseException as error:
            traceback.print_exc()
            outcome = Outcome(f"{type(error).__name__}: {error}", 1)
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(sending, json.dumps([blanked(outcome.said)[:1000], outcome.wrong]).encode())
    finally:
        os._exit(0)


def redirect(log: Path) -> None:
    """Write what this process prints into a file."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def remove(folder: Path) -> None:
    """Remove a folder and all that is in it."""
    shutil.rmtree(folder, ignore_errors=True)


def _line(row: Row) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    trial, outcome = row.trial, row.outcome
    writer.writerow(
        [trial.what, trial.seed, trial.cases, outcome.wrong, f"{row.seconds:.2f}", outcome.said]
    )
    return text.getvalue().encode()
