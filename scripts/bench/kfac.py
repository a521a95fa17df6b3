"""What a K-FAC update costs beside one of SGD: a small convolutional network, random images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acktr.kfac import KFAC
from scripts.bench.cases import Case, Timing
from scripts.supervised.problems import Dataset, Problem, batches, make_problem
from scripts.supervised.settings import RECIPES, Curvature
from scripts.supervised.training import Stepper

_SEED = 0
_CLASSES = 10
_BATCHES = 10
"""Batches that there are images for."""


def measure_kfac(case: Case, timing: Timing) -> dict[str, Any]:
    """Time the optimizers in turn, blocks of one as long as blocks of the other in updates.

    A block of K-FAC takes about ``timing.seconds``, as far as a first short measurement tells.

    Returns:
        The measurement of :func:`compare` as ``overhead``.
    """
    batch, period = case.settings["batch"], case.settings["refresh_every"]
    problem = make_problem("convnet", _images(case.settings["size"], batch), ())
    curvature = Curvature(case.settings["statistics_part"], refresh_every=period)
    first = compare(problem, batch, curvature, 1, period, period)
    each = first["contestants"]["kfac"]["milliseconds"] / 1000
    updates = period * max(1, round(timing.seconds / (period * each)))
    warm_up = max(timing.warm_up_updates, round(timing.warm_up / each))
    return {"overhead": compare(problem, batch, curvature, timing.windows, updates, warm_up)}


def _images(size: int, batch: int) -> Dataset:
    """Random images and labels; what a step costs does not depend on what they show."""
    count = _BATCHES * batch
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    labels = np.arange(count) % _CLASSES
    return Dataset("random", pixels, labels, pixels[:batch], labels[:batch])


def compare(
    problem: Problem,
    batch: int,
    curvature: Curvature,
    blocks: int,
    block_updates: int,
    warm_up: int,
) -> dict[str, Any]:
    """Time SGD, K-FAC, and K-FAC with statistics only before a refresh, in alternating blocks.

    Args:
        problem: Network and data.
        batch: Images per update.
        curvature: When statistics and inverses are renewed.
        blocks: Blocks of each contestant.
        block_updates: Updates per block, a multiple of the refresh period.
        warm_up: Updates of each contestant before the first block.

    Returns:
        Per contestant the median milliseconds per update, the median ratio to the SGD block beside
        it, and the mean milliseconds of its parts.
    """
    rare = replace(curvature, statistics_every=curvature.refresh_every)
    steppers = {
        "sgd": _stepper("sgd", problem, curvature),
        "kfac": _stepper("kfac", problem, curvature),
        f"kfac, statistics every {rare.statistics_every}": _stepper("kfac", problem, rare),
    }
    stream = batches(len(problem.train), batch, _SEED)

    warm = {}
    for name, step in steppers.items():
        _seconds_per_update(step, problem, stream, warm_up)
        warm[name] = _inside(step)
    spent: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(blocks):
        for name, step in steppers.items():
            seconds = _seconds_per_update(step, problem, stream, block_updates)
            spent[name].append(seconds)
    inside = {
        name: {
            part: (end - warm[name][part]) / (blocks * block_updates)
            for part, end in _inside(step).items()
        }
        for name, step in steppers.items()
    }
    return {
        "batch": batch,
        "blocks": blocks,
        "block_updates": block_updates,
        "warm_up": warm_up,
        "statistics_part": curvature.statistics_part,
        "refresh_every": curvature.refresh_every,
        "contestants": {
            name: _result(spent[name], spent["sgd"], inside[name]) for name in steppers
        },
    }


def _seconds_per_update(
    step: Stepper, problem: Problem, stream: Iterator[Tensor], updates: int
) -> float:
    """Mean wall-clock seconds of updates on the next batches of the stream."""
    started = time.perf_counter()
    for _ in range(updates):
        step(*problem.batch(problem.train, next(stream)))
    return (time.perf_counter() - started) / updates


def _stepper(name: str, problem: Problem, curvature: Curvature) -> Stepper:
    torch.manual_seed(_SEED)
    setting = RECIPES["convnet"][name].grid[0]
    return Stepper(name, problem, problem.network(), setting, curvature, _SEED)


def _inside(step: Stepper) -> dict[str, float]:
    """Seconds inside of K-FAC so far, by part, as its own clocks say."""
    optimizer = step.optimizer
    return dict(optimizer.curvature.seconds) if isinstance(optimizer, KFAC) else {}


def _result(
    blocks: Sequence[float], sgd: Sequence[float], inside: Mapping[str, float]
) -> dict[str, Any]:
    """Milliseconds per update; parts are those of K-FAC's own clocks, and the rest."""
    parts = {name: 1000 * seconds for name, seconds in inside.items()}
    parts["rest"] = 1000 * statistics.fmean(blocks) - sum(parts.values())
    ratios = [mine / other for mine, other in zip(blocks, sgd, strict=True)]
    return {
        "milliseconds": round(1000 * statistics.median(blocks), 4),
        "ratio_to_sgd": round(statistics.median(ratios), 4),
        "parts": {part: round(value, 4) for part, value in parts.items()},
    }
