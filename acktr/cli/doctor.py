"""The page of ``acktr doctor``, which appears line by line; it needs no package to be installed."""

from __future__ import annotations

import argparse
import json
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from acktr import __version__
from acktr.cli.flags import UsageError
from acktr.doctor import Finding, examine
from acktr.files import message

_ADVICE = " " * 26


def run(args: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """Say what is found on this machine; returns the names of what has a problem.

    Raises:
        SystemExit: After its help.
        UsageError: Words that it does not take.
        Stopped: A signal came.
    """
    options = _parser().parse_args(args)
    if not options.json:
        say(f"acktr {__version__}, {platform.platform()}")
    found: list[Finding] = []
    for finding in examine(options.run_dir):
        found.append(finding)
        if not options.json:
            say(page_lines(finding))
    problems = [finding.name for finding in found if finding.status == "problem"]
    if options.json:
        say(json.dumps({"ok": not problems, "findings": [asdict(finding) for finding in found]}))
    else:
        count = Counter(finding.status for finding in found)
        say(f"ok: {count['ok']}, warnings: {count['warning']}, problems: {count['problem']}")
    return problems


def page_lines(finding: Finding) -> str:
    """What was seen, and below it what to do."""
    lines = f"{finding.status:<8} {finding.name:<15}  {message(finding.seen, 400)}"
    return f"{lines}\n{_ADVICE}-> {message(finding.advice, 400)}" if finding.advice else lines


class _Parser(argparse.ArgumentParser):
    """One that says what is wrong in a line, as those of the other commands do."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    """The options, by the standard library: tyro may be what is missing."""
    parser = _Parser(
        prog="acktr doctor",
        description="Say on a page whether agents can be trained here, and what to do if not.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--run-dir", type=Path, default=Path("runs"), help="folder of all runs (runs)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the page")
    return parser
