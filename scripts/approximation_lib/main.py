"""From the command line to the results."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from acktr.files import reason, write_atomic
from approximation_lib import figure, report
from approximation_lib.study import (
    Candidate,
    Row,
    Settings,
    candidates,
    compare,
    exact_fisher,
    trained,
)

BAD_INPUT = 2
_LARGEST = 4000
_UNDRAWN = "K-FAC (factored damping)"


class ApproximationError(ValueError):
    """Bad options or a results folder that cannot be written; the message is one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ApproximationError(message)


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code: 0, or 2 for bad input."""
    try:
        _run(argv)
    except ApproximationError as error:
        line = "".join(c if c.isprintable() else " " for c in str(error))
        sys.stderr.write(f"approximation: error: {line}\n")
        return BAD_INPUT
    return 0


def _run(argv: Sequence[str]) -> None:
    out, shown, settings = _parsed(argv)
    problem = trained(settings)
    fisher = exact_fisher(problem)
    rows: list[Row] = []
    drawn: dict[str, Candidate] = {}
    for damping in settings.dampings:
        exact: Candidate | None = None
        for name, found in candidates(problem, fisher, damping):
            exact = exact or found
            rows.append(compare(problem, exact, name, found, damping))
            if damping == shown and name != _UNDRAWN:
                drawn[name] = found
    command = shlex.join(["python", "scripts/approximation.py", *argv])
    title = f"Fisher matrix over {len(problem.sizes)} layers, damping {shown:g}: absolute values"
    files = {
        "figure.png": figure.draw(drawn, problem.sizes, title),
        "table.csv": report.as_csv(rows),
        "table.md": report.as_markdown(rows, problem, settings, shown, command),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_atomic(out / name, data)
    except OSError as error:
        raise ApproximationError(f"cannot write to {out}: {reason(error)}") from error
    print(f"{out}: {', '.join(files)}")


def _parsed(argv: Sequence[str]) -> tuple[Path, float, Settings]:
    default = Settings()
    parser = _Parser(prog="approximation", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="results folder")
    parser.add_argument("--seed", type=_integer(0, 2**63 - 1), default=default.seed)
    parser.add_argument("--samples", type=_integer(1, 100_000), default=default.samples)
    parser.add_argument("--steps", type=_integer(0, 100_000), default=default.steps)
    parser.add_argument("--width", type=_integer(1, 1000), default=default.width)
    parser.add_argument("--hidden", type=_integer(3, 100), default=default.hidden)
    parser.add_argument("--damping", type=_positive, nargs="+", default=list(default.dampings))
    parser.add_argument("--shown", type=_positive, help="damping of the figure (the middle one)")
    parser.add_argument("--threads", type=_integer(1, 1024), help="threads of torch")
    chosen = parser.parse_args(argv)
    dampings = tuple(dict.fromkeys(chosen.damping))
    shown = dampings[len(dampings) // 2] if chosen.shown is None else chosen.shown
    if shown not in dampings:
        raise ApproximationError(f"argument --shown: must be one of --damping, got {shown:g}")
    size = (chosen.hidden - 1) * chosen.width * (chosen.width + 1)
    if size > _LARGEST:
        raise ApproximationError(
            f"--hidden {chosen.hidden} --width {chosen.width} make a matrix of {size} rows:"
            f" at most {_LARGEST} fit (lower --width)"
        )
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    settings = Settings(
        chosen.seed, chosen.samples, chosen.steps, chosen.width, chosen.hidden, dampings
    )
    return chosen.out, shown, settings


def _integer(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be an integer in [{least}, {most}]: {text!r}")
        return value

    return parse


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number > 0: {text!r}")
    return value
