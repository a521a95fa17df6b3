"""Which rank decomposes which factor."""

from __future__ import annotations

from collections.abc import Sequence

WORTH = 2e8
"""Sum of n^3 from which another owner gains more than a message costs: some ten milliseconds."""


def cost(shape: Sequence[int]) -> float:
    """Relative time to decompose a factor: k n^3 of ([k,] n, n), 0 of a diagonal (n,)."""
    if len(shape) < 2:
        return 0.0
    stack = shape[0] if len(shape) > 2 else 1
    return float(stack) * float(shape[-1]) ** 3


def owners(costs: Sequence[float], size: int) -> list[int]:
    """The owner of every task, longest processing time first.

    The largest task goes to the rank with the least work so far, and so on; ties go to the first
    task and the first rank. The longest work is at most 4/3 - 1/(3 size) times the shortest
    possible (Graham 1969).

    Args:
        costs: Time of every task.
        size: Number of ranks.
    """
    work, found = [0.0] * size, [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        found[task] = min(range(size), key=lambda rank: work[rank])
        work[found[task]] += costs[task]
    return found


def worthwhile(costs: Sequence[float], size: int) -> int:
    """How many of the ranks are to own tasks: where all are small, one decomposes for all."""
    return min(size, max(1, int(sum(costs) // WORTH)))
