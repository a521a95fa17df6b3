"""The variational bound by epochs and seconds, for several seeds at once on one split."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from acktr.kfac import BayesByBackprop, NoisyKFAC
from acktr.report.figures import COLOURS, bare, legend_below, panels, picture
from acktr.report.tables import markdown as table
from scripts import campaign
from scripts.bayes.data import LARGE, LAYOUT, SMALL, Raw, Splits, read, standardised
from scripts.bayes.methods import METHODS, Method, settings
from scripts.bayes.training import Budget, Training
from scripts.campaign import Part, Rows, Tell
from scripts.common import (
    check_folder,
    command_line,
    described_machine,
    given_once,
    integer,
    parsed,
    save,
)
from scripts.contest import shown

SAMPLES = 100
_NOISE_SEED = 1
_WITH_BOUND = tuple(method for method in METHODS if method != "dropout")


class Point(NamedTuple):
    """The bound of one seed after an epoch."""

    method: Method
    seed: int
    epoch: int
    seconds: float
    """Of one processor in training, of all seeds together."""
    elbo: float
    """Nats per datum, in standardised units."""
    log_likelihood: float
    """E_q log p per datum."""
    kl: float
    """Of weights and noise precision from their priors, per datum."""


def divergence(posterior: NoisyKFAC | BayesByBackprop) -> Tensor:
    """KL(q || prior) of each of the S networks whose layers are side by side, (S,), in nats.

    1/2 sum [(Sigma_ii + mu_i^2) / eta - 1 + log eta] - 1/2 log det Sigma, with eta = 1.
    """
    means = dict(posterior.module.named_parameters())
    terms = [
        (std.square() + means[name].detach().square() - 1).double().flatten(1).sum(1)
        for name, std in posterior.posterior_std().items()
    ]
    if isinstance(posterior, BayesByBackprop):
        logs = [2 * std.log().double() for std in posterior.posterior_std().values()]
    else:
        q = posterior.posterior
        known = ((block, q.damping(block.name)) for block in q.prior.sampled)
        logs = [math.log(q.scale) - b.damped(d).double().log() for b, d in known]  # type: ignore[union-attr]
    return 0.5 * (torch.stack(terms).sum(0) - sum(one.flatten(1).sum(1) for one in logs))


@torch.no_grad()
def bound(training: Training) -> tuple[Tensor, Tensor]:
    """E_q log p and KL per datum (S,), on all training data with the same noise at every call."""
    splits, precision, networks = training.splits, training.precision, training.networks
    generator = torch.Generator().manual_seed(_NOISE_SEED)
    outputs = networks.posterior.predict(splits.x_train, SAMPLES, generator)
    errors = (outputs - splits.y_train).square().mean((0, 1))
    fit = 0.5 * (precision.expected_log() - math.log(2 * math.pi) - precision.mean() * errors)
    kl = divergence(networks.posterior) + precision.kl()
    return fit, kl / splits.data_size


def same_split(name: str, raw: Raw, count: int) -> Splits:
    """The first split of a data set, ``count`` times side by side."""
    train, test = (part[:1].expand(count, -1) for part in (raw.train, raw.test))
    return standardised(name, raw, train, test)


def part(method: Method, splits: Splits, epochs: int, out: Path) -> Part:
    """One method: a file of a row per epoch and seed."""
    budget = Budget(epochs, 10, 50, (6.0, 6.0), 0)

    def make(tell: Tell) -> tuple[Rows, str]:
        training, seconds, rows = Training(method, splits, budget), 0.0, Rows()
        for epoch in range(1, epochs + 1):
            start = time.process_time()
            training.epoch()
            seconds += time.process_time() - start
            fit, kl = (part.tolist() for part in bound(training))
            rows += [
                [seed, epoch, seconds, a - b, a, b]
                for seed, (a, b) in enumerate(zip(fit, kl, strict=True))
            ]
            tell(epoch)
        return rows, f"bound {rows[-1][3]:.3f}"

    known = {"set": splits.name, "method": method, "data": splits.digest, "seeds": splits.count}
    return Part(
        label=method,
        path=out / "runs" / f"{method}.csv",
        identity=json.dumps({**known, **asdict(budget), "settings": settings(method)}),
        columns=Point._fields[1:],
        size=epochs,
        make=make,
    )


def work(argv: Sequence[str]) -> int:
    """Run the command line of ``elbo``; returns the exit code."""
    asked = options(argv)
    check_folder(asked.out)
    torch.set_num_threads(1)
    splits = same_split(asked.set, read(asked.data, asked.set), asked.seeds)
    parts = [part(method, splits, asked.epochs, asked.out) for method in asked.methods]
    points = [
        Point(method, int(seed), int(epoch), *values)
        for method, rows in zip(asked.methods, campaign.run("bayes elbo", parts), strict=True)
        for seed, epoch, *values in rows
    ]
    text = _markdown(points, splits, command_line("bayes", ["elbo", *shown(argv)]))
    save(asked.out, {"figure.png": _figure(points, splits.name), "summary.md": text.encode()})
    sys.stdout.write(text)
    return 0


def _markdown(points: Sequence[Point], splits: Splits, command: str) -> str:
    last = max(point.epoch for point in points)
    body = []
    for method in dict.fromkeys(point.method for point in points):
        final = [point for point in points if point.method == method and point.epoch == last]
        cells = ["  ".join(f"{p.elbo:.3f}" for p in final), f"{fmean(p.elbo for p in final):.3f}"]
        cells += [f"{fmean(p.log_likelihood for p in final):.3f}"]
        cells += [f"{fmean(p.kl for p in final):.3f}", f"{final[0].seconds:.1f}"]
        body.append([method, *cells, _reached(points, method)])
    head = [
        "method",
        "bound by seed",
        "mean",
        "E log p",
        "KL",
        "seconds",
        "at bbb's end after",
    ]
    return "\n".join(
        [
            "# The variational bound\n",
            f"Command: `{command}`\n",
            f"{splits.name}, first split, {splits.data_size} training rows, batch 10, {last}"
            " epochs, half of them at a tenth of the step size; nats per datum in standardised"
            f" units, on all training data, {SAMPLES} weight samples with the same noise at every"
            " epoch. Seconds are those of all seeds together.\n",
            table(head, body),
            described_machine(),
        ]
    )


def _reached(points: Sequence[Point], method: Method) -> str:
    """The first epoch at which the mean over seeds is that of bbb at the end."""
    goal = [point for point in points if point.method == "bbb"]
    if not goal or method == "bbb":
        return ""
    end = fmean(p.elbo for p in goal if p.epoch == goal[-1].epoch)
    for epoch in range(1, goal[-1].epoch + 1):
        at = [p for p in points if p.method == method and p.epoch == epoch]
        if fmean(p.elbo for p in at) >= end:
            return f"{epoch} epochs, {at[0].seconds:.1f} s"
    return "never"


def _figure(points: Sequence[Point], name: str) -> bytes:
    drawn, axes, _ = panels(2, 2)
    methods = list(dict.fromkeys(point.method for point in points))
    for axis, title in zip(axes, ("epochs", "seconds of one processor"), strict=True):
        for method in methods:
            for seed in sorted({point.seed for point in points}):
                own = [p for p in points if p.method == method and p.seed == seed]
                x = [p.epoch if title == "epochs" else p.seconds for p in own]
                colour = COLOURS[METHODS.index(method)]
                axis.plot(x, [p.elbo for p in own], color=colour, alpha=0.8, label=method)
        axis.set_xlabel(title)
        axis.set_xscale("log")
        ends = [p.elbo for p in points if p.epoch >= max(1, points[-1].epoch // 20)]
        axis.set_ylim(min(ends) - 0.1, max(ends) + 0.1)
        bare(axis)
    axes[0].set_ylabel("bound, nats per datum")
    lines = {line.get_label(): line for line in axes[0].get_lines()}
    legend_below(drawn, list(lines.values()))
    drawn.suptitle(f"Variational bound on {name}, a line per seed", fontweight="bold")
    return picture(drawn, "png")


def options(argv: Sequence[str]) -> argparse.Namespace:
    """Options of a command line; help is printed and ends in SystemExit.

    Raises:
        ScriptError: One line that says what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bayes elbo", description=__doc__, allow_abbrev=False, epilog=LAYOUT
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="of the sets, see below")
    add("--out", type=Path, required=True, help="folder of the results")
    add("--set", choices=(*SMALL, *LARGE), default="concrete")
    usual = ["bbb", "ffg", "mvg"]
    add("--methods", nargs="+", choices=_WITH_BOUND, default=usual, metavar="METHOD")
    add("--seeds", type=integer(1, 100), default=3, help="how many")
    add("--epochs", type=integer(1, 10**6), default=300)
    asked = parsed(parser, argv)
    given_once(asked, "methods")
    return asked
