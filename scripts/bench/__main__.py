"""From the command line to the reports."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from acktr.envs import EnvError
from acktr.interrupts import STOPPED, Interrupts, Stopped
from scripts.bench import options, report, worker
from scripts.bench.errors import BenchError
from scripts.bench.rounds import together, turns
from scripts.bench.runner import WORKER, Outcome, Runner
from scripts.bench.suites import Suite, make_suite, missing

FAILED, BAD_INPUT = 1, 2


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code.

    0 done; 1 some cases failed; 2 bad input; 130 Ctrl-C, 75 SIGTERM.
    """
    if len(argv) == 2 and argv[0] == WORKER:
        worker.work(Path(argv[1]))
        return 0
    try:
        with Interrupts() as interrupts:
            return _run(argv, interrupts)
    except (BenchError, EnvError) as error:
        _complain(f"error: {error}")
        return BAD_INPUT
    except Stopped as stop:
        _complain("stopped; reports of complete suites are kept")
        return STOPPED[signal.Signals(stop.signum)]


def _complain(text: str) -> None:
    sys.stderr.write(f"bench: {_printable(text)}\n")
    sys.stderr.flush()


def _say(text: str) -> None:
    """A line of progress; what is on standard output is the reports."""
    sys.stderr.write(_printable(text) + "\n")
    sys.stderr.flush()


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _run(argv: Sequence[str], interrupts: Interrupts) -> int:
    asked = options.parse(argv)
    command = shlex.join(["python", "-m", "scripts.bench", *argv])
    suites = [make_suite(name, asked.game) for name in asked.suites]
    skipped = {suite.name: _skipped(suite) for suite in suites}
    planned = {
        suite.name: turns(suite.cases, asked.timing, asked.rounds, skipped[suite.name])
        for suite in suites
    }
    runner = Runner([turn for each in planned.values() for turn in each], _say, interrupts)
    failed = False
    for suite in suites:
        load = report.load_average()
        outcomes: dict[str, Outcome] = {}
        for turn in planned[suite.name]:
            outcome = runner.run(turn)
            before = outcomes.get(turn.case.key)
            outcomes[turn.case.key] = outcome if before is None else together(before, outcome)
        about = report.about(command, asked.timing, asked.rounds, load)
        document = report.document(suite, outcomes, skipped[suite.name], about)
        sys.stdout.write(report.markdown(document))
        sys.stdout.flush()
        report.write(asked.out, document)
        failed = failed or any(outcome.found is None for outcome in outcomes.values())
    return FAILED if failed else 0


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


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
