"""Active learning from twenty points, and predictive variances beside those of HMC.

All repeats are trained at once. Each begins with 20 random training points, 100 test points and the
rest as a pool; the point of the largest predictive variance, or a random one, is added nine times,
and the networks begin anew each time.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from acktr.report.tables import as_csv
from acktr.report.tables import markdown as table
from acktr.runs.progress import Display, duration
from scripts.bayes import hmc
from scripts.bayes.data import LARGE, LAYOUT, SMALL, Raw, Splits, read, standardised
from scripts.bayes.methods import METHODS, SHORT, Method
from scripts.bayes.report import sign_test, with_error
from scripts.bayes.training import Budget, Training
from scripts.common import (
    ScriptError,
    check_folder,
    command_line,
    given_once,
    integer,
    parsed,
    save,
)
from scripts.contest import described_machine, shown

FIRST, TEST, ADDED, HIDDEN = 20, 100, 9, 10
SAMPLES = 100
_LEAST = FIRST + TEST + ADDED + 1
_NOISE_PRIOR = (6.0, 6.0)
_ROW = ("set", "method", "repeat", "first", "random", "active", "hmc_correlation")


class Result(NamedTuple):
    """What a method reached in one repeat."""

    set: str
    method: str
    repeat: int
    first: float
    """RMSE with the first twenty points, in the target's units."""
    random: float
    """RMSE with random points added."""
    active: float
    """RMSE with chosen points added."""
    correlation: float
    """Of variances on test points with those of HMC after the first twenty points."""


