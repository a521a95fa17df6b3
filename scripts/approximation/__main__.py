"""How much of the exact Fisher matrix K-FAC's approximations keep: a table and a figure."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from scripts.approximation import report
from scripts.approximation.study import (
    DAMPINGS,
    Candidate,
    Row,
    Settings,
    candidates,
    compare,
    exact_fisher,
    trained,
)
from scripts.common import ScriptError, command_line, integer, parsed, run, save

_LARGEST = 4000
_UNDRAWN = "K-FAC (factored damping)"


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code: 0, 2 bad input, 130 Ctrl-C, 75 SIGTERM."""
    note = "no results were written; the same command starts anew"
    return run("approximation", lambda _: _study(argv), note)


def _study(argv: Sequence[str]) -> int:
    out, settings = _options(argv)
    problem = trained(settings)
    fisher = exact_fisher(problem)
    rows: list[Row] = []
    drawn: dict[str, Candidate] = {}
    for damping in DAMPINGS:
        found = dict(candidates(problem, fisher, damping))
        for name, candidate in found.items():
            rows.append(compare(problem, found["exact"], name, candidate, damping))
        if damping == report.SHOWN:
            drawn = {name: each for name, each in found.items() if name != _UNDRAWN}
    command = command_line("approximation", argv)
    title = f"Fisher matrix over {len(problem.sizes)} layers, damping {report.SHOWN:g}"
    files = {
        "figure.png": report.draw(drawn, problem.sizes, f"{title}: absolute values"),
        "table.csv": report.table(rows),
        "table.md": report.as_markdown(rows, problem, settings, command),
    }
    save(out, files)
    print(f"{out}: {', '.join(files)}")
    return 0


def _options(argv: Sequence[str]) -> tuple[Path, Settings]:
    """Folder of the results and settings of the study."""
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m scripts.approximation", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="results folder")
    parser.add_argument("--samples", type=integer(1, 100_000), default=default.samples)
    parser.add_argument("--steps", type=integer(0, 100_000), default=default.steps)
    parser.add_argument("--width", type=integer(1, 1000), default=default.width)
    parser.add_argument("--hidden", type=integer(3, 100), default=default.hidden)
    parser.add_argument("--threads", type=integer(1, 1024), help="threads of torch")
    asked = parsed(parser, argv)
    size = (asked.hidden - 1) * asked.width * (asked.width + 1)
    if size > _LARGEST:
        raise ScriptError(
            f"--hidden {asked.hidden} --width {asked.width} make a matrix of {size} rows:"
            f" at most {_LARGEST} fit (lower --width)"
        )
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    return asked.out, Settings(asked.samples, asked.steps, asked.width, asked.hidden)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
