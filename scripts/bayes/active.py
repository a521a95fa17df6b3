"""Active learning from twenty points, and predictive variances beside those of HMC.

All repeats are trained at once. Each begins with 20 random training points, 100 test points and the
rest as a pool; the point of the largest predictive variance, or a random one, is added nine times,
and the networks begin anew each time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, cast

import torch
from torch import Tensor

from acktr.report.tables import markdown as table
from scripts import campaign
from scripts.bayes import hmc
from scripts.bayes.data import LARGE, LAYOUT, SMALL, Raw, Splits, read, standardised
from scripts.bayes.methods import METHODS, SHORT, Method, Trained, settings
from scripts.bayes.report import sign_test, with_error
from scripts.bayes.training import Budget, Training
from scripts.campaign import Part, Rows, Tell
from scripts.common import (
    ScriptError,
    check_folder,
    command_line,
    described_machine,
    given_once,
    integer,
    parsed,
    save,
)
from scripts.contest import shown

FIRST, TEST, ADDED, HIDDEN = 20, 100, 9, 10
SAMPLES = 100
_LEAST = FIRST + TEST + ADDED + 1
_NOISE_PRIOR = (6.0, 6.0)
_HMC = "hmc"
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


class Fits:
    """Trains networks of ten units by one method, on all their points at each step.

    Args:
        method: It.
        epochs: Steps of a training.
        tell: Takes how many steps there were in all.
    """

    def __init__(self, method: Method, epochs: int, tell: Tell) -> None:
        self._method, self._epochs, self._tell = method, epochs, tell
        self._steps = 0

    def __call__(self, splits: Splits, seed: int) -> Trained:
        """Networks for all splits."""
        budget = Budget(self._epochs, splits.data_size, HIDDEN, _NOISE_PRIOR, seed)
        training = Training(self._method, splits, budget, SHORT)
        for _ in range(self._epochs):
            training.epoch()
            self._steps += 1
            self._tell(self._steps)
        return training.networks


def acquire(fit: Fits, raw: Raw, begin: tuple[Tensor, Tensor, Tensor], *, active: bool) -> Tensor:
    """RMSE (S,) in the target's units after nine points were added."""
    train, test, pool = begin
    generator = torch.Generator().manual_seed(1)
    for added in range(ADDED):
        if active:
            both = standardised("", raw, train, pool, known=True)
            merit = fit(both, added).predict(both.x_test, SAMPLES).var(0).T
        else:
            merit = torch.rand(pool.shape, generator=generator)
        best = merit.argmax(1, keepdim=True)
        train = torch.cat([train, pool.gather(1, best)], 1)
        left = torch.ones_like(pool, dtype=torch.bool).scatter(1, best, False)
        pool = pool[left].view(len(pool), -1)
    splits = standardised("", raw, train, test, known=True)
    return error(splits, fit(splits, ADDED).predict(splits.x_test, SAMPLES))


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


class Study:
    """All repeats on one set.

    Args:
        asked: Options of the command line.
        name: Of the set.
        raw: It.
    """

    def __init__(self, asked: argparse.Namespace, name: str, raw: Raw) -> None:
        self.asked, self.name, self._raw = asked, name, raw
        self._begin = beginnings(raw, asked.repeats, asked.seed)
        self._first = standardised(name, raw, self._begin[0], self._begin[1], known=True)
        self._known: tuple[Tensor, Tensor] | None = None

    def part(self, name: str) -> Part:
        """A file for a method, or for HMC, with a row per repeat."""
        hmc, epochs = name == _HMC, self.asked.epochs
        method = cast(Method, name)
        options = {key: getattr(self.asked, key) for key in ("repeats", "epochs", "hmc", "seed")}
        known = {"set": self.name, "method": name, "data": self._first.digest, **options}
        own = {} if hmc else settings(method, SHORT)
        return Part(
            label=f"{self.name} {name}",
            path=self.asked.out / "runs" / f"{self.name}-{name}.csv",
            identity=json.dumps({**known, "settings": own}),
            columns=_ROW[2:],
            size=epochs if hmc else 12 * epochs,
            make=self._twice if hmc else partial(self._of, method),
        )

    def _drawn(self, seed: int) -> tuple[Tensor, Tensor]:
        counts = {"warmup": self.asked.hmc // 2, "samples": self.asked.hmc}
        return hmc_outputs(self._first, seed=seed, **counts)

    def _truth(self) -> tuple[Tensor, Tensor]:
        """HMC's outputs and acceptance, drawn when they are asked for first."""
        if self._known is None:
            self._known = self._drawn(self.asked.seed)
        return self._known

    def _twice(self, tell: Tell) -> tuple[Rows, str]:
        """HMC, and how well a second run of it agrees."""
        drawn, accepted = self._truth()
        tell(self.asked.epochs / 2)
        again, _ = self._drawn(self.asked.seed + 1)
        repeated = correlations(again.var(0), drawn.var(0))
        errors = error(self._first, drawn).tolist()
        rows = [
            [s, e, math.nan, math.nan, r]
            for s, (e, r) in enumerate(zip(errors, repeated, strict=True))
        ]
        said = f"acceptance {accepted.min():.2f} to {accepted.max():.2f}"
        return rows, f"{said}, correlation of two runs {fmean(repeated):.3f}"

    def _of(self, method: Method, tell: Tell) -> tuple[Rows, str]:
        """A method: with the first points, with random ones added, and with chosen ones."""
        fit, first = Fits(method, self.asked.epochs, tell), self._first
        outputs = fit(first, self.asked.seed).predict(first.x_test, 10 * SAMPLES)
        near = correlations(outputs.var(0), self._truth()[0].var(0))
        drawn, chosen = (
            acquire(fit, self._raw, self._begin, active=active).tolist() for active in (False, True)
        )
        columns = (range(len(near)), error(first, outputs).tolist(), drawn, chosen, near)
        rows = [list(row) for row in zip(*columns, strict=True)]
        return rows, f"random {fmean(drawn):.2f}, active {fmean(chosen):.2f}"


def work(argv: Sequence[str]) -> int:
    """Run the command line of ``active``; returns the exit code."""
    asked = options(argv)
    check_folder(asked.out)
    torch.set_num_threads(1)
    sets = {name: read(asked.data, name) for name in asked.sets}
    for name, raw in sets.items():
        if len(raw.y) < _LEAST:
            raise ScriptError(f"{name} has {len(raw.y)} rows; {_LEAST} are needed")
    studies = {name: Study(asked, name, raw) for name, raw in sets.items()}
    keys = [(name, method) for name in sets for method in (*asked.methods, _HMC)]
    found = campaign.run("bayes active", [studies[name].part(method) for name, method in keys])
    results = [
        Result(*key, int(repeat), *values)
        for key, rows in zip(keys, found, strict=True)
        for repeat, *values in rows
    ]
    text = _markdown(results, command_line("bayes", ["active", *shown(argv)]), asked)
    save(asked.out, {"summary.md": text.encode()})
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
