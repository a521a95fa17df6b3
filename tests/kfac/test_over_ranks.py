"""K-FAC over ranks that share out every batch is K-FAC of one process on the whole batch.

The ranks are threads of one process; those of several are in test_over_processes.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    Exact,
    GaussianLoss,
    KFACConfig,
    Ranks,
    SumLoss,
    placement,
)
from acktr.kfac import estimator as estimator_module
from acktr.kfac.statistics.averages import RunningAverage, join_ranks
from tests.kfac.test_micro_batches import nearly
from tests.tools.exact import close
from tests.tools.kfac import mlp, parameters, plain_config, randn
from tests.tools.product_cases import filled
from tests.tools.rank_trainings import (
    KRONECKER,
    TRAININGS,
    Training,
    distance,
    made_optimizer,
    observed,
)
from tests.tools.ranks import on_threads


@pytest.fixture
def owners_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank decomposes, although the work is little."""
    monkeypatch.setattr(placement, "WORTH", 1.0)


@pytest.mark.usefixtures("owners_all")
@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_is_that_of_one_process(name: str) -> None:
    wanted = TRAININGS[name].run(None)
    for size in (2, 3):
        found = on_threads(TRAININGS[name].run, size)
        for mine in found[1:]:
            assert all(torch.equal(mine[key], found[0][key]) for key in wanted)
        assert distance(found[0], wanted) < 1e-12


def test_means_of_means_and_other_noise_are_seen() -> None:
    """What the tests above would not see is worth nothing."""
    wanted, right = TRAININGS["kfac"].run(None), Ranks.average

    def means(ranks: Ranks, module: nn.Module, rows: float) -> None:
        right(ranks, module, 1.0)

    with mock.patch.object(Ranks, "average", means):
        assert distance(on_threads(TRAININGS["kfac"].run, 3)[0], wanted) > 1e-3
    training = Training(settings=KRONECKER, own_loss=True)
    other = Training(settings=KRONECKER, own_loss=True, noise_seed=1)
    assert distance(on_threads(other.run, 3)[0], training.run(None)) > 1e-3


def first_factor(ranks: Ranks) -> Tensor:
    optimizer, model = made_optimizer(ranks)
    observed(optimizer, model, ranks)
    return optimizer.curvature.stats["0"].factors[1].mean()


def test_counts_of_one_rank_are_seen() -> None:
    """Sums over the ranks, divided by what a rank counts itself, are other factors."""

    def join(averages: Sequence[RunningAverage], ranks: Ranks) -> None:
        counts = [average.part()[1] for average in averages]
        join_ranks(averages, ranks)
        for average, count in zip(averages, counts, strict=True):
            total, _, given = average.part()
            average.replace_part(total, count, given)

    right = on_threads(first_factor, 3)[0]
    with mock.patch.object(estimator_module, "join_ranks", join):
        wrong = on_threads(first_factor, 3)[0]
    assert float((right - wrong).norm() / right.norm()) > 0.1


def test_without_processes_there_are_no_ranks() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        Ranks()


def sampled(ranks: Ranks) -> Any:
    """Targets are drawn by every rank for itself; what comes of them is common."""
    model = mlp()
    optimizer, loss = KFAC(model, KFACConfig(), ranks=ranks), CategoricalLoss()
    drawn = []
    for step in range(12):
        inputs, labels = Training().batch(step, 12)
        (cut,) = Training().cuts(ranks.size, ranks.rank)
        with optimizer.capture() as captured:
            output = model(inputs[cut])
        optimizer.observe(captured, output, loss)
        optimizer.zero_grad()
        loss(output, labels[cut]).backward()
        ranks.average(model, len(output))
        optimizer.step()
        copied = torch.Generator()
        copied.set_state(optimizer.curvature.generator.get_state())
        source = optimizer.curvature._estimator.targets(copied)
        optimizer.curvature._estimator.drop()
        drawn.append(torch.randint(1000, (), generator=source))
    state = optimizer.state_by_name()
    return {"state": copy.deepcopy(state), "model": parameters(model), "drawn": torch.stack(drawn)}


