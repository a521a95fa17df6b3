"""Exact forms estimated from a part of the samples, where these stand for the observed pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import KFAC, BernoulliLoss, CategoricalLoss, GaussianLoss, Ranks, SumLoss
from acktr.kfac.fisher.extent import next_sparsest, stride, term_moments
from acktr.kfac.fisher.joined import JoinedFisher
from acktr.kfac.fisher.products import Curved
from tests.tools.kfac import build, plain_config, randn, seeded
from tests.tools.product_cases import close, directions
from tests.tools.ranks import on_threads


class Tokens(nn.Module):
    """A transformer's layer over (N, T, D), with positions that a number of tokens decides on."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(6, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
        hidden = self.layer(x + self.places(torch.arange(x.shape[1])) + shift)
        out: Tensor = self.head(hidden)
        return out


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.policy, self.value = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x).tanh()
        return self.policy(hidden), self.value(hidden)


class Centred(nn.Module):
    """Samples meet in the mean of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def mlp(*between: nn.Module) -> nn.Module:
    return build(nn.Linear(4, 6), nn.Tanh(), *between, nn.Linear(6, 3))


def mask(*shape: int) -> Tensor:
    return (randn(*shape, seed=5) < 0.7).double()


BOTH = SumLoss(CategoricalLoss(), GaussianLoss(), weights=(1.0, 0.5))
CASES: dict[str, tuple[Callable[[], nn.Module], Any, Any, dict[str, Any], int]] = {
    "mean": (mlp, CategoricalLoss(), {}, {}, 256),
    "sum": (mlp, BernoulliLoss(reduction="sum"), {}, {}, 130),
    "tokens": (
        lambda: Tokens().double(),
        CategoricalLoss(reduction="batchmean"),
        {"shift": randn(1, 1, 4)},
        {"weights": mask(64, 5)},
        64,
    ),
    "two heads": (lambda: Heads().double(), BOTH, {}, {"weights": mask(192)}, 192),
    "two masks": (
        lambda: Heads().double(),
        BOTH,
        {},
        {"weights": (mask(192), (randn(192, seed=6) < -0.5).double())},
        192,
    ),
}


def observed(model: nn.Module, loss: Any, inputs: Tensor, named: Any, terms: Any) -> KFAC:
    optimizer = KFAC(model, plain_config(damping=0.1))
    with optimizer.capture() as captured:
        output = model(inputs, **named)
    optimizer.observe(captured, output, loss, **terms)
    return optimizer


@pytest.mark.parametrize("name", CASES)
def test_the_mean_of_all_parts_is_the_form_of_the_batch(name: str) -> None:
    make, loss, named, terms, count = CASES[name]
    model = make()
    inputs = randn(count, 5, 4) if name == "tokens" else randn(count, 4)
    seen = observed(model, loss, inputs, named, terms).curvature.observed
    assert seen is not None
    assert seen.extent is not None
    every = stride(*seen.extent)
    assert every == min(8, count // 32) or name == "tokens"
    _, vectors = directions(model, 2)
    grams = [seen.estimated_grams(model, vectors, turn, every) for turn in range(every)]
    sizes = torch.tensor([len(inputs[turn::every]) for turn in range(every)]).double() / count
    assert all(gram is not None for gram in grams)
    given = torch.stack([gram.grams for gram in grams if gram is not None])
    assert not torch.allclose(given[0], given[1])
    close((given * sizes[:, None, None, None]).sum(0), seen.grams(model, vectors))


def estimates_of_ranks(ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Those of all parts of a batch whose second output has few terms, and the exact forms."""
    model, count = build(Heads())[0], 128
    few = torch.zeros(2, count)
    few[0, torch.randperm(count, generator=seeded(1))[:24]] = 1
    few[1, :24] = 1  # as many on every rank, whose scales must be those of the others
    (cut,) = torch.arange(2 * count).chunk(ranks.size)[ranks.rank : ranks.rank + 1]
    inputs, masks = randn(2 * count, 4)[cut], (torch.ones(len(cut)), few.flatten()[cut])
    optimizer = KFAC(model, plain_config(damping=0.1), ranks=ranks)
    with optimizer.capture() as captured:
        output = model(inputs)
    optimizer.observe(captured, output, BOTH, weights=masks)
    assert optimizer.curvature.observed is not None
    fisher = JoinedFisher(ranks, torch.device("cpu"), optimizer.curvature.observed)
    _, vectors = directions(model, 2)
    every = [fisher.estimated_grams(model, vectors, turn, 8) for turn in range(8)]
    return torch.stack([e.grams for e in every if e is not None]), fisher.grams(model, vectors)


