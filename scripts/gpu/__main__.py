"""Check in minutes that a GPU computes what the CPU does, and measure how fast it trains.

Stages run one after another, each in a process of its own and for a limited time; a stage that
hangs is stopped, and the others run all the same. One table is printed, and written to OUT as
gpu_check.md and gpu_check.json after every stage.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from acktr.compare.pool import ChildProcess
from acktr.interrupts import Interrupts
from scripts.common import (
    FAILED,
    ScriptError,
    check_folder,
    command_line,
    complain,
    cores,
    machine,
    parsed,
    positive,
    run,
    save,
)
from scripts.gpu import report
from scripts.gpu.report import Outcome
from scripts.gpu.stages import STAGES, TOTAL
from scripts.gpu.work import OUTPUT, ROWS, Task

_POLL = 0.1
_LEAST = 5.0
"""Seconds below which a stage is not begun."""
_TESTS = Path("tests")
_PATIENCE = 5.0
"""How many times as long a dry run may take, since a CPU may have other work."""
_MANY = 8
"""Processors from which tests run in several processes."""


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code.

    0 nothing wrong; 1 a wrong result, or a stage that failed or took too long; 2 bad input, and no
    GPU; 130 Ctrl-C, 75 SIGTERM. A stage that was left out is told and changes no code.
    """
    note = "the tables of finished stages are kept"
    return run("gpu", lambda interrupts: _check(argv, interrupts), note)


def _check(argv: Sequence[str], interrupts: Interrupts) -> int:
    asked = _options(argv)
    if not asked.dry_run and not torch.cuda.is_available():
        raise ScriptError("torch finds no CUDA device here; --dry-run tries this on the CPU")
    device = "cpu" if asked.dry_run else "cuda"
    name = "the CPU" if asked.dry_run else torch.cuda.get_device_name()
    about = {
        "command": command_line("gpu", argv),
        "device": name,
        "dry": asked.dry_run,
        "fault": asked.fault,
        "machine": machine(),
    }
    outcomes = [Outcome(stage, why="not reached") for stage in STAGES]
    deadline = time.monotonic() + asked.seconds * (_PATIENCE if asked.dry_run else 1)
    for number, stage in enumerate(STAGES):
        complain("gpu", f"[{number + 1}/{len(STAGES)}] {stage.name}")
        task = Task(stage, device, asked.dry_run, stage.name == asked.fault)
        outcomes[number] = _outcome(task, asked, deadline, interrupts)
        save(asked.out, report.files(about, outcomes))
    sys.stdout.write(report.markdown(about, outcomes))
    checked = any("right" in row for each in outcomes for row in each.rows)
    return FAILED if any(each.bad for each in outcomes) or not checked else 0


def _outcome(
    task: Task, asked: argparse.Namespace, deadline: float, interrupts: Interrupts
) -> Outcome:
    """Do a stage, unless it is left out."""
    stage, left = task.stage, deadline - time.monotonic()
    if asked.only and stage.name not in asked.only:
        return Outcome(stage, why="not asked for")
    if task.dry and not stage.dry:
        return Outcome(stage, why="needs a GPU")
    if left < _LEAST:
        return Outcome(stage, why="no time was left")
    if stage.kind == "tests" and not _TESTS.is_dir():
        return Outcome(stage, why="no folder tests here")
    with tempfile.TemporaryDirectory(prefix="gpu-") as name:
        longest = stage.budget * (_PATIENCE if task.dry else 1)
        return report.settled(measured(task, Path(name), min(longest, left), interrupts))


def measured(task: Task, folder: Path, seconds: float, interrupts: Interrupts) -> Outcome:
    """A stage in a process of its own, which is killed after so many seconds."""
    task.write(folder)
    module, args = "scripts.gpu.work", [str(folder)]
    if task.stage.kind == "tests":
        module, args = "pytest", ["-m", "gpu", *_how(task)]
    started = time.monotonic()
    with interrupts.deferred():  # a stop while the process starts would lose sight of it
        child = ChildProcess(args, folder / OUTPUT, module=module, threads=cores())
        try:
            with interrupts.at_once():
                while (code := child.poll()) is None and time.monotonic() - started < seconds:
                    time.sleep(_POLL)
        finally:
            child.kill()
    interrupts.check()  # a stop that came meanwhile
    outcome = Outcome(task.stage, _rows(folder), time.monotonic() - started)
    last = child.last_line()
    if code is None:
        outcome.state, outcome.why = report.LATE, f"stopped after {seconds:.0f} s"
    elif task.stage.kind == "tests":
        return tests(outcome, code, last)
    elif code != 0:
        outcome.state, outcome.why = report.FAILED, last or f"code {code}"
    else:
        outcome.state = report.DONE
    return outcome


def _how(task: Task) -> list[str]:
    """How pytest runs: files that are named stay in one process unless it is told otherwise."""
    files = sorted(
        str(path) for path in _TESTS.rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8")
    )
    if task.dry:
        return ["--collect-only", *files]
    return ["-n", "4" if cores() >= _MANY else "0", *files]


def tests(outcome: Outcome, code: int, last: str) -> Outcome:
    """What pytest said in its last line; tests that were skipped or only collected were not run."""
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    outcome.why = last
    if code not in (0, 5):
        outcome.state = report.WRONG if counts.get("failed") else report.FAILED
    elif counts.get("passed"):
        outcome.rows = [{"what": last, "value": counts["passed"], "right": True}]
        outcome.state = report.DONE
    return outcome


def _rows(folder: Path) -> list[dict[str, Any]]:
    with suppress(OSError):
        found: list[dict[str, Any]] = json.loads((folder / ROWS).read_text())
        return found
    return []


def _options(argv: Sequence[str]) -> argparse.Namespace:
    """Options of a command line; help is printed and ends in SystemExit.

    Raises:
        ScriptError: One line that says what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m scripts.gpu", description=__doc__, allow_abbrev=False
    )
    names = [stage.name for stage in STAGES]
    checks = [stage.name for stage in STAGES if stage.kind in ("updates", "kfac", "compile")]
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the tables")
    add("--only", nargs="+", choices=names, metavar="STAGE", help=f"of {', '.join(names)}")
    what = "compare the CPU with itself at tiny sizes, to try this script"
    add("--dry-run", action="store_true", help=what)
    what = f"for all stages together; default {TOTAL:g}, and {_PATIENCE:g} times that in a dry run"
    add("--seconds", type=positive(3600.0), default=TOTAL, help=what)
    what = "spoil the device's numbers in one stage, to see that it is found out"
    add("--fault", choices=checks, metavar="STAGE", help=what)
    asked = parsed(parser, argv)
    spoilt = next((stage for stage in STAGES if stage.name == asked.fault), None)
    if spoilt and ((asked.only and spoilt.name not in asked.only) or asked.dry_run > spoilt.dry):
        raise ScriptError(f"argument --fault: the stage {spoilt.name} would not run")
    check_folder(asked.out)
    return asked


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
