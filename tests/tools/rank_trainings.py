"""Trainings of K-FAC on batches that ranks share out by rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    Empirical,
    GaussianLoss,
    KFACConfig,
    LMConfig,
    OutputLoss,
    Ranks,
    SumLoss,
)
from tests.tools.kfac import build, mlp, parameters, plain_config, randn, seeded

STEPS = 20
UNEVEN = {1: (12,), 2: (5, 7), 3: (3, 2, 7)}
EVEN = {1: (12,), 2: (6, 6), 3: (4, 4, 4)}
EMPTY = {1: (12,), 2: (0, 12), 3: (5, 0, 7)}
MANY_EMPTY = {1: (96,), 2: (96, 0), 3: (40, 0, 56)}
IGNORED = -100
MANY = {1: (96,), 2: (40, 56), 3: (16, 47, 33)}


class Rows(nn.Module):
    """The second layer is called for the rows that begin with a positive number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.first(inputs)
        some = (inputs[:, 0] > 0).nonzero()[:, 0]
        return output.index_add(0, some, self.second(inputs[some])) if len(some) else output


class TwoHeads(nn.Module):
    """A policy and a value on one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.policy, self.value = nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(inputs).tanh()
        return self.policy(hidden), self.value(hidden)


class Twice(nn.Module):
    """One layer twice, then its weight in another layer, and a raw parameter at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.other.weight = self.one.weight
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.head(self.other(self.one(self.one(inputs).tanh()).tanh()))
        return result