@pytest.mark.usefixtures("owners_all")
def test_sampled_targets_differ_and_all_else_agrees() -> None:
    first, *others = on_threads(sampled, 3)
    for mine in others:
        nearly(mine["state"], first["state"])
        assert all(torch.equal(mine["model"][n], p) for n, p in first["model"].items())
        assert not torch.equal(mine["drawn"], first["drawn"])


def not_finite(ranks: Ranks) -> Any:
    """A batch that is NaN on one rank is rejected on all."""
    optimizer, model = made_optimizer(ranks)
    observed(optimizer, model, ranks)
    optimizer.step()
    observed(optimizer, model, ranks, torch.nan if ranks.rank == 1 else 1.0)
    optimizer.step()
    return {**parameters(model), "rejected": optimizer.curvature.stats["0"].history.rejected}


def test_what_is_not_finite_on_one_rank_is_rejected_on_all() -> None:
    first, *others = on_threads(not_finite, 3)
    assert all(int(mine["rejected"]) == 1 for mine in (first, *others))
    assert all(torch.equal(mine[n], p) for mine in others for n, p in first.items())


class Apart(nn.Module):
    """A part of the loss for every sample, and another one for a few."""

    def __init__(self, rare: nn.Module) -> None:
        super().__init__()
        self.trunk, self.often, self.rare = nn.Linear(4, 4), nn.Linear(4, 2), rare

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(inputs).tanh()
        return self.often(hidden), self.rare(hidden)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.recurrence = nn.MultiheadAttention(2, 1), nn.GRU(2, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs.unflatten(1, (2, 2)).movedim(1, 0)
        output: Tensor = self.recurrence(self.attention(hidden, hidden, hidden)[0])[0][-1]
        return output


class Tied(nn.Module):
    """Words of which nothing depends on the trunk, and their table as the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
        self.head.weight = self.table.weight

    def forward(self, inputs: Tensor) -> Tensor:
        words = inputs.detach().abs().mul(99).long() % 5
        output: Tensor = self.head(self.table(words).tanh())
        return output


RARE: dict[str, nn.Module] = {
    "linear": nn.Linear(4, 1),
    "convolutions": nn.Sequential(
        nn.Unflatten(1, (1, 4)),
        nn.Conv1d(1, 2, 2),
        nn.Conv1d(2, 2, 2, groups=2),
        nn.ConvTranspose1d(2, 2, 2),
        nn.GroupNorm(1, 2),
    ),
    "attention": Attention(),
    "tied": Tied(),
}


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("name", RARE)
def test_a_rank_may_have_no_term_of_a_part(
    name: str, graded: bool, sharing: Any, structure: Any
) -> None:
    inputs, rare = randn(12, 4), torch.arange(12) < 3
    often = torch.linspace(0.5, 1, 12).double() if graded else None
    loss = SumLoss(CategoricalLoss(reduction="sum"), GaussianLoss(reduction="sum"))

    def factors(ranks: Ranks | None) -> list[Tensor]:
        model = filled(Apart(RARE[name]))
        config = plain_config(structure=structure, conv_sharing=sharing, linear_sharing=sharing)
        curvature = KFAC(model, config, ranks=ranks).curvature
        cut = slice(12) if ranks is None else slice(6 * ranks.rank, 6 * ranks.rank + 6)
        for _ in range(2):  # the scales of EKFAC come with a basis
            with curvature.capture() as captured:
                output = model(inputs[cut])
            weights = None if often is None else often[cut], rare[cut]
            curvature.observe(captured, output, loss, source=Exact(), weights=weights)
            curvature.refresh()
        return [factor.mean() for block in curvature.stats.values() for factor in block.factors]

    wanted = factors(None)
    for found in on_threads(factors, 2):
        for mine, whole in zip(found, wanted, strict=True):
            close(mine, whole)
