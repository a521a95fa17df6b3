"""Measure how fast our algorithms and those of stable-baselines3 train on the CPU.

Environment steps per second, environments included; where the time goes; and how far that is from
the limits that environments and computation set. Every case runs in a process of its own, one
after another. SUITE.md and SUITE.json are written when a suite is complete. For numbers to keep,
nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from acktr.interrupts import Interrupts
from acktr.runs.progress import pace, printable
from scripts.bench import report, runner
from scripts.bench.cases import SUITES, Case, Timing
from scripts.common import (
    FAILED,
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


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code.

    0 done; 1 some cases failed; 2 bad input; 130 Ctrl-C, 75 SIGTERM.
    """
    note = "reports of complete suites are kept"
    return run("bench", lambda interrupts: _bench(argv, interrupts), note)


def _bench(argv: Sequence[str], interrupts: Interrupts) -> int:
    asked = _options(argv)
    names = ("seconds", "windows", "warm_up", "warm_up_updates")
    timing = Timing(threads=asked.torch_threads, **{name: getattr(asked, name) for name in names})
    suites = {name: SUITES[name]() for name in asked.suite}
    skipped = {name: _skipped(name, cases) for name, cases in suites.items()}
    planned = {
        name: runner.turns(
            [case for case in cases if case.key not in skipped[name]], timing, asked.rounds
        )
        for name, cases in suites.items()
    }
    begun, done, total = time.monotonic(), 0, sum(map(len, planned.values()))
    failed = False
    for name, turns in planned.items():
        about = report.about(command_line("bench", argv), timing, asked.rounds)
        outcomes: dict[str, runner.Outcome] = {}
        for case, length in turns:
            eta = pace(done, total, done / (time.monotonic() - begun))[1]
            done += 1
            _say(f"[{done}/{total}] {case.what} {case.env}".rstrip() + f", ETA {eta}")
            found = runner.measure(case, length, interrupts)
            if "failure" in found:
                failed = True
                _say(f"  failed: {found['failure']}")
            before = outcomes.get(case.key)
            outcomes[case.key] = found if before is None else runner.together(before, found)
        document = {"suite": name, **about}
        document |= report.results(suites[name], outcomes, skipped[name])
        sys.stdout.write(report.markdown(document))
        sys.stdout.flush()
        save(asked.out, report.files(document))
    return FAILED if failed else 0


def _say(text: str) -> None:
    """A line of progress; what is on standard output is the reports."""
    sys.stderr.write(printable(text) + "\n")
    sys.stderr.flush()


def _skipped(suite: str, cases: Sequence[Case]) -> Mapping[str, str]:
    """Why cases are left out, by their key; each reason is told once."""
    reasons = {
        case.key: f"{' and '.join(absent)} not installed"
        for case in cases
        if (absent := case.missing())
    }
    for reason in dict.fromkeys(reasons.values()):
        names = "; ".join(case.what for case in cases if reasons.get(case.key) == reason)
        _say(f"{suite}: skipping {names}: {reason} (pip install 'acktr[bench]' brings it)")
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
    folder = Path("results/performance")
    add("--out", type=Path, default=folder, help=f"folder of the reports; default {folder}")
    what = "threads of torch; default one per core"
    add(
        "--torch-threads",
        type=integer(1, 1024),
        default=cores(),
        metavar="N",
        help=what,
    )
    what = "least length of a window; default 10"
    add("--seconds", type=positive(3600.0), default=10.0, help=what)
    add("--windows", type=integer(1, 1000), default=3, help="default 3")
    what = (
        "go through all cases so often, with as many windows each time, so that a machine whose"
        " speed drifts treats them alike; default 1"
    )
    add("--rounds", type=integer(1, 100), default=1, metavar="N", help=what)
    what = "least seconds before the first window; default 5"
    add("--warmup", dest="warm_up", type=positive(3600.0), default=5.0, help=what)
    what = "least updates before the first window; default 20"
    add("--warmup-updates", dest="warm_up_updates", type=integer(0), default=20, help=what)
    asked = parsed(parser, argv)
    given_once(asked, "suite")
    check_folder(asked.out)
    return asked


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
