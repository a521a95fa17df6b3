"""Products with the exact Fisher of a batch whose samples are shared out among ranks.

Every rank measures its own samples; the forms of a mean over Z terms are sum_r Z_r / Z form_r. What
one rank cannot measure none does, so that all of them go on alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from acktr.kfac.fisher.extent import Estimate, Forms, Sizes, next_sparsest, of_all, stride
from acktr.kfac.fisher.observed import Observed
from acktr.kfac.fisher.products import Vector
from acktr.kfac.ranks import Ranks
from acktr.kfac.tensors import accumulation_type

Measured = tuple[Tensor, Sizes]
"""Forms or divergences (parts, ...) of this rank, and its sizes."""

_DONE, _UNKNOWN, _FAILED = 0.0, 1.0, 2.0


class Share(NamedTuple):
    """Which samples of a batch stand for all of them in an estimate."""

    terms: int
    """Terms of the loss of all ranks."""
    alone: bool
    """Whether every sample gives alone what it gives in the batch."""
    single: bool
    """Whether no rank's batch is in micro-batches."""
    before: int
    """Samples of the ranks before this one."""
    samples: int
    """Samples of all ranks."""
    followed: bool
    """Whether all ranks have the graph of their pass."""

    @classmethod
    def of(cls, ranks: Ranks, observed: Observed, place: torch.device) -> Share:
        """What all ranks together have."""
        # Rows without terms are samples too, as they are in one process.
        extent = observed.extent if observed.count else (0, 0)
        alone, single = extent is not None, not observed.earlier
        followed = observed.empty or observed.followed is not None
        here = [float(alone), *(extent or (0, 0)), float(followed), float(single)]
        rows = ranks.gather(here, place)
        count, terms = (int(sum(row[place] for row in rows)) for place in (1, 2))
        before = int(sum(row[1] for row in rows[: ranks.rank]))
        alone, followed, single = (all(row[place] for row in rows) for place in (0, 3, 4))
        return cls(terms, count > 0 and alone, single, before, count, followed)

    @property
    def divisible(self) -> bool:
        """Whether a part of the samples can be taken."""
        return self.alone and self.single

    def rows(self, turn: int, mine: int, sparsest: int) -> range:
        """Those of this rank's rows, so many in all, that the estimate of a step takes.

        They are each k-th one of the ranks' batches, one after another.
        """
        every = stride(self.samples, self.terms, sparsest)
        first = turn % min(every, self.samples)
        return range((first - self.before) % every, mine, every)