class Scaled(nn.Module):
    """A raw parameter, which gets the diagonal of its Fisher."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.layer(inputs) * self.scale
        return result


def made(kind: type[nn.Module]) -> nn.Module:
    """A float64 module with reproducible parameters."""
    return build(kind())[0]


def conv() -> nn.Module:
    return build(
        nn.Conv2d(2, 4, 2, groups=2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    )


def words() -> nn.Module:
    layers = (nn.Embedding(5, 3), nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3))
    return build(*layers)


def wide() -> nn.Module:
    """Nine small layers of one shape."""
    hidden = (layer for _ in range(9) for layer in (nn.Linear(4, 4), nn.Tanh()))
    return build(*hidden, nn.Linear(4, 3))


@dataclass(frozen=True)
class Training:
    """Some steps on batches that are shared out by rows."""

    net: Callable[[], nn.Module] = mlp
    settings: dict[str, Any] = field(default_factory=dict)
    shares: dict[int, tuple[int, ...]] = field(default_factory=lambda: UNEVEN)
    shape: tuple[int, ...] = (4,)
    tokens: bool = False
    loss: OutputLoss[Any] = field(default_factory=CategoricalLoss)
    options: dict[str, Any] = field(default_factory=dict)
    pieces: dict[int, int] = field(default_factory=dict)
    """Micro-batches of each rank; 1 by default."""
    own_loss: bool = False
    """Whether targets are drawn here, for update_curvature."""
    noise_seed: int = 0
    """Times the rank: what other noise on each rank begins with."""
    split_alone: bool = False
    """Whether one process takes the shares as micro-batches: where those are not one batch."""
    steps: int = STEPS
    ignored: range = range(0)
    """Rows whose labels are ignored."""
    device: str = "cpu"

    def batch(self, step: int, rows: int) -> tuple[Tensor, Any]:
        """Inputs and targets of all ranks."""
        inputs, target = self._drawn(step, rows)
        moved = [t.to(self.device) for t in (target if isinstance(target, tuple) else (target,))]
        return inputs.to(self.device), tuple(moved) if isinstance(target, tuple) else moved[0]

    def _drawn(self, step: int, rows: int) -> tuple[Tensor, Any]:
        if self.tokens:
            return (
                torch.randint(5, (rows, 4), generator=seeded(step)),
                torch.randint(3, (rows, 4), generator=seeded(step + 100)),
            )
        inputs = randn(rows, *self.shape, seed=step)
        labels = torch.randint(3, (rows,), generator=seeded(step + 100))
        labels[list(self.ignored)] = IGNORED
        if isinstance(self.loss, SumLoss):
            return inputs, (labels, randn(rows, 1, seed=step + 200))
        return inputs, labels

    def terms(self, target: Any, cut: slice) -> int:
        """What the objective of some rows is a mean over; a rank without has no objective."""
        first = target[0] if isinstance(target, tuple) else target
        labels = first[cut] if first.dim() == 1 else first[cut, 0]
        return int((labels != IGNORED).sum())

    def cuts(self, size: int, rank: int) -> list[slice]:
        """This rank's micro-batches."""
        shares = self.shares[size]
        first = sum(shares[:rank])
        count = self.pieces.get(rank, 1)
        ends = [first + shares[rank] * k // count for k in range(count + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(ends)]

    def run(self, ranks: Ranks | None) -> dict[str, Any]:
        """Train; the parameters, and what the curvature and the last step say."""
        size, rank = (1, 0) if ranks is None else (ranks.size, ranks.rank)
        model = self.net().to(self.device)
        settings: dict[str, Any] = {"refresh_interval": 3, "stat_interval": 1, "factor_rows": None}
        settings |= {"structure": "kfac", "kl_clip": 0.01, "damping": 0.03}  # rounding stays small
        config = KFACConfig(**{**settings, **self.settings})
        optimizer = KFAC(model, config, ranks=ranks, **self.options)
        cuts = self.cuts(size, rank)
        if ranks is None and self.split_alone:
            cuts = [cut for place in range(3) for cut in self.cuts(3, place)]
        for step in range(self.steps):
            self.step(optimizer, model, ranks, step, cuts)
        last = optimizer.last_step
        assert last is not None
        return {
            **parameters(model),
            "damping": torch.tensor(optimizer.damping),
            "promise": last.predicted_kl.clone(),
            "generator": optimizer.curvature.generator.get_state().double(),
        }

    def step(
        self,
        optimizer: KFAC,
        model: nn.Module,
        ranks: Ranks | None,
        step: int,
        cuts: Sequence[slice],
    ) -> None:
        inputs, target = self.batch(step, sum(self.shares[1]))
        mine, loss = sum(self.terms(target, cut) for cut in cuts), self.loss
        optimizer.zero_grad()
        for cut in cuts:
            some = tuple(t[cut] for t in target) if isinstance(target, tuple) else target[cut]
            last = cut is cuts[-1]
            with optimizer.capture() as captured:
                output = model(inputs[cut])
            if self.own_loss:
                seed = step + 1000 * self.noise_seed * (0 if ranks is None else ranks.rank)
                noise = randn(len(inputs), *output.shape[1:], seed=seed)[cut]
                total = (noise * output).sum()
                optimizer.update_curvature(captured, total, samples=len(output), last=last)
            else:
                given = {"source": Empirical(some), "target": some, "last": last}
                optimizer.observe(captured, output, loss, **given)
            if terms := self.terms(target, cut):
                (loss(output, some) * terms / mine).backward()
        if ranks is not None:
            ranks.average(model, mine)

        def objective() -> Tensor:
            rows = slice(cuts[0].start, cuts[-1].stop)
            return loss(model(inputs[rows]), target[rows]) if mine else torch.zeros(())

        optimizer.step(objective=None if optimizer.adaptive is None else objective)


KRONECKER = {"quadratic": "kronecker"}
TRAININGS = {
    "kfac": Training(settings=KRONECKER),
    "even": Training(settings=KRONECKER, shares=EVEN),
    "cholesky of convolutions": Training(
        conv, {**KRONECKER, "structure": "cholesky"}, shape=(2, 3, 3)
    ),
    "exact form of convolutions": Training(conv, {"quadratic": "exact"}, shape=(2, 3, 3)),
    "embedding and norm": Training(words, {"quadratic": "exact"}, tokens=True),
    "many layers": Training(wide, {**KRONECKER, "structure": "cholesky"}),
    "tridiagonal": Training(settings={**KRONECKER, "structure": "tridiagonal"}),
    "ekfac": Training(settings={**KRONECKER, "structure": "ekfac"}, shares=MANY),
    "corrected, a few rows": Training(),
    "corrected, estimated": Training(shares=MANY),
    "two parts": Training(
        partial(made, TwoHeads), loss=SumLoss(CategoricalLoss(), GaussianLoss()), shares=MANY
    ),
    "radii of two parts": Training(
        partial(made, TwoHeads),
        {"kl_clip": (0.01, 0.02)},
        loss=SumLoss(CategoricalLoss(), GaussianLoss()),
        shares=MANY,
    ),
    "quadratic model": Training(
        options={"step_rule": "quadratic_model", "adaptive": LMConfig(interval=2)}
    ),
    "adaptive damping": Training(settings={"quadratic": "exact"}, options={"adaptive": LMConfig()}),
    "shared weights": Training(partial(made, Twice), {"quadratic": "exact"}),
    "a layer for some rows": Training(partial(made, Rows), KRONECKER),
    "micro-batches": Training(settings={"quadratic": "exact"}, pieces={0: 2, 1: 1, 2: 3}),
    "measured micro-batches": Training(pieces={0: 2, 1: 1, 2: 3}),
    "targets of one's own": Training(settings=KRONECKER, own_loss=True),
    "an empty share": Training(settings=KRONECKER, shares=EMPTY),
    "an empty share, exact form of convolutions": Training(
        conv, {"quadratic": "exact"}, EMPTY, shape=(2, 3, 3)
    ),
    "an empty share of words": Training(words, {"quadratic": "exact"}, EMPTY, tokens=True),
    "an empty share, estimated": Training(shares=MANY_EMPTY),
    "an empty share of two parts": Training(
        partial(made, TwoHeads),
        {"kl_clip": (0.01, 0.02)},
        MANY_EMPTY,
        loss=SumLoss(CategoricalLoss(), GaussianLoss()),
    ),
    "an empty share, own targets": Training(settings=KRONECKER, shares=EMPTY, own_loss=True),
    "an empty share, quadratic model": Training(
        shares=EMPTY, options={"step_rule": "quadratic_model", "adaptive": LMConfig(interval=2)}
    ),
    "an empty micro-batch": Training(
        settings={"quadratic": "exact"}, shares=EMPTY, pieces={0: 2, 1: 2, 2: 3}
    ),
    "an ignored share": Training(
        loss=CategoricalLoss(ignore_index=IGNORED), ignored=range(3, 5), settings=KRONECKER
    ),
    "an ignored share, estimated": Training(
        loss=CategoricalLoss(ignore_index=IGNORED), ignored=range(16, 63), shares=MANY
    ),
    "delayed": Training(settings={**KRONECKER, "refresh_delay": 2}),
    "cold": Training(settings={**KRONECKER, "cold_steps": 4}),
}
"""Trainings that are those of one process."""


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative difference of a tensor."""
    return max(
        float((found[n] - w).norm() / w.norm().clamp(min=1e-300))
        for n, w in wanted.items()
        if n != "generator"  # which ranks draw the seeds of their own ones from
    )


def made_optimizer(ranks: Ranks, **settings: Any) -> tuple[KFAC, nn.Module]:
    """K-FAC and its small network, of the same parameters on all ranks."""
    model = mlp()
    return KFAC(model, plain_config(quadratic="kronecker", **settings), ranks=ranks), model


def observed(optimizer: KFAC, model: nn.Module, ranks: Ranks, factor: float = 1.0) -> None:
    """Observe an uneven share, and its averaged gradients."""
    inputs, labels = Training().batch(0, 12)
    (cut,) = Training().cuts(ranks.size, ranks.rank)
    with optimizer.capture() as captured:
        output = model(inputs[cut] * factor)
    optimizer.observe(captured, output, CategoricalLoss(), source=Empirical(labels[cut]))
    optimizer.zero_grad()
    CategoricalLoss()(output, labels[cut]).backward()
    ranks.average(model, len(output))
