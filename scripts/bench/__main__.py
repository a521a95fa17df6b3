"""Measure how fast our algorithms and those of stable-baselines3 train on the CPU.

Environment steps per second, environments included; where the time goes; and how far that is from
the limits that environments and computation set. Every case runs in a process of its own, one
after another. SUITE.md and SUITE.json are written when a suite is complete. For numbers to keep,
nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from acktr.interrupts import Interrupts
from acktr.runs.progress import printable
from scripts.bench import report
from scripts.bench.cases import GAME, SUITES, Suite, Timing, make_suite, missing
from scripts.bench.runner import Runner, turns
from scripts.common import (
    FAILED,
    ScriptError,
    check_folder,
    command_line,
    cores,
    given_once,
    integer,
    parsed,
    positive,
    run,
    save,
)

_MOST_SECONDS = 3600.0


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code.

    0 done; 1 some cases failed; 2 bad input; 130 Ctrl-C, 75 SIGTERM.
    """
    note = "reports of complete suites are kept"
    return run("bench", lambda interrupts: _bench(argv, interrupts), note)


def _bench(argv: Sequence[str], interrupts: Interrupts) -> int:
    asked = _options(argv)
    timing = Timing(
        threads=asked.torch_threads,
        seconds=asked.seconds,
        windows=asked.windows,
        warm_up=asked.warm_up,
        warm_up_updates=asked.warm_up_updates,
    )
    suites = [make_suite(name, asked.env or GAME) for name in asked.suite]
    failed = False
    skipped = {suite.name: _skipped(suite) for suite in suites}
    planned = {
        suite.name: turns(suite.cases, timing, asked.rounds, skipped[suite.name])
        for suite in suites
    }
    runner = Runner(planned, _say, interrupts)
    for suite in suites:
        load = report.load_average()
        outcomes = runner.run(suite)
        about = report.about(command_line("bench", argv), timing, asked.rounds, load)
        document = report.document(suite, outcomes, skipped[suite.name], about)
        sys.stdout.write(report.markdown(document))
        sys.stdout.flush()
        save(asked.out, report.files(document))
        failed = failed or any(outcome.found is None for outcome in outcomes.values())
    return FAILED if failed else 0


def _say(text: str) -> None:
    """A line of progress; what is on standard output is the reports."""
    sys.stderr.write(printable(text) + "\n")
    sys.stderr.flush()


def _skipped(suite: Suite) -> dict[str, str]:
    """Why cases are left out, by their key; each reason is told once."""
    reasons: dict[str, str] = {}
    for case in suite.cases:
        absent = missing(case)
        if absent:
            reasons[case.key] = f"{' and '.join(absent)} not installed"
    for reason in dict.fromkeys(reasons.values()):
        names = [case.what for case in suite.cases if reasons.get(case.key) == reason]
        _say(
            f"{suite.name}: skipping {'; '.join(names)}: {reason}"
            " (pip install 'acktr[bench]' brings it)"
        )
    return reasons


def _options(argv: Sequence[str]) -> argparse.Namespace:
    """Options of a command line; help is printed and ends in SystemExit.

    Raises:
        ScriptError: One line that says what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    names = ", ".join(SUITES)
    add("--suite", nargs="+", required=True, choices=SUITES, metavar="NAME", help=names)
    add("--env", metavar="ID", help=f"game of the suites atari and batch; default {GAME}")
    folder = Path("results/performance")
    add("--out", type=Path, default=folder, help=f"folder of the reports; default {folder}")
    what = "threads of torch; default one per core"
    add("--torch-threads", type=integer(1, 1024), default=cores(), metavar="N", help=what)
    seconds = positive(_MOST_SECONDS)
    what = "least length of a window; default 10"
    add("--seconds", type=seconds, default=10.0, help=what)
    add("--windows", type=integer(1, 1000), default=3, help="default 3")
    what = (
        "go through all cases so often, with as many windows each time, so that a machine whose"
        " speed drifts treats them alike; default 1"
    )
    add("--rounds", type=integer(1, 100), default=1, metavar="N", help=what)
    what = "least seconds before the first window; default 5"
    add("--warmup", dest="warm_up", type=seconds, default=5.0, metavar="SECONDS", help=what)
    what = "least updates before the first window; default 20"
    updates = integer(0, 10_000)
    add(
        "--warmup-updates", dest="warm_up_updates", type=updates, default=20, metavar="N", help=what
    )
    asked = parsed(parser, argv)
    given_once(asked, "suite")
    if asked.env is not None and not {"atari", "batch"} & set(asked.suite):
        raise ScriptError(
            "argument --env: it replaces the game of atari and batch, which are not in --suite"
        )
    check_folder(asked.out)
    return asked


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
