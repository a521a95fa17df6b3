"""Draw mutants for a run of mutmut, and tell how many of them the tests found.

Usage: python -m scripts.mutants draw --count 100 > names.txt
       mutmut run $(cat names.txt)
       python -m scripts.mutants table --out results/reliability

mutmut writes every mutant of the modules in pyproject.toml into mutants/ first; testing all of them
would take days. The draw takes as many of each group of modules, at random by a seed. The table has
the score of each group with its 95 % interval (Wilson), mutants.csv a row per mutant that was
tested. A mutant that no test reaches counts as one that lives.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from acktr.files import read_object
from acktr.report.tables import as_csv
from acktr.report.tables import markdown as table
from scripts.common import (
    ScriptError,
    check_folder,
    command_line,
    described_machine,
    integer,
    parsed,
    run,
    save,
)

GROUPS = {
    "K-FAC": "acktr.kfac.",
    "returns and rollout": "acktr.rollout.",
    "checkpoints": "acktr.runs.",
    "configuration": "acktr.config.",
}
"""What the modules' names begin with."""
_ENDS = {0: "lives", 33: "not reached", 5: "not reached", 1: "found", 3: "found", 37: "found"}
_TIMEOUTS = (-24, 24, 36, 152, 255)
"""Exit codes of mutmut for a mutant that takes far longer than the code does."""
_NORMAL = 1.96


def end_of(code: int) -> str:
    """What a mutant's exit code in mutmut's files says."""
    if code in _ENDS:
        return _ENDS[code]
    return "found, by time" if code in _TIMEOUTS else "found, by a crash"


def read(folder: Path) -> dict[str, int | None]:
    """Exit codes of all mutants by name; None of those that were not tested.

    Raises:
        ScriptError: There are none, or a file is not mutmut's.
    """
    found: dict[str, int | None] = {}
    for path in sorted(folder.rglob("*.meta")):
        try:
            found |= read_object(path)["exit_code_by_key"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ScriptError(f"{path}: not a file of mutmut: {error}") from error
    if not found:
        raise ScriptError(f"{folder} has no mutants: `mutmut run` makes them, in the repository")
    return found


def group_of(name: str) -> str:
    """The group of a mutant."""
    return next((group for group, start in GROUPS.items() if name.startswith(start)), "other")


def draw(mutants: Mapping[str, int | None], count: int, seed: int) -> list[str]:
    """Names of ``count`` mutants of each group, or of all it has."""
    chosen: list[str] = []
    for group in GROUPS:
        names = sorted(name for name in mutants if group_of(name) == group)
        chosen += random.Random(f"{seed} {group}").sample(names, min(count, len(names)))
    return chosen


def interval(found: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share.

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).
    """
    p, z = found / count, _NORMAL
    middle = p + z * z / (2 * count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


def report(mutants: Mapping[str, int | None], command: str) -> dict[str, bytes]:
    """mutants.csv and mutants.md of those that were tested.

    Raises:
        ScriptError: None was.
    """
    tested = {name: end_of(code) for name, code in mutants.items() if code is not None}
    if not tested:
        raise ScriptError("no mutant was tested: give the names of `draw` to `mutmut run`")
    body = []
    for group in GROUPS:
        ends = [end for name, end in tested.items() if group_of(name) == group]
        if not ends:
            continue
        found = sum(end.startswith("found") for end in ends)
        low, high = interval(found, len(ends))
        all_of = sum(group_of(name) == group for name in mutants)
        share = f"{found / len(ends):.1%} [{low:.1%}, {high:.1%}]"
        body.append([group, f"{all_of:,}", str(len(ends)), str(found), share])
    alive = sorted(name for name, end in tested.items() if not end.startswith("found"))
    text = "\n".join(
        [
            "# What tests notice of changed lines\n",
            f"Command: `{command}`\n",
            table(["modules", "mutants", "tested", "found", "score and 95 % interval"], body),
            f"The {len(alive)} that live:\n",
            *(f"- `{name}`: {tested[name]}" for name in alive),
            "",
            described_machine(environments=True),
        ]
    )
    rows = [[name, group_of(name), tested[name]] for name in sorted(tested)]
    content = as_csv(["mutant", "group", "end"], rows)
    return {"mutants.csv": content, "mutants.md": text.encode()}


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code: 0, 2 bad input, 130 Ctrl-C, 75 SIGTERM."""
    return run("mutants", lambda _: _work(argv), "nothing is written before the end")


def _work(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.mutants", description=__doc__, allow_abbrev=False
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("draw", help="print names", allow_abbrev=False)
    one.add_argument("--count", type=integer(1), default=100, help="of each group; default 100")
    one.add_argument("--seed", type=integer(0), default=0)
    two = parts.add_parser("table", help="write mutants.md and mutants.csv", allow_abbrev=False)
    two.add_argument("--out", type=Path, required=True, help="folder of the results")
    for part in (one, two):
        what = "of mutmut; default mutants"
        part.add_argument("--mutants", type=Path, default=Path("mutants"), help=what)
    asked = parsed(parser, argv)
    mutants = read(asked.mutants)
    if asked.part == "draw":
        sys.stdout.write("".join(f"{name}\n" for name in draw(mutants, asked.count, asked.seed)))
        return 0
    check_folder(asked.out)
    files = report(mutants, command_line("mutants", argv))
    save(asked.out, files)
    sys.stdout.write(files["mutants.md"].decode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
