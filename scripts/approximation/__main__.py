"""How much of the exact Fisher matrix K-FAC's approximations keep: a table and a figure."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from acktr.kfac import FactorError
from scripts.approximation import report
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
from scripts.common import ScriptError, command_line, integer, parsed, positive, run, save

_LARGEST = 4000
_Singular: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
_UNDRAWN = "K-FAC (factored damping)"


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code: 0, 2 bad input, 130 Ctrl-C, 75 SIGTERM."""
    note = "no results were written; the same command starts anew"
    return run("approximation", lambda _: _study(argv), note)


def _study(argv: Sequence[str]) -> int:
    out, shown, settings = _options(argv)
    problem = trained(settings)
    fisher = exact_fisher(problem)
    rows: list[Row] = []
    drawn: dict[str, Candidate] = {}
    for damping in settings.dampings:
        exact: Candidate | None = None
        for name, candidate in _inverted(problem, fisher, damping):
            exact = exact or candidate
            rows.append(compare(problem, exact, name, candidate, damping))
            if damping == shown and name != _UNDRAWN:
                drawn[name] = candidate
    command = command_line("approximation", argv)
    title = f"Fisher matrix over {len(problem.sizes)} layers, damping {shown:g}: absolute values"
    files = {
        "figure.png": report.draw(drawn, problem.sizes, title),
        "table.csv": report.as_csv(rows),
        "table.md": report.as_markdown(rows, problem, settings, shown, command),
    }
    save(out, files)
    print(f"{out}: {', '.join(files)}")
    return 0


def _inverted(problem: Problem, fisher: Tensor, damping: float) -> Iterator[tuple[str, Candidate]]:
    try:
        yield from candidates(problem, fisher, damping)
    except (_Singular, FactorError) as error:
        raise ScriptError(
            f"argument --damping: {damping:g} is too small, a matrix cannot be inverted:"
            " choose a larger one"
        ) from error


def _options(argv: Sequence[str]) -> tuple[Path, float, Settings]:
    """Folder of the results, damping of the figure, and settings of the study."""
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m scripts.approximation", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="results folder")
    parser.add_argument("--seed", type=integer(0, 2**63 - 1), default=default.seed)
    parser.add_argument("--samples", type=integer(1, 100_000), default=default.samples)
    parser.add_argument("--steps", type=integer(0, 100_000), default=default.steps)
    parser.add_argument("--width", type=integer(1, 1000), default=default.width)
    parser.add_argument("--hidden", type=integer(3, 100), default=default.hidden)
    parser.add_argument("--damping", type=positive(), nargs="+", default=list(default.dampings))
    parser.add_argument("--shown", type=positive(), help="damping of the figure (the middle one)")
    parser.add_argument("--threads", type=integer(1, 1024), help="threads of torch")
    asked = parsed(parser, argv)
    dampings = tuple(dict.fromkeys(asked.damping))
    shown = dampings[len(dampings) // 2] if asked.shown is None else asked.shown
    if shown not in dampings:
        raise ScriptError(f"argument --shown: must be one of --damping, got {shown:g}")
    size = (asked.hidden - 1) * asked.width * (asked.width + 1)
    if size > _LARGEST:
        raise ScriptError(
            f"--hidden {asked.hidden} --width {asked.width} make a matrix of {size} rows:"
            f" at most {_LARGEST} fit (lower --width)"
        )
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    return (
        asked.out,
        shown,
        Settings(asked.seed, asked.samples, asked.steps, asked.width, asked.hidden, dampings),
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
