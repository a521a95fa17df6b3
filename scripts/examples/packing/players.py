"""Players that do not learn: the measures for those that do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from scripts.examples.packing.environments import Packing
from scripts.examples.packing.geometry import wasted

Player = Callable[[Packing[Any]], int]
"""Chooses an allowed action."""


def random_allowed(seed: int) -> Player:
    """Chooses evenly among the allowed actions."""
    generator = np.random.default_rng(seed)
    return lambda env: int(generator.choice(np.flatnonzero(env.allowed)))


def first_allowed(env: Packing[Any]) -> int:
    """Chooses the first allowed action, as does the argmax of a policy that knows nothing.

    On a heightmap that is the cell nearest to the origin along x, then along y; candidates come in
    the order of :func:`deepest_bottom_left`.
    """
    return int(env.allowed.argmax())


def deepest_bottom_left(env: Packing[Any]) -> int:
    """Chooses the lowest landing, then the one nearest to the origin along x, then along y."""
    return _least(env, lambda box: (box[2], box[0], box[1]))


def least_waste(env: Packing[Any]) -> int:
    """Chooses the placement that shuts in the fewest empty cells, then the lowest top."""

    def cost(box: tuple[int, ...]) -> tuple[int, ...]:
        return wasted(env.heights, np.array(box)), box[2] + box[5], box[0], box[1]

    return _least(env, cost)


def _least(env: Packing[Any], cost: Callable[[tuple[int, ...]], tuple[int, ...]]) -> int:
    actions = np.flatnonzero(env.allowed).tolist()
    return int(min(actions, key=lambda action: cost(env.placement(action))))


def play(
    env: Packing[Any], player: Player, episodes: int, seed: int
) -> tuple[list[float], list[int]]:
    """Utilisation and number of placed items of each of this many episodes."""
    ratios, counters = [], []
    env.reset(seed=seed)
    for _ in range(episodes):
        ended = False
        while not ended:
            _, _, ended, _, info = env.step(player(env))
        ratios.append(float(info["ratio"]))
        counters.append(int(info["counter"]))
        env.reset()
    return ratios, counters
