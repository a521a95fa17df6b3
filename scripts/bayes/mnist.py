"""Classifiers of digits: accuracy, calibration, and what they say of rotated digits."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from acktr.report.figures import COLOURS, bare, legend_below, panels, picture
from acktr.report.tables import markdown as table
from scripts import campaign
from scripts.bayes.classifiers import (
    ADAM_LR,
    CLASSIFIERS,
    IVON,
    NOISY,
    SAMPLES,
    Batches,
    Classifier,
    settings,
    shuffled,
    train,
)
from scripts.bayes.report import with_error
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
from scripts.supervised.problems import Dataset, load

WIDTH, BATCH, BINS = 200, 100, 15
ANGLES = (0, 15, 30, 45, 60, 90)


class Row(NamedTuple):
    """A classifier on the test images turned by an angle."""

    angle: float
    """Degrees."""
    accuracy: float
    nll: float
    """Nats."""
    ece: float
    """Expected calibration error."""
    entropy: float
    """Of the predicted distribution, mean over images, nats."""


def calibration_error(p: Tensor, y: Tensor) -> float:
    """Mean of |accuracy - confidence| over equal bins of confidence, weighted by their counts."""
    confidence, said = p.max(1)
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    gap = (said == y).double() - confidence.double()
    sums = torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, gap)
    return float(sums.abs().sum() / len(y))


def turned(images: Tensor, angle: float) -> Tensor:
    """Images (N, H, W, C) turned by an angle in degrees, black outside."""
    a = math.radians(angle)
    matrix = torch.tensor([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0]])
    x = images.permute(0, 3, 1, 2)
    grid = functional.affine_grid(matrix.expand(len(x), -1, -1), list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, align_corners=False).permute(0, 2, 3, 1)


def measured(p: Tensor, y: Tensor, angle: float) -> Row:
    """What class probabilities are worth."""
    logs = p.clamp(min=1e-30).log()
    accuracy = float((p.argmax(1) == y).double().mean())
    nll = -float(logs.gather(1, y[:, None]).mean())
    return Row(angle, accuracy, nll, calibration_error(p, y), -float((p * logs).sum(1).mean()))


class Data(NamedTuple):
    """Images as the networks take them."""

    x: Tensor
    """Training images (N, D) in [0, 1]."""
    y: Tensor
    """Labels."""
    images: Tensor
    """Test images (M, H, W, C)."""
    labels: Tensor
    """Their labels."""


def prepared(images: Dataset, count: int) -> Data:
    """The first images of the training set, and all of the test set.

    Raises:
        ScriptError: There are fewer.
    """
    if not BATCH <= count <= len(images.x_train):
        most = len(images.x_train)
        raise ScriptError(f"argument --images: needs an integer in [{BATCH}, {most}], got {count}")
    x = torch.from_numpy(images.x_train[:count]).flatten(1) / 255
    y = torch.from_numpy(images.y_train[:count])
    return Data(x, y, torch.from_numpy(images.x_test) / 255, torch.from_numpy(images.y_test))


def part(name: Classifier, seed: int, data: Data, epochs: int, about: str, out: Path) -> Part:
    """A classifier of one seed: a file with a row per angle."""

    def make(tell: Tell) -> tuple[Rows, str]:
        torch.manual_seed(seed)
        inputs, classes = data.x.shape[1], int(data.y.max()) + 1
        first = (nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        model = nn.Sequential(*first, nn.Linear(WIDTH, classes))

        def batches() -> Batches:
            for step, batch in enumerate(shuffled((data.x, data.y), BATCH, epochs, seed)):
                tell(step)
                yield batch

        predict = train(name, model, batches(), (data.x, data.y), seed)
        rows = [
            measured(predict(turned(data.images, angle).flatten(1)), data.labels, angle)
            for angle in ANGLES
        ]
        note = f"accuracy {rows[0].accuracy:.4f}, NLL {rows[0].nll:.4f}, ECE {rows[0].ece:.4f}"
        return [list(row) for row in rows], note

    known = {
        "method": name,
        "seed": seed,
        "data": about,
        "images": len(data.y),
        "epochs": epochs,
        "settings": settings(name),
    }
    return Part(
        label=f"{name} seed {seed}",
        path=out / "runs" / f"{name}-seed{seed}.csv",
        identity=json.dumps(known),
        columns=Row._fields,
        size=epochs * (len(data.y) // BATCH),
        make=make,
    )


Found = Mapping[tuple[Classifier, int], Sequence[Row]]


def work(argv: Sequence[str]) -> int:
    """Run the command line of ``mnist``; returns the exit code."""
    asked = options(argv)
    check_folder(asked.out)
    torch.set_num_threads(1)
    images = load(asked.data, "autoencoder")
    data = prepared(images, asked.images or min(10_000, len(images.x_train)))
    keys = [(name, seed) for seed in asked.seeds for name in asked.methods]
    digest = images.digest()
    parts = [part(name, seed, data, asked.epochs, digest, asked.out) for name, seed in keys]
    rows = campaign.run("bayes mnist", parts)
    found = {key: [Row(*row) for row in of] for key, of in zip(keys, rows, strict=True)}
    about = f"{images.name}: {len(data.y):,} training images, {asked.epochs} epochs"
    text = _markdown(found, command_line("bayes", ["mnist", *shown(argv)]), about)
    save(asked.out, {"summary.md": text.encode(), "figure.png": _figure(found)})
    sys.stdout.write(text)
    return 0


def _markdown(found: Found, command: str, about: str) -> str:
    methods = list(dict.fromkeys(name for name, _ in found))
    body, shifted = [], []
    for name in methods:
        rows = [of for (method, _), of in found.items() if method == name]
        columns = [[of[0][i] for of in rows] for i in range(1, len(Row._fields))]
        body.append([name, *(with_error(column, 4) for column in columns)])
        angles = [[of[i].entropy for of in rows] for i in range(len(ANGLES))]
        shifted.append([name, *(f"{fmean(column):.3f}" for column in angles)])
    return "\n".join(
        [
            "# Classifiers of digits\n",
            f"Command: `{command}`\n",
            f"{about}, batch {BATCH}, two hidden layers of {WIDTH} ReLU, prior N(0, 1),"
            f" {SAMPLES} weight samples in the test, probabilities averaged, ECE with {BINS} bins;"
            " ± is the standard error over seeds.\n",
            f"Untuned: Adam {ADAM_LR:g}; K-FAC as it comes; IVON"
            f" {', '.join(f'{k} {v:g}' for k, v in IVON.items())}; laplace: of the last layer, full"
            f" Fisher matrix, after Adam. Noisy K-FAC: lr {NOISY.lr:g}, external damping"
            f" {NOISY.external_damping:g}, the best of some ten on one seed, chosen by the test"
            " images; KL weight 1 or 0.1.\n",
            table(["method", "accuracy", "NLL", "ECE", "entropy"], body),
            "Entropy of predictions on turned images, nats:\n",
            table(["method", *(f"{angle}°" for angle in ANGLES)], shifted),
            described_machine(),
        ]
    )


def _figure(found: Found) -> bytes:
    drawn, axes, _ = panels(3, 3)
    for axis, name in zip(axes, ("nll", "ece", "entropy"), strict=True):
        for method in dict.fromkeys(method for method, _ in found):
            rows = [of for (one, _), of in found.items() if one == method]
            values = [fmean(getattr(of[i], name) for of in rows) for i in range(len(ANGLES))]
            colour = COLOURS[CLASSIFIERS.index(method)]
            axis.plot(ANGLES, values, marker=".", color=colour, label=method)
        axis.set_xlabel("turned by, degrees")
        axis.set_ylabel({"nll": "NLL, nats", "ece": "ECE", "entropy": "entropy, nats"}[name])
        bare(axis)
    legend_below(drawn, axes[0].get_lines())
    return picture(drawn, "png")


def options(argv: Sequence[str]) -> argparse.Namespace:
    """Options of a command line; help is printed and ends in SystemExit.

    Raises:
        ScriptError: One line that says what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bayes mnist", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    what = ".npz with x_train, y_train, x_test, y_test; without it a small built-in set is used"
    add("--data", type=Path, metavar="FILE", help=what)
    add("--out", type=Path, required=True, help="folder of the results")
    usual = list(CLASSIFIERS)
    add("--methods", nargs="+", choices=CLASSIFIERS, default=usual, metavar="METHOD")
    add("--seeds", nargs="+", type=integer(0, 2**31), default=[0, 1, 2], metavar="SEED")
    add("--images", type=integer(1), help="of training; default 10,000, or all")
    add("--epochs", type=integer(1, 10**6), default=10)
    asked = parsed(parser, argv)
    given_once(asked, "methods", "seeds")
    return asked
