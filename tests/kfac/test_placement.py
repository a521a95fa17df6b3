"""Who decomposes what: every factor once, and the longest work near the shortest possible."""

from __future__ import annotations

import itertools
import random

import pytest

from acktr.kfac.placement import WORTH, cost, owners, worthwhile

ATARI = [(257,), (32, 32), (513, 513), (64, 64), (577, 577), (32, 32), (1569, 1569), (512, 512)]
AUTOENCODER = [784, 1000, 1001, 500, 501, 250, 251, 30, 31, 250, 251, 500, 501, 1000, 1001, 784]


def longest(costs: list[float], whose: list[int], size: int) -> float:
    work = [0.0] * size
    for task, owner in zip(costs, whose, strict=True):
        work[owner] += task
    return max(work)


def test_costs() -> None:
    assert cost((5,)) == 0
    assert cost((4, 4)) == 64
    assert cost((3, 4, 4)) == 192


@pytest.mark.parametrize("size", range(1, 65))
def test_every_task_has_one_owner(size: int) -> None:
    costs = [float(n**3) for n in AUTOENCODER]
    whose = owners(costs, size)
    assert len(whose) == len(costs) and all(0 <= owner < size for owner in whose)
    assert whose == owners(costs, size)
    ideal = max(sum(costs) / size, *costs)
    assert longest(costs, whose, size) <= (4 / 3) * 2 * ideal


@pytest.mark.parametrize("seed", range(20))
def test_longest_work_is_within_graham_s_bound_of_the_best(seed: int) -> None:
    source = random.Random(seed)
    count, size = source.randint(1, 7), source.randint(1, 3)
    costs = [float(source.randint(0, 30)) for _ in range(count)]
    every = itertools.product(range(size), repeat=count)
    best = min(longest(costs, list(whose), size) for whose in every)
    found = longest(costs, owners(costs, size), size)
    assert found <= (4 / 3 - 1 / (3 * size)) * best + 1e-9


def test_one_large_factor_leaves_nothing_to_share() -> None:
    costs = [cost(shape) for shape in ATARI]
    for size in (2, 4, 8):
        assert longest(costs, owners(costs, size), size) == 1569**3
    costs = [float(n**3) for n in AUTOENCODER]
    gains = [sum(costs) / longest(costs, owners(costs, size), size) for size in (2, 4, 8)]
    assert gains == pytest.approx([2.0, 3.7, 5.5], abs=0.1)  # as computed before it was built


def test_small_work_has_one_owner() -> None:
    assert worthwhile([], 8) == worthwhile([1e6] * 5, 8) == 1
    assert worthwhile([WORTH] * 3, 8) == 3
    assert worthwhile([WORTH] * 30, 8) == 8
