"""Regression on the UCI sets: all splits of a set at once, each method with the same evaluation."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch

from scripts import campaign
from scripts.bayes import report
from scripts.bayes.data import LARGE, LAYOUT, SMALL, Splits, load
from scripts.bayes.methods import METHODS, Method, settings
from scripts.bayes.training import Budget, Score, train
from scripts.campaign import Part, Rows, Tell
from scripts.common import check_folder, command_line, given_once, integer, parsed, positive, save
from scripts.contest import shown

_QUICK_STEPS = 7200
_GROUPS = {"small": SMALL, "large": LARGE}
_MOST = 10**6


def part(method: Method, splits: Splits, budget: Budget, out: Path) -> Part:
    """One method on one set: a file of a row per split."""
    known = {"set": splits.name, "method": method, "data": splits.digest, "splits": splits.count}
    steps = budget.steps(splits)

    def make(tell: Tell) -> tuple[Rows, str]:
        scores, seconds = train(method, splits, budget, tell)
        rmse, likelihood = (report.summary(scores, name) for name in report.MEASURES)
        note = (
            f"RMSE {rmse}, log-likelihood {likelihood}, {steps:,} steps of {1e3 * seconds:.1f} ms"
            " of one processor"
        )
        return [[float(value) for value in asdict(score).values()] for score in scores], note

    return Part(
        label=f"{splits.name} {method}",
        path=out / splits.name / f"{method}.csv",
        identity=json.dumps({**known, **asdict(budget), "settings": settings(method)}),
        columns=[field.name for field in fields(Score)],
        size=max(steps, 1),
        make=make,
    )


def _score(row: Sequence[float]) -> Score:
    return Score(int(row[0]), *row[1:])


def work(argv: Sequence[str]) -> int:
    """Run the command line of ``uci``; returns the exit code."""
    asked = options(argv)
    check_folder(asked.out)
    torch.set_num_threads(1)
    sets = [load(asked.data, name, asked.splits) for name in asked.sets]
    budgets = {s.name: budget(asked, s) for s in sets}
    keys = [(s, method) for s in sets for method in asked.methods]
    parts = [part(method, s, budgets[s.name], asked.out) for s, method in keys]
    rows = campaign.run("bayes uci", parts)
    found = {
        (s.name, method): [_score(row) for row in of]
        for (s, method), of in zip(keys, rows, strict=True)
    }
    command = command_line("bayes", ["uci", *shown(argv)])
    text = report.markdown(sets, found, budgets, command)
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
