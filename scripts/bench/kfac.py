"""What a K-FAC update costs beside one of SGD: a small convolutional network, random images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acktr.kfac import KFAC
from scripts.bench.cases import Case, Timing
from scripts.supervised.problems import Dataset, Problem, batches, make_problem
from scripts.supervised.settings import RECIPES
from scripts.supervised.training import Curvature, Stepper

_SEED = 0
_CLASSES = 10
_BATCHES = 10
"""Batches that there are images for."""


@dataclass
class _Contestant:
    """An optimizer and what its updates took."""

    step: Stepper
    blocks: list[float] = field(default_factory=list)
    """Seconds per update of each block."""
    warm: dict[str, float] = field(default_factory=dict)
    """What :meth:`inside` gave after warm-up."""

    def inside(self) -> dict[str, float]:
        """Seconds inside of K-FAC so far, by part, as its own clocks say."""
        optimizer = self.step.optimizer
        return dict(optimizer.curvature.seconds) if isinstance(optimizer, KFAC) else {}

    def run(self, problem: Problem, stream: Iterator[Tensor], updates: int) -> float:
        """Make some updates and return the seconds per update."""
        started = time.perf_counter()
        for _ in range(updates):
            self.step(*problem.batch(problem.train, next(stream)))
        return (time.perf_counter() - started) / updates


def measure_kfac(case: Case, timing: Timing) -> dict[str, Any]:
    """Time the optimizers in turn, blocks of one as long as blocks of the other in updates.

    A block of K-FAC takes about ``timing.seconds``, as far as a first short measurement tells.

    Returns:
        The measurement of :func:`compare` as ``overhead``.
    """
    batch, period = case.settings["batch"], case.settings["refresh_every"]
    images = _images(case.settings["size"], batch)
    problem = make_problem("convnet", images, (), torch.device("cpu"))
    part = case.settings["statistics_part"]
    curvature = Curvature(statistics_part=part, statistics_every=1, refresh_every=period)
    first = compare(problem, batch, curvature, 1, period, period)
    each = first["contestants"]["kfac"]["milliseconds"] / 1000
    periods = max(1, round(timing.seconds / (period * each)))
    warm_up = max(timing.warm_up_updates, round(timing.warm_up / each))
    return {
        "overhead": compare(problem, batch, curvature, timing.windows, periods * period, warm_up)
    }


def _images(size: int, batch: int) -> Dataset:
    """Random images and labels; what a step costs does not depend on what they show."""
    random = np.random.default_rng(0)
    count = _BATCHES * batch
    pixels = random.integers(0, 256, (count, size, size, 3), np.uint8)
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
    contestants = {
        "sgd": _contestant("sgd", problem, curvature),
        "kfac": _contestant("kfac", problem, curvature),
        f"kfac, statistics every {rare.statistics_every}": _contestant("kfac", problem, rare),
    }
    stream = batches(len(problem.train), batch, _SEED)
    for contestant in contestants.values():
        contestant.run(problem, stream, warm_up)
        contestant.warm = contestant.inside()
    for _ in range(blocks):
        for contestant in contestants.values():
            contestant.blocks.append(contestant.run(problem, stream, block_updates))
    baseline = contestants["sgd"].blocks
    return {
        "batch": batch,
        "blocks": blocks,
        "block_updates": block_updates,
        "warm_up": warm_up,
        "statistics_part": curvature.statistics_part,
        "refresh_every": curvature.refresh_every,
        "contestants": {
            name: _result(contestant, baseline, blocks * block_updates)
            for name, contestant in contestants.items()
        },
    }


def _contestant(name: str, problem: Problem, curvature: Curvature) -> _Contestant:
    torch.manual_seed(_SEED)
    setting = RECIPES["convnet"][name].grid[0]
    return _Contestant(Stepper(name, problem, problem.network(), setting, curvature, _SEED))


def _result(contestant: _Contestant, baseline: Sequence[float], updates: int) -> dict[str, Any]:
    """Milliseconds per update; parts are those of K-FAC's own clocks, and the rest."""
    spent = {name: end - contestant.warm[name] for name, end in contestant.inside().items()}
    parts = {name: 1000 * seconds / updates for name, seconds in spent.items()}
    parts["rest"] = 1000 * statistics.fmean(contestant.blocks) - sum(parts.values())
    ratios = [mine / sgd for mine, sgd in zip(contestant.blocks, baseline, strict=True)]
    return {
        "milliseconds": round(1000 * statistics.median(contestant.blocks), 4),
        "ratio_to_sgd": round(statistics.median(ratios), 4),
        "parts": {part: round(value, 4) for part, value in parts.items()},
    }
