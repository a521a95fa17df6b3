"""The nightly tier of reliability: faults on purpose, and what must hold whatever happens.

Each part writes a CSV file with a row for every trial, and summary.md is a table of all of them.
The same command continues where it was stopped. Folders of trials that came out wrong stay in
OUT/scratch. Exit codes: 0 all is well, 1 something came out wrong, 2 bad input, 130 and 75 stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch._dynamo  # every optimizer imports it, which takes seconds: so only once

from acktr.cli import commands as _commands  # noqa: F401 - what trials import is imported once
from scripts.common import (
    FAILED,
    check_folder,
    command_line,
    complain,
    given_once,
    integer,
    machine,
    parsed,
    run,
    save,
)
from scripts.reliability import failpoints, faults, malicious, numerics, runs, soak, splits
from scripts.reliability.cases import Checkpoints, command_case, settings_case
from scripts.reliability.trials import Outcome, Part, Trial, campaign, done, remove, summary

_BATCH = 100


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code."""
    note = "trials that are done are kept, the same command continues"
    return run("reliability", lambda _: _work(argv), note)


def _work(argv: Sequence[str]) -> int:
    asked = options(argv)
    check_folder(asked.out)
    torch.set_num_threads(1)  # no threads before a fork
    os.environ["OMP_NUM_THREADS"] = "1"
    out = asked.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    wrong = 0
    for part in (part for part in PARTS if part.name in asked.parts):
        count = asked.trials or part.full
        rows = campaign(part, count, out, lambda line: complain("reliability", line))
        failed = sum(row.outcome.wrong for row in rows)
        if not failed:
            remove(out / "scratch" / part.name)
        wrong += failed
        save(out, {"summary.md": _summary(out, argv).encode()})
    sys.stdout.write(_summary(out, argv))
    return FAILED if wrong else 0


def _summary(out: Path, argv: Sequence[str]) -> str:
    """A table of all that was ever done in the folder."""
    found = [(part, done(out / f"{part.name}.csv")) for part in PARTS]
    found = [(part, rows) for part, rows in found if rows]
    facts = machine()
    about = (
        f"# Reliability\n\n`{command_line('reliability', argv)}`: torch {facts.get('torch')}, "
        f"gymnasium {facts.get('gymnasium')}, {facts.get('cpu')}, one thread, commit "
        f"{str(facts.get('git_commit'))[:10]}."
    )
    return summary(found, about)


def options(argv: Sequence[str]) -> argparse.Namespace:
    """Options of a command line; help is printed and ends in SystemExit.

    Raises:
        ScriptError: One line that says what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m scripts.reliability", description=__doc__, allow_abbrev=False
    )
    names = [part.name for part in PARTS]
    add = parser.add_argument
    add("--out", type=Path, default=Path("results/reliability"), help="folder for the results")
    add("--parts", nargs="+", choices=names, default=names, help="default: all")
    what = "cases of each part (minutes of the soak) in place of the whole campaign"
    add("--trials", type=integer(1, 1_000_000), help=what)
    found = parsed(parser, argv)
    given_once(found, "parts")
    return found


def _batches(count: int, scratch: Path) -> list[Trial]:
    return numerics.plan_factors(count, scratch)


def _corrupt(trial: Trial, here: Path) -> Outcome:
    checkpoints = Checkpoints(malicious.SOUND / "checkpoints" / "last", here)
    return _counted(trial, checkpoints.case)


def _fuzz(trial: Trial, here: Path) -> Outcome:
    """Half settings, half command lines, in a folder of their own."""
    os.chdir(tempfile.mkdtemp(dir=here))
    return _counted(
        trial,
        lambda number: (
            f"exit code {settings_case(number, here)}"
            if number % 2
            else f"exit code {command_case(number)}"
        ),
    )


def _counted(trial: Trial, case: Callable[[int], str]) -> Outcome:
    """How often what came out, and what was wrong."""
    found: Counter[str] = Counter()
    wrong = []
    for number in range(trial.seed, trial.seed + trial.cases):
        try:
            found[case(number)] += 1
        except AssertionError as error:
            wrong.append(str(error))
    said = ", ".join(f"{count} {name}" for name, count in sorted(found.items()))
    return Outcome("; ".join([*wrong[:3], said]), len(wrong))


PARTS = (
    Part(
        "kills",
        "kill -9 at random moments: nothing saved is lost, the end is bit for bit the same",
        200,
        runs.plan_kills,
        runs.killed_at_random,
    ),
    Part(
        "failpoints",
        "death before, in or after each change to a file: likewise, and nothing is left behind",
        1_000_000,
        failpoints.plan,
        failpoints.struck,
    ),
    Part(
        "resumes",
        "two splits at random updates: every update is bit for bit the same",
        100,
        splits.plan_splits,
        splits.split,
    ),
    Part(
        "signals",
        "SIGTERM, or two signals within 10 ms: a checkpoint of the last update within 20 s",
        100,
        runs.plan_signals,
        runs.signalled,
    ),
    Part(
        "corrupt",
        "damaged and forged checkpoints: refused in one line or harmless",
        10_000,
        _batches,
        _corrupt,
    ),
    Part(
        "fuzz",
        "settings and command lines without sense: a documented exit code and a short message",
        10_000,
        _batches,
        _fuzz,
    ),
    Part(
        "malicious",
        "run folders made to run code: none is run, nothing outside is written",
        len(malicious.FIXTURES),
        malicious.plan,
        malicious.used,
    ),
    Part(
        "faults",
        "environments that misbehave: named, the right exit code, no process stays",
        faults.COUNT,
        faults.plan,
        faults.misbehaved,
    ),
    Part(
        "parents",
        "kill -9 of a parent: no child survives",
        50,
        runs.plan_parents,
        runs.parent_killed,
    ),
    Part(
        "factors",
        "hostile curvature factors: finite steps, or an error that says so",
        5_000,
        numerics.plan_factors,
        numerics.hostile_factors,
    ),
    Part(
        "nan",
        "NaN or Inf in a run: nothing on the disk is broken, and it can be resumed",
        200,
        numerics.plan_nan,
        numerics.injected,
    ),
    Part(
        "soak",
        "minutes of training: memory within 5 %, no more files, threads or processes",
        45,
        soak.plan,
        soak.soaked,
        limit=6 * 3600.0,
    ),
    Part(
        "repeat",
        "the same seed again, and 2 workers: the same bits; another seed: others",
        9,
        splits.plan_repeats,
        splits.repeated,
    ),
)

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
