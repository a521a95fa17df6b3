"""What a rank's batch is of the batch of all ranks, which together learn as one process does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from acktr.config import ConfigError
from acktr.kfac import RankError, Ranks
from acktr.policies import pooling
from acktr.rollout.buffer import Batch, Rollout

_NOTHING = -1.0
"""In place of whether the returns are finite."""


@dataclass(frozen=True)
class Moments:
    """Of some numbers: their count, mean, and the sum of squared differences from it."""

    count: float
    mean: float
    m2: float

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Those of values (B,), in float64."""
        if not len(values):
            return cls(0.0, 0.0, 0.0)
        exact = values.detach().double()
        centre = exact.mean()
        return cls(float(len(values)), float(centre), float((exact - centre).square().sum()))

    def __or__(self, other: Moments) -> Moments:
        """Those of both together."""
        count = self.count + other.count
        if not count:
            return self
        move, spread = pooling(other.mean - self.mean, self.count, other.count)
        return Moments(count, self.mean + move, self.m2 + other.m2 + spread)

    @property
    def variance(self) -> float:
        """Population variance; 0 of nothing."""
        return self.m2 / self.count if self.count else 0.0

    @property
    def deviation(self) -> float:
        """Population standard deviation."""
        return math.sqrt(self.variance)


@dataclass(frozen=True)
class Share:
    """A rank's part of a batch, as all ranks know it."""

    ranks: Ranks
    rows: int
    """Samples of this rank."""
    before: int
    """Samples of the ranks before it."""
    total: int
    """Samples of all."""
    least: int
    """Samples of the rank with the fewest."""
    index: Tensor
    """(B,) numbers of this rank's rows among those of all, in the order of one process."""
    advantages: Moments
    """Of all."""
    explained_variance: float | None
    """Part of the variance of all returns that the values explain; None without values."""

    def sample(self, setting: str, fraction: float, turn: int) -> slice | None:
        """This rank's rows of every k-th sample of all, one rank's after another's; None for all.

        Args:
            setting: The name of what asks for a fraction of the samples.
            fraction: It, in (0, 1]; k = round(1 / fraction).
            turn: Number of the batch; each one begins with another sample.

        Raises:
            ConfigError: A rank has too few samples to have one of those.
        """
        every = max(1, round(1 / fraction))
        if self.least < every:
            raise ConfigError(
                f"{setting}={fraction:g} takes every {every}-th sample, but a rank has"
                f" {self.least}: fewer ranks, or more environments or steps, are needed"
            )
        if every == 1:
            return None
        first = turn % min(every, self.total)
        return slice((first - self.before) % every, None, every)

    def mean(self, vector: Tensor, rows: int) -> Tensor:
        """Mean (n,) over the samples of all ranks, from that over so many rows of this rank's."""
        (sums,) = self.ranks.summed([torch.cat([vector * rows, vector.new_tensor([float(rows)])])])
        return sums[:-1] / sums[-1]

    def means(self, means: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
        """Means over the samples of all ranks, from those over this rank's.

        Args:
            means: Scalars.
            rows: The number of samples that they are means over.
        """
        if not means:
            return {}
        mine = torch.stack([mean.detach().double().reshape(()) for mean in means.values()])
        found = self.mean(mine, rows).unbind()
        return {n: v.to(mean.dtype) for (n, mean), v in zip(means.items(), found, strict=True)}


@dataclass(frozen=True)
class Together:
    """An update's batch, and what the ranks told one another of it."""

    batch: Batch
    """This rank's, with its :class:`Share`."""
    env_steps: int
    """Of all."""
    finite: bool
    """Whether all returns are finite."""
    told: list[list[float]]
    """Further numbers, by rank."""


def together(ranks: Ranks, rollout: Rollout, batch: Batch, told: Sequence[float]) -> Together:
    """Let all ranks know what they have.

    Args:
        ranks: All must call it, with as many environments and steps.
        rollout: This rank's.
        batch: Its samples.
        told: Further numbers to tell, as many on all ranks.
    """
    device = batch.returns.device
    finite = bool(torch.isfinite(batch.returns).all())
    values = [batch.advantages, batch.returns]
    values += [] if batch.values is None else [batch.returns - batch.values]
    facts = [float(len(batch)), float(rollout.env_steps), float(finite)]
    count = len(facts) + 3 * len(values)
    none = Moments(0.0, 0.0, 0.0)
    numbers = [x for some in values for x in astuple(Moments.of(some) if finite else none)]
    rows = _heard(ranks, [*facts, *numbers, *told], device)
    each = [
        [Moments(*row[place : place + 3]) for place in range(len(facts), count, 3)] for row in rows
    ]
    advantages, returns, *residual = each[0]
    for mine in each[1:]:
        advantages, returns = advantages | mine[0], returns | mine[1]
        residual = [one | other for one, other in zip(residual, mine[2:], strict=True)]
    explained = [1 - one.variance / max(returns.variance, 1e-12) for one in residual]
    samples = [int(row[0]) for row in rows]
    share = Share(
        ranks,
        len(batch),
        sum(samples[: ranks.rank]),
        sum(samples),
        min(samples),
        _index(ranks, rollout, sum(samples), device),
        advantages,
        explained[0] if explained else None,
    )
    return Together(
        replace(batch, share=share),
        int(sum(row[1] for row in rows)),
        all(row[2] for row in rows),
        [row[count:] for row in rows],
    )


def absent(ranks: Ranks, told: int, device: torch.device) -> None:
    """Take the place of :func:`together` on a rank that has no rollout, with so many numbers."""
    ranks.gather([0.0, 0.0, _NOTHING, *[0.0] * (3 * 3 + told)], device)


def _heard(ranks: Ranks, facts: list[float], device: torch.device) -> list[list[float]]:
    rows = ranks.gather(facts, device)
    for rank, row in enumerate(rows):
        if row[2] == _NOTHING:
            raise RankError(f"rank {rank} failed in its rollout")
    return rows


def _index(ranks: Ranks, rollout: Rollout, total: int, device: torch.device) -> Tensor:
    """Where one process with all environments would have the rows of a batch."""
    steps, num = rollout.valid.shape
    step, env = np.divmod(rollout.kept, num)
    every = num * ranks.size
    places = torch.from_numpy(step * every + ranks.rank * num + env).to(device)
    if total == steps * every:
        return places
    mine = slice(ranks.rank * num, (ranks.rank + 1) * num)
    valid = torch.zeros(steps, every, dtype=torch.int32, device=device)
    valid[:, mine] = torch.from_numpy(rollout.valid).to(valid)
    (all_valid,) = ranks.summed([valid])
    return (all_valid.flatten().cumsum(0) - 1)[places]
