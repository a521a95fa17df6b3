"""K-FAC beside SGD on a small convolutional network and random images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from scripts.bench.cases import Case, Timing
from scripts.supervised import overhead
from scripts.supervised.data import Dataset
from scripts.supervised.problems import make_problem
from scripts.supervised.settings import RECIPES
from scripts.supervised.steppers import Curvature

_CLASSES = 10
_BATCHES = 10
"""Batches that there are images for."""


def images(size: int, batch: int) -> Dataset:
    """Random images and labels; what a step costs does not depend on what they show."""
    random = np.random.default_rng(0)
    count = _BATCHES * batch
    pixels = random.integers(0, 256, (count, size, size, 3), np.uint8)
    labels = np.arange(count) % _CLASSES
    return Dataset("random", pixels, labels, pixels[:batch], labels[:batch])


def measure_supervised(case: Case, timing: Timing) -> dict[str, Any]:
    """Time both optimizers in turn, blocks of one as long as blocks of the other in updates.

    A block of K-FAC takes about ``timing.seconds``, as far as a first short measurement tells.

    Returns:
        The measurement of :func:`scripts.supervised.overhead.measure` as ``overhead``.
    """
    batch = case.settings["batch"]
    data = images(case.settings["size"], batch)
    problem = make_problem("convnet", data, (), torch.device("cpu"))
    curvature = Curvature(
        statistics_part=case.settings["statistics_part"],
        statistics_every=1,
        refresh_every=case.settings["refresh_every"],
    )
    recipes = RECIPES["convnet"]
    chosen = {name: recipes[name].grid[0] for name in ("sgd", "kfac")}
    period = curvature.refresh_every

    def measure(blocks: int, block_updates: int, warm_up: int) -> dict[str, Any]:
        return overhead.measure(
            problem,
            batch=batch,
            curvature=curvature,
            settings=chosen,
            blocks=blocks,
            block_updates=block_updates,
            warm_up=warm_up,
        )

    first = measure(1, period, period)
    each = first["contestants"]["kfac"]["milliseconds"] / 1000
    periods = max(1, round(timing.seconds / (period * each)))
    warm_up = max(timing.warm_up_updates, round(timing.warm_up / each))
    return {"overhead": measure(timing.windows, periods * period, warm_up)}
