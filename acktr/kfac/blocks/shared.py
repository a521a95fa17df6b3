"""Refreshes over ranks: every matrix is decomposed by one of them, which sends the result.

Decompositions that every rank makes for itself need not have the same bits: eigenvectors depend on
the number of threads, on the processor and on the library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from acktr.kfac.blocks.registry import StatBlock
from acktr.kfac.linalg import FactorError, Parts, part_shapes
from acktr.kfac.placement import cost, owners, worthwhile
from acktr.kfac.ranks import Ranks

_FAILED, _CRASHED = 1.0, 2.0


class _Task(NamedTuple):
    """One decomposition, of one matrix or of all those of a block."""

    name: str
    """The block."""
    place: int
    """Number of the matrix; 0 for all of them."""
    matrices: Sequence[Tensor]
    shapes: Sequence[Sequence[int]]
    """Of what it is decomposed into."""
    owner: int = 0


class Exchange:
    """The decompositions of one snapshot, shared out among the ranks.

    Args:
        blocks: The blocks with statistics, by name.
        snapshot: The matrices that each block wants decomposed.
        ranks: Who decomposes.
    """

    def __init__(
        self,
        blocks: Mapping[str, StatBlock],
        snapshot: Mapping[str, Sequence[Tensor]],
        ranks: Ranks,
    ) -> None:
        self._ranks, self._names = ranks, list(snapshot)
        tasks = [task for name in snapshot for task in _tasks(blocks[name], snapshot[name])]
        costs = [sum(cost(matrix.shape) for matrix in task.matrices) for task in tasks]
        # The process that decomposes for the ranks does so for the first one.
        whose = owners(costs, 1 if ranks.helped else worthwhile(costs, ranks.size))
        self._tasks = [task._replace(owner=o) for task, o in zip(tasks, whose, strict=True)]

    def mine(self) -> dict[str, list[Tensor]]:
        """The matrices of this rank, by block."""
        found: dict[str, list[Tensor]] = {}
        for task in self._tasks:
            if task.owner == self._ranks.rank:
                found.setdefault(task.name, []).extend(task.matrices)
        return found

    def share(
        self, results: Mapping[str, Sequence[Parts | FactorError]] | FactorError
    ) -> dict[str, list[Parts | FactorError]]:
        """All decompositions, the same bits on all ranks.

        Args:
            results: Those of :meth:`mine`, or why there are none.

        Raises:
            FactorError: A rank had none.
        """
        shared: dict[str, list[Parts | FactorError]] = {name: [] for name in self._names}
        if not self._tasks:
            return shared
        own = self._own(results)
        device = self._tasks[0].matrices[0].device
        crashed = _CRASHED if isinstance(results, FactorError) else 0.0
        flags = [_FAILED * isinstance(part, FactorError) for part in own]
        said = self._ranks.gather([crashed, *flags], device)
        for rank, (lost, *_) in enumerate(said):
            if lost:
                raise FactorError(f"the refresh failed on rank {rank}") from (
                    results if isinstance(results, FactorError) else None
                )
        failed = [any(row[1 + place] for row in said) for place in range(len(self._tasks))]
        found = self._sent(own, failed)
        for place, task in enumerate(self._tasks):
            mine = own[place]
            error = mine if isinstance(mine, FactorError) else None
            away = FactorError(f"its decomposition failed on rank {task.owner}")
            shared[task.name].append((error or away) if failed[place] else found[place])
        return shared

    def _own(
        self, results: Mapping[str, Sequence[Parts | FactorError]] | FactorError
    ) -> list[Parts | FactorError | None]:
        """The results of this rank's tasks; None for those of others."""
        if isinstance(results, FactorError):
            return [None] * len(self._tasks)
        waiting = {name: iter(parts) for name, parts in results.items()}
        rank = self._ranks.rank
        return [next(waiting[t.name]) if t.owner == rank else None for t in self._tasks]

    def _sent(
        self, own: Sequence[Parts | FactorError | None], failed: Sequence[bool]
    ) -> dict[int, Parts]:
        """What did not fail, from its owners."""
        found: dict[int, Parts] = {}
        for owner in sorted({task.owner for task in self._tasks}):
            places = [i for i, t in enumerate(self._tasks) if t.owner == owner and not failed[i]]
            tensors: list[Tensor] = []
            for place in places:
                given, task = own[place], self._tasks[place]
                if given is None or isinstance(given, FactorError):
                    like = task.matrices[0]
                    given = tuple(like.new_empty(tuple(shape)) for shape in task.shapes)
                tensors.extend(given)
            if not tensors:
                continue
            received = iter(self._ranks.broadcast(tensors, owner))
            for place in places:
                found[place] = tuple(next(received) for _ in self._tasks[place].shapes)
        return found


def _tasks(block: StatBlock, matrices: Sequence[Tensor]) -> list[_Task]:
    if block.method is None:
        return [_Task(block.name, 0, matrices, block.shapes())] if matrices else []
    return [
        _Task(block.name, place, [matrix], part_shapes(matrix, block.method))
        for place, matrix in enumerate(matrices)
    ]