def test_the_mean_of_all_parts_is_the_form_of_the_ranks_batch() -> None:
    (estimates, exact), other = on_threads(estimates_of_ranks, 2)
    assert torch.equal(estimates, other[0])
    assert len(estimates) == 8
    close(estimates.mean(0), exact)


@pytest.mark.parametrize("name", ["mean", "sum", "two heads"])
def test_what_samples_bear_is_what_they_give_alone(name: str) -> None:
    make, loss, named, _, count = CASES[name]
    model = make()
    seen = observed(model, loss, randn(count, 4), named, {}).curvature.observed
    assert seen is not None
    _, vectors = directions(model, 2)
    alone = []
    for row in range(12):
        found = seen.forms(model, vectors, slice(row, row + 1))
        assert found is not None
        alone.append(found.grams.sum(0).trace() * (found.sizes[0] or 1.0))
    some, each = seen.forms(model, vectors, slice(12)), torch.stack(alone)
    assert some is not None
    close(
        torch.tensor(some.moments, dtype=torch.float64),
        torch.stack([each.sum(), each.square().sum()]),
    )


def test_positions_are_terms_of_their_own() -> None:
    output, tangent = randn(6, 5, 3), randn(6, 5, 3, seed=1)
    forms, squares = term_moments(Curved.of(CategoricalLoss(), output, [tangent]))
    rows = (output.flatten(0, 1), [tangent.flatten(0, 1)])
    flat = term_moments(Curved.of(CategoricalLoss(), *rows))
    assert (forms, squares) == pytest.approx(flat, rel=1e-12)
    p = output.softmax(-1)
    each = (p * tangent.square()).sum(-1) - (p * tangent).sum(-1).square()
    assert (forms, squares) == pytest.approx((float(each.sum()), float(each.square().sum())))


@pytest.mark.parametrize(
    ("forms", "every"),
    [
        ([1.0] * 64, 8),
        ([1.0] * 16, 4),
        ([1.0] * 4, 1),
        ([1.0, *[0.0] * 63], 1),
        ([1.0] * 8 + [0.0] * 56, 2),
        ([0.0] * 64, 1),
        ([float("inf")] * 64, 1),
        ([float("nan")] * 64, 1),
    ],
)
def test_sixteen_terms_of_equal_forms_are_wanted(forms: list[float], every: int) -> None:
    squares = [q * q for q in forms]
    assert next_sparsest(4 * len(forms), len(forms), sum(forms), sum(squares)) == every


def test_where_one_sample_bears_the_form_the_next_measurement_takes_all() -> None:
    """A solved task: the others' outputs are certain, and cannot be moved."""
    inputs = randn(256, 4)
    for solved in (False, True):
        model = mlp()
        with torch.no_grad():
            model[2].weight.mul_(1e3 if solved else 1.0)  # type: ignore[index, union-attr, operator]
        seen = observed(model, CategoricalLoss(), inputs, {}, {}).curvature.observed
        assert seen is not None
        found = seen.estimated_grams(model, directions(model, 1)[1], 0, 8)
        assert found is not None
        assert found.sparsest == (1 if solved else 8)


@pytest.mark.parametrize("between", [nn.Dropout(0.3), nn.BatchNorm1d(6), Centred()])
def test_the_whole_pass_is_taken_where_its_parts_are_another(between: nn.Module) -> None:
    model, loss = mlp(between), CategoricalLoss()
    optimizer = KFAC(model, plain_config(lr=0.5, kl_clip=1e-6, momentum=0.0))
    region = optimizer.curvature.region.corrected
    assert region is not None
    due, followed = [], []
    for index in range(5):
        inputs = randn(300, 4, seed=index)
        with optimizer.capture() as captured:
            output = model(inputs)
        optimizer.observe(captured, output, loss)
        due.append(optimizer.curvature.measuring)
        followed.append(optimizer.curvature.following)
        optimizer.zero_grad()
        torch.autograd.backward(loss(output, inputs[:, :3].argmax(-1)))
        optimizer.step(outputs=lambda inputs=inputs: model(inputs))  # type: ignore[misc]
        info = optimizer.last_step
        assert info is not None
        assert info.spent_kl is not None
        if followed[-1]:
            assert float(info.spent_kl.sum()) == pytest.approx(float(info.predicted_kl), rel=0.01)
    second = due.index(True, 1)  # the first measurement of a part, which does not do
    assert followed[: second + 2] == [True, *[False] * second, True]
    assert region.whole
