"""From the command line to the results."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from acktr.files import reason, write_atomic
from acktr.interrupts import STOPPED, Interrupts, Stopped
from acktr.kfac import FactorError
from scripts.approximation import figure, report
from scripts.approximation.study import (
    Candidate,
    Problem,
    Row,
    Settings,
    candidates,
    compare,
    exact_fisher,
    trained,
)
from scripts.arguments import integer, positive

BAD_INPUT = 2
_LARGEST = 4000
_Singular: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
_UNDRAWN = "K-FAC (factored damping)"


class ApproximationError(ValueError):
    """Bad options or a results folder that cannot be written; the message is one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ApproximationError(message)


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code: 0, 2 bad input, 130 Ctrl-C, 75 SIGTERM."""
    try:
        with Interrupts():
            _run(argv)
    except ApproximationError as error:
        _complain(f"error: {error}")
        return BAD_INPUT
    except Stopped as stop:
        _complain("stopped before the results were complete; the same command starts anew")
        return STOPPED[signal.Signals(stop.signum)]
    return 0


def _complain(text: str) -> None:
    line = "".join(c if c.isprintable() else " " for c in text)
    sys.stderr.write(f"approximation: {line}\n")
    sys.stderr.flush()


def _run(argv: Sequence[str]) -> None:
    out, shown, settings = _parsed(argv)
    problem = trained(settings)
    fisher = exact_fisher(problem)
    rows: list[Row] = []
    drawn: dict[str, Candidate] = {}
    for damping in settings.dampings:
        exact: Candidate | None = None
        for name, found in _inverted(problem, fisher, damping):
            exact = exact or found
            rows.append(compare(problem, exact, name, found, damping))
            if damping == shown and name != _UNDRAWN:
                drawn[name] = found
    command = shlex.join(["python", "-m", "scripts.approximation", *argv])
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


def _inverted(problem: Problem, fisher: Tensor, damping: float) -> Iterator[tuple[str, Candidate]]:
    try:
        yield from candidates(problem, fisher, damping)
    except (_Singular, FactorError) as error:
        raise ApproximationError(
            f"argument --damping: {damping:g} is too small, a matrix cannot be inverted:"
            " choose a larger one"
        ) from error


def _parsed(argv: Sequence[str]) -> tuple[Path, float, Settings]:
    default = Settings()
    parser = _Parser(prog="approximation", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="results folder")
    parser.add_argument("--seed", type=integer(0, 2**63 - 1), default=default.seed)
    parser.add_argument("--samples", type=integer(1, 100_000), default=default.samples)
    parser.add_argument("--steps", type=integer(0, 100_000), default=default.steps)
    parser.add_argument("--width", type=integer(1, 1000), default=default.width)
    parser.add_argument("--hidden", type=integer(3, 100), default=default.hidden)
    parser.add_argument("--damping", type=positive(), nargs="+", default=list(default.dampings))
    parser.add_argument("--shown", type=positive(), help="damping of the figure (the middle one)")
    parser.add_argument("--threads", type=integer(1, 1024), help="threads of torch")
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


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
