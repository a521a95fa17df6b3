"""Regression on the UCI sets: all splits of a set at once, each method with the same evaluation."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from rich.text import Text

from acktr.report.tables import as_csv
from acktr.runs.progress import Display, duration
from scripts.bayes import report
from scripts.bayes.data import LARGE, LAYOUT, SMALL, Splits, load
from scripts.bayes.methods import METHODS, Method
from scripts.bayes.training import Budget, Score, train
from scripts.common import check_folder, command_line, given_once, integer, parsed, positive, save
from scripts.contest import read_own, shown

_QUICK_STEPS = 7200
_GROUPS = {"small": SMALL, "large": LARGE}
_MOST = 10**6


@dataclass(frozen=True)
class Cell:
    """One method on one set: a file of a row per split."""

    method: Method
    splits: Splits
    budget: Budget

    @property
    def size(self) -> float:
        """Steps to make."""
        return self.budget.steps(self.splits)

    def identity(self) -> str:
        """All that decides the outcome, apart from the machine, as one line of JSON."""
        found = {"set": self.splits.name, "method": self.method, "data": self.splits.digest}
        return json.dumps({**found, "splits": self.splits.count, **asdict(self.budget)})


class Campaign:
    """Trains the cells that have no file yet, and shows how far it is.

    Args:
        out: Folder of the results.
        cells: What is asked for.
    """

    def __init__(self, out: Path, cells: Sequence[Cell]) -> None:
        self._out, self._cells = out, cells
        self._display = Display("bayes uci", 10.0)
        self._total = sum(cell.size for cell in cells)
        self._done = self._made = 0.0
        self._began = time.monotonic()

    def run(self) -> dict[tuple[str, Method], list[Score]]:
        """Scores by set and method.

        Raises:
            ScriptError: A file in the folder belongs to another campaign or cannot be written.
        """
        with closing(self._display):
            return {(cell.splits.name, cell.method): self._scores(cell) for cell in self._cells}

    def _scores(self, cell: Cell) -> list[Score]:
        folder, name = self._out / cell.splits.name, f"{cell.method}.csv"
        rows = read_own(folder / name, cell.identity())
        if rows is None:
            label = f"{cell.splits.name} {cell.method}"

            def tell(step: int) -> None:
                if self._display.due():
                    done, made = self._done + step, max(self._made + step, 1e-9)
                    left = (time.monotonic() - self._began) / made * max(self._total - done, 0.0)
                    line = (
                        f"{label}: {step:,} of {cell.size:,.0f} steps;"
                        f" {done / self._total:.1%} of all, ETA {duration(left)}"
                    )
                    self._display.show(line, int(done), int(self._total), Text(line))

            scores, seconds = train(cell.method, cell.splits, cell.budget, tell)
            head = [field.name for field in fields(Score)]
            body = [[f"{v:.9g}" for v in asdict(score).values()] for score in scores]
            save(folder, {name: as_csv(head, body, cell.identity())})
            self._made += cell.size
            rmse, likelihood = (report.summary(scores, name) for name in report.MEASURES)
            self._display.note(
                f"{label}: RMSE {rmse}, log-likelihood {likelihood}, {cell.size:,.0f} steps of"
                f" {1e3 * seconds:.1f} ms of one processor"
            )
        else:
            scores = [_score(row) for row in rows]
        self._done += cell.size
        return scores


def _score(row: dict[str, str]) -> Score:
    numbers = [float(row[field.name]) for field in fields(Score)]
    return Score(int(numbers[0]), *numbers[1:])


def work(argv: Sequence[str]) -> int:
    """Run the command line of ``uci``; returns the exit code."""
    asked = options(argv)
    check_folder(asked.out)
    torch.set_num_threads(1)
    sets = [load(asked.data, name, asked.splits) for name in asked.sets]
    cells = [Cell(method, s, budget(asked, s)) for s in sets for method in asked.methods]
    found = Campaign(asked.out, cells).run()
    command = command_line("bayes", ["uci", *shown(argv)])
    text = report.markdown(sets, found, [cell.budget for cell in cells], command)
    paired = report.paired_csv(found)
    picture = report.figure(sets, found)
    save(asked.out, {"summary.md": text.encode(), "paired.csv": paired, "figure.png": picture})
    sys.stdout.write(text)
    return 0


def budget(asked: argparse.Namespace, splits: Splits) -> Budget:
    """The protocol of a set: batches of 100 above 5,000 rows, 100 units for protein."""
    batch = min(100 if splits.data_size > 5000 else 10, splits.data_size)
    quick = max(1, _QUICK_STEPS // (splits.data_size // batch))
    return Budget(
        epochs=quick if asked.quick else asked.epochs,
        batch=batch,
        hidden=100 if splits.name == "protein" else 50,
        noise_prior=tuple(asked.noise_prior),
        seed=asked.seed,
    )


def options(argv: Sequence[str]) -> argparse.Namespace:
    """Options of a command line; help is printed and ends in SystemExit.

    Raises:
        ScriptError: One line that says what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bayes uci", description=__doc__, allow_abbrev=False, epilog=LAYOUT
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="of the sets, see below")
    add("--out", type=Path, required=True, help="folder of the results")
    choices = (*_GROUPS, *SMALL, *LARGE)
    add("--sets", nargs="+", choices=choices, default=["small"], metavar="SET", help="names")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    add("--splits", type=integer(1, 1000), help="the first ones; default all")
    add("--epochs", type=integer(1, _MOST), default=1000)
    add("--quick", action="store_true", help=f"{_QUICK_STEPS:,} steps in place of --epochs")
    what = "Gamma prior of the noise precision; default 6 6, and 0.5 0.5 is a weak one"
    number = positive(1e6)
    add("--noise-prior", nargs=2, type=number, default=[6.0, 6.0], metavar=("A", "B"), help=what)
    add("--seed", type=integer(0, 2**31), default=0, help="of weights, batches and noise")
    asked = parsed(parser, argv)
    given_once(asked, "sets", "methods")
    names = [name for given in asked.sets for name in _GROUPS.get(given, (given,))]
    asked.sets = list(dict.fromkeys(names))
    return asked