class JoinedFisher:
    """The exact Fisher of a batch of all ranks, as :class:`Observed` has that of one process.

    All ranks must call the same methods in the same order.

    Args:
        ranks: Who has the other shares.
        place: Device of the messages.
        observed: The pass on this rank's share.
    """

    def __init__(self, ranks: Ranks, place: torch.device, observed: Observed) -> None:
        self._ranks, self._place, self._observed = ranks, place, observed

    def _share(self) -> Share:
        return Share.of(self._ranks, self._observed, self._place)

    @property
    def estimable(self) -> bool:
        """As :attr:`Observed.estimable`, on all ranks."""
        share = self._share()
        return share.alone and share.followed

    def grams(self, module: nn.Module, vectors: Sequence[Vector]) -> Tensor:
        """As :meth:`Observed.grams`, of all samples of all ranks."""
        observed = self._observed
        shape = (len(observed.weights), len(vectors), len(vectors))
        sizes = observed.totals()

        def measure() -> Measured:
            return observed.grams(module, vectors), sizes

        found = self._mean(None if observed.empty else measure, shape, sizes, vectors)
        if found is None:
            raise ValueError("no rank has terms to measure the exact Fisher with")
        return found

    def estimated_grams(
        self, module: nn.Module, vectors: Sequence[Vector], turn: int, sparsest: int
    ) -> Estimate | None:
        """As :meth:`Observed.estimated_grams`: every k-th sample of all ranks' together."""
        observed, share = self._observed, self._share()
        if not share.divisible:
            return Estimate(self.grams(module, vectors), 1)
        rows = share.rows(turn, observed.count, sparsest)
        none = [None if size is None else 0.0 for size in observed.sizes_now()]
        taken: list[Forms] = []

        def measure() -> Measured | None:
            found = observed.forms(module, vectors, _slice(rows))
            taken.extend([] if found is None else [found])
            return None if found is None else (found.grams, found.sizes)

        shape = (len(observed.weights), len(vectors), len(vectors))
        grams = self._mean(measure if len(rows) else None, shape, none, vectors)
        if grams is None:
            return None
        moments = taken[0].moments if taken else (0.0, 0.0)
        sizes = *(taken[0].sizes if taken else none), *observed.totals()
        here = [float(len(rows)), *moments, *(size or 0.0 for size in sizes)]
        columns = zip(*self._ranks.gather(here, self._place), strict=True)
        some, forms, squares, *both = (sum(column) for column in columns)
        times, parts = (share.samples, int(some)), len(none)
        grams = of_all(grams, both[:parts], both[parts:], times)
        return Estimate(grams, next_sparsest(*times, forms, squares))

    def estimated_kl(
        self, module: nn.Module, change: Vector, turn: int, sparsest: int
    ) -> Tensor | None:
        """As :meth:`Observed.estimated_kl`, of the samples of :meth:`estimated_grams`."""
        observed, share = self._observed, self._share()
        if not hasattr(observed.loss, "kl"):
            return None
        if not share.divisible or not sparsest:
            every = None if observed.empty else partial(observed.whole_divergence, module, change)
            return self._mean(every, (len(observed.weights),), observed.totals(), [change])
        rows = share.rows(turn, observed.count, sparsest)
        none = [None if size is None else 0.0 for size in observed.sizes_now()]

        def measure() -> Measured | None:
            return observed.divergence(module, change, _slice(rows))

        return self._mean(measure if len(rows) else None, (len(observed.weights),), none, [change])

    def spending(self, module: nn.Module, outputs: Callable[[], Any]) -> Callable[[], Tensor]:
        """As :meth:`Observed.spending`, of all ranks."""
        observed = self._observed
        spent, sizes = observed.spending(module, outputs), observed.sizes_now()
        empty = observed.empty

        def measure() -> Measured:
            return spent(), sizes

        def joined() -> Tensor:
            like = {"": next(iter(module.parameters()))}
            found = self._mean(None if empty else measure, (len(sizes),), sizes, [like])
            return like[""].new_zeros(len(sizes)) if found is None else found

        return joined

    def objective(self, value: float) -> float:
        """The objective of the whole batch, from its value on this rank's samples."""
        size = self._observed.totals()[0]
        rows = self._ranks.gather([value, 1.0 if size is None else size], self._place)
        total = 1.0 if size is None else sum(weight for _, weight in rows)
        return sum(weight * mine for mine, weight in rows if weight) / (total or 1.0)

    def _mean(
        self,
        measure: Callable[[], Measured | None] | None,
        shape: tuple[int, ...],
        none: Sizes,
        vectors: Sequence[Vector],
    ) -> Tensor | None:
        """Sum over the ranks of Z_r / Z times what they measure, part by part.

        Args:
            measure: None on a rank without samples.
            shape: Of what is measured, (parts, ...).
            none: The sizes of nothing, None where the part is a sum.
            vectors: Of a step: their type is that of the result.

        Raises:
            ValueError: A rank has an error; on all of them.
        """
        found, failure, status = None, None, _DONE
        try:
            found = None if measure is None else measure()
            status = _DONE if measure is None or found is not None else _UNKNOWN
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            failure, status = error, _FAILED
        sizes = none if found is None else found[1]
        counts = [(1.0 if size is None else size) if found is not None else 0.0 for size in sizes]
        rows = self._ranks.gather([status, *counts], self._place)
        if failure is not None:
            raise failure
        bad = next((rank for rank, row in enumerate(rows) if row[0] == _FAILED), None)
        if bad is not None:
            raise ValueError(f"rank {bad} cannot measure the exact Fisher of its samples")
        totals = [sum(row[1 + part] for row in rows) for part in range(len(counts))]
        if any(row[0] == _UNKNOWN for row in rows) or not any(totals):
            return None
        totals = [total or 1.0 for total in totals]
        each = zip(counts, totals, none, strict=True)
        weights = [count if size is None else count / total for count, total, size in each]
        mine = torch.zeros(shape, dtype=torch.float64, device=self._place)
        if found is not None:
            scale = mine.new_tensor(weights).reshape(-1, *[1] * (len(shape) - 1))
            mine = torch.where(scale == 0, mine, found[0].detach().double() * scale)
        kind = accumulation_type(next(iter(vectors[0].values())))
        return self._ranks.summed([mine])[0].to(kind)


def _slice(rows: range) -> slice:
    return slice(rows.start, None, rows.step)