def beginnings(raw: Raw, repeats: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of training parts (S, 20), test parts (S, 100) and pools (S, rest), drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(repeats, len(raw.y), generator=generator).argsort(1)
    return order[:, :FIRST], order[:, FIRST : FIRST + TEST], order[:, FIRST + TEST :]


def fitted(method: Method, splits: Splits, epochs: int, seed: int) -> Training:
    """Networks of ten units, trained on all their points at each step."""
    budget = Budget(epochs, splits.data_size, HIDDEN, _NOISE_PRIOR, seed)
    training = Training(method, splits, budget, SHORT)
    for _ in range(epochs):
        training.epoch()
    return training


def acquire(
    method: Method, raw: Raw, begin: tuple[Tensor, Tensor, Tensor], *, active: bool, epochs: int
) -> Tensor:
    """RMSE (S,) in the target's units after nine points were added."""
    train, test, pool = begin
    generator = torch.Generator().manual_seed(1)
    for added in range(ADDED):
        if active:
            both = standardised("", raw, train, pool, known=True)
            networks = fitted(method, both, epochs, added).networks
            merit = networks.predict(both.x_test, SAMPLES).var(0).T
        else:
            merit = torch.rand(pool.shape, generator=generator)
        best = merit.argmax(1, keepdim=True)
        train = torch.cat([train, pool.gather(1, best)], 1)
        left = torch.ones_like(pool, dtype=torch.bool).scatter(1, best, False)
        pool = pool[left].view(len(pool), -1)
    splits = standardised("", raw, train, test, known=True)
    trained = fitted(method, splits, epochs, ADDED)
    return error(splits, trained.networks.predict(splits.x_test, SAMPLES))


def error(splits: Splits, outputs: Tensor) -> Tensor:
    """RMSE (S,) on test points of the mean of outputs (samples, m, S), in the target's units."""
    return (outputs.mean(0) - splits.y_test).square().mean(0).sqrt() * splits.scale


def hmc_outputs(splits: Splits, *, warmup: int, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Outputs at test points (samples, m, S) by HMC over weights and the log of the precision.

    Returns:
        The outputs, in standardised units, and the acceptance (S,).
    """
    x, y = splits.x_train.double().transpose(0, 1), splits.y_train.double().T
    inputs, (a, b) = splits.inputs, _NOISE_PRIOR
    sizes = (HIDDEN * inputs, HIDDEN, HIDDEN, 1, 1)

    def outputs(point: Tensor, rows: Tensor) -> Tensor:
        first, bias, second, shift, _ = point.split_with_sizes(sizes, 1)
        hidden = torch.baddbmm(bias[:, None], rows, first.view(-1, HIDDEN, inputs).mT).relu()
        return torch.baddbmm(shift[:, None], hidden, second[..., None])[..., 0]

    def potential(point: Tensor) -> Tensor:
        log_tau = point[:, -1]
        errors = (outputs(point, x) - y).square().sum(1)
        likelihood = 0.5 * y.shape[1] * log_tau - 0.5 * log_tau.exp() * errors
        prior = -0.5 * point[:, :-1].square().sum(1) + a * log_tau - b * log_tau.exp()
        return -(likelihood + prior)

    generator = torch.Generator().manual_seed(seed)
    start = 0.3 * torch.randn(splits.count, sum(sizes), generator=generator, dtype=torch.float64)
    drawn, accepted = hmc.sample(
        potential, start, warmup=warmup, samples=samples, steps=40, generator=generator
    )
    tests = splits.x_test.double().transpose(0, 1)
    return torch.stack([outputs(point, tests).T for point in drawn]), accepted


def correlations(one: Tensor, other: Tensor) -> list[float]:
    """Pearson's correlation of each column."""
    one, other = (x.double() - x.double().mean(0) for x in (one, other))
    norms = one.square().sum(0) * other.square().sum(0)
    found: list[float] = ((one * other).sum(0) / norms.sqrt()).tolist()
    return found


def study(asked: argparse.Namespace, name: str, raw: Raw, tell: Display) -> list[Result]:
    """All methods on one set."""
    begin = beginnings(raw, asked.repeats, asked.seed)
    first = standardised(name, raw, begin[0], begin[1], known=True)
    draws = {"warmup": asked.hmc // 2, "samples": asked.hmc}
    drawn, accepted = hmc_outputs(first, seed=asked.seed, **draws)
    again, _ = hmc_outputs(first, seed=asked.seed + 1, **draws)
    truth = drawn.var(0)
    repeated = correlations(again.var(0), truth)
    tell.note(
        f"{name} HMC: acceptance {accepted.min():.2f} to {accepted.max():.2f}, correlation of two"
        f" runs {fmean(repeated):.3f}"
    )
    found = []
    for method in asked.methods:
        began = time.monotonic()
        start = fitted(method, first, asked.epochs, asked.seed).networks
        outputs = start.predict(first.x_test, 10 * SAMPLES)
        near, at_first = correlations(outputs.var(0), truth), error(first, outputs).tolist()
        reached = [
            acquire(method, raw, begin, active=active, epochs=asked.epochs).tolist()
            for active in (False, True)
        ]
        found += [
            Result(name, method, s, at_first[s], drawn_, chosen, near[s])
            for s, (drawn_, chosen) in enumerate(zip(*reached, strict=True))
        ]
        taken = duration(time.monotonic() - began)
        tell.note(
            f"{name} {method}: random, active {[f'{fmean(r):.2f}' for r in reached]}, {taken}"
        )
    found += [
        Result(name, "hmc", s, e, math.nan, math.nan, r)
        for s, (e, r) in enumerate(zip(error(first, drawn).tolist(), repeated, strict=True))
    ]
    return found


def work(argv: Sequence[str]) -> int:
    """Run the command line of ``active``; returns the exit code."""
    asked = options(argv)
    check_folder(asked.out)
    torch.set_num_threads(1)
    sets = {name: read(asked.data, name) for name in asked.sets}
    for name, raw in sets.items():
        if len(raw.y) < _LEAST:
            raise ScriptError(f"{name} has {len(raw.y)} rows; {_LEAST} are needed")
    tell = Display("bayes active", 10.0)
    found = [row for name, raw in sets.items() for row in study(asked, name, raw, tell)]
    rows = [[f"{v:.7g}" if isinstance(v, float) else v for v in row] for row in found]
    text = _markdown(found, command_line("bayes", ["active", *shown(argv)]), asked)
    save(asked.out, {"table.csv": as_csv(_ROW, rows), "summary.md": text.encode()})
    sys.stdout.write(text)
    return 0


def _markdown(found: Sequence[Result], command: str, asked: argparse.Namespace) -> str:
    body = []
    for name, method in dict.fromkeys((row.set, row.method) for row in found):
        rows = [row for row in found if (row.set, row.method) == (name, method)]
        differences = [row.active - row.random for row in rows]
        better, worse = (sum(way * d < 0 for d in differences) for way in (1, -1))
        known = not math.isnan(rows[0].random)
        shown_ = [
            with_error(numbers, 2) if known else ""
            for numbers in ([r.random for r in rows], [r.active for r in rows], differences)
        ]
        first = with_error([r.first for r in rows], 2)
        test = (
            [f"{better}/{better + worse}", f"{sign_test(better, worse):.2g}"] if known else ["", ""]
        )
        correlation = with_error([r.correlation for r in rows], 2)
        label = method if known else "hmc (correlation: a second run)"
        body.append([name, label, first, *shown_, *(test if known else ["", ""]), correlation])
    head = [
        "set",
        "method",
        "first",
        "random",
        "active",
        "difference",
        "better",
        "p",
        "correlation with HMC",
    ]
    return "\n".join(
        [
            "# Active learning from twenty points\n",
            f"Command: `{command}`\n",
            f"{asked.repeats} repeats; {FIRST} points, {ADDED} added, RMSE on {TEST} test points in"
            f" the target's units; {HIDDEN} units, {asked.epochs} steps on all points, networks"
            " anew after each point; noisy K-FAC with"
            f" lr {SHORT.lr:g} and stat_decay {SHORT.stat_decay:g}; *first* is the RMSE with the"
            " first twenty; inputs standardised by all rows; noise precision Gamma(6, 6),"
            f" learnt; ± is the standard error over repeats. HMC: {asked.hmc} draws in"
            f" float64 after {asked.hmc // 2} of warm-up; its correlation is of variances of the"
            " test points after the first twenty.\n",
            table(head, body, left=2),
            described_machine(),
        ]
    )


def options(argv: Sequence[str]) -> argparse.Namespace:
    """Options of a command line; help is printed and ends in SystemExit.

    Raises:
        ScriptError: One line that says what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bayes active",
        description=__doc__,
        allow_abbrev=False,
        epilog=LAYOUT,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="of the sets, see below")
    add("--out", type=Path, required=True, help="folder of the results")
    usual = ["boston", "concrete"]
    add("--sets", nargs="+", choices=(*SMALL, *LARGE), default=usual, metavar="SET")
    usual = ["ffg", "mvg"]
    add("--methods", nargs="+", choices=METHODS, default=usual, metavar="METHOD")
    add("--repeats", type=integer(2, 1000), default=40)
    add("--epochs", type=integer(1, 10**6), default=2000, help="steps of every training")
    add("--hmc", type=integer(2, 10**6), default=1000, help="draws that are kept")
    add("--seed", type=integer(0, 2**31), default=0)
    asked = parsed(parser, argv)
    given_once(asked, "sets", "methods")
    return asked
