"""A table that is the weight of embeddings and of the linear head."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import CategoricalLoss, Exact, GaussianLoss, OutputLoss, dense_fisher
from acktr.kfac.blocks.kronecker import Corrected
from tests.kfac.test_weights import folded
from tests.tools.exact import Seen, close, gap, observed, stored
from tests.tools.kfac import seeded
from tests.tools.losses import REDUCTIONS
from tests.tools.product_cases import filled

WORDS, WIDTH = 6, 3


class Language(nn.Module):
    """Table, something in the middle, head."""

    def __init__(self, middle: nn.Module, bias: bool, padding: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH, padding_idx=padding)
        self.middle = middle
        self.head = nn.Linear(WIDTH, WORDS, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.head(self.middle(self.table(tokens)))
        return output


class Translator(nn.Module):
    """Two embeddings of one vocabulary before the head, as in an encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.source = nn.Embedding(WORDS, WIDTH)
        self.target = nn.Embedding(WORDS, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed = self.mix(self.source(tokens).mean(1, keepdim=True)) + self.target(tokens)
        output: Tensor = self.head(mixed.tanh())
        return output


def tied(model: Any) -> Any:
    """The model with one table under all of its uses."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, nn.Embedding):
            layer.weight = model.head.weight
    return model


def untied(model: Any) -> Any:
    """The same function with a table for every use."""
    model = filled(model)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Embedding):
                layer.weight.copy_(model.head.weight)
    return model


NETS: dict[str, nn.Module] = {
    "language": Language(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), True, 2),
    "normalised": Language(nn.LayerNorm(WIDTH), False),
    "translator": Translator(),
}


def words(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(WORDS, shape, generator=seeded(seed))


def side_factors(model: nn.Module, inputs: Tensor, loss: OutputLoss[Any]) -> list[list[Tensor]]:
    """(L, R) of the embeddings and of the head, from the net with a table for each use."""
    seen = observed(model, inputs, loss)
    tables = [seen.layer(p) for p, m in model.named_modules() if isinstance(m, nn.Embedding)]
    frequencies = torch.stack([table.a.mean() for table in tables]).mean(0)
    gradients = torch.stack([table.g.mean() for table in tables]).sum(0)
    head = seen.layer("head")
    hidden = head.a.mean()[:WIDTH, :WIDTH]  # without the bias
    return [[frequencies.diag(), gradients], [head.g.mean(), hidden]]


def block_name(seen: Seen) -> str:
    return next(n for n, b in seen.curvature.stats.items() if len(b.paths) > 1)


def partial_traces(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Of a matrix over (D, V): what is left of the words, and of the width."""
    spread = matrix.reshape(WIDTH, WORDS, WIDTH, WORDS)
    return torch.einsum("ivjv->ij", spread), torch.einsum("iviw->vw", spread)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", NETS)
def test_the_block_has_the_partial_traces_of_the_sum_and_the_stated_error(
    name: str, reduction: Any
) -> None:
    apart = untied(NETS[name])
    model, inputs, loss = tied(apart), words(5, 4), CategoricalLoss(reduction=reduction)
    torch.testing.assert_close(model(inputs), apart(inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = observed(model, inputs, loss)
    found = stored(seen.block(block_name(seen)))
    first, second = side_factors(apart, inputs, loss)
    total = torch.kron(first[1], first[0]) + torch.kron(second[1], second[0])
    for mine, wanted in zip(partial_traces(found), partial_traces(total), strict=True):
        close(mine, wanted, rtol=1e-11)
    tau = total.trace()
    shares = [left.trace() * right.trace() / tau for left, right in (first, second)]
    apart_by = [a / a.trace() - b / b.trace() for a, b in zip(first, second, strict=True)]
    error = -tau * shares[0] * shares[1] * torch.kron(apart_by[1], apart_by[0])
    close(found - total, error, rtol=1e-9)
    assert 0.01 < gap(found, total) < 1


LINEAR = {
    "one token": (NETS["normalised"], (1, 1), CategoricalLoss()),
    "one token, two layers": (NETS["language"], (1, 1), CategoricalLoss()),
    "terms that nothing mixes": (
        Language(nn.Linear(WIDTH, WIDTH), False, 2),
        (5, 4),
        GaussianLoss(std=0.6),
    ),
    "flat tokens": (Language(nn.Linear(WIDTH, WIDTH), True), (7,), GaussianLoss(std=0.6)),
}


@pytest.mark.parametrize("case", LINEAR)
def test_the_terms_are_those_of_the_dense_fisher(case: str) -> None:
    """Where a block of each use is exact; the products of unlike uses are left out."""
    net, shape, loss = LINEAR[case]
    apart = untied(net)
    model, inputs = tied(apart), words(*shape, seed=1)
    seen = observed(model, inputs, loss)
    names = ["table.weight", "head.weight"]
    dense = dense_fisher(apart, (inputs,), loss, names)
    whole = dense.reshape(2, WORDS, WIDTH, 2, WORDS, WIDTH).transpose(1, 2).transpose(4, 5)
    parts = whole.reshape(2, WIDTH * WORDS, 2, WIDTH * WORDS)
    total = parts[0, :, 0] + parts[1, :, 1]
    found = stored(seen.block("table"))
    left, right = partial_traces(found)
    for mine, wanted in zip((left, right), partial_traces(total), strict=True):
        close(mine, wanted)
    close(found, torch.kron(left, right) / left.trace())
    close(parts.sum((0, 2)), seen.truth("table"))  # all uses, and their products


LARGE = "ignore::acktr.kfac.blocks.registry.LargeFactorWarning"


@pytest.mark.filterwarnings(LARGE)
@pytest.mark.parametrize("limit", [WORDS - 1, WIDTH - 1])
@pytest.mark.parametrize("name", ["language", "translator"])
def test_sides_above_the_largest_factor_have_the_diagonal(name: str, limit: int) -> None:
    model, inputs = tied(untied(NETS[name])), words(5, 4)
    whole = observed(model, inputs, CategoricalLoss())
    small = observed(model, inputs, CategoricalLoss(), max_factor_size=limit)
    block = small.layer(block_name(small))
    same = whole.layer(block.name)
    close(block.a.mean(), same.a.mean().diagonal(), rtol=1e-12)
    right = same.g.mean()
    close(block.g.mean(), right.diagonal() if limit < WIDTH else right, rtol=1e-12)


@pytest.mark.filterwarnings(LARGE)
@pytest.mark.parametrize("limit", [WORDS, WORDS - 1, WIDTH - 1])
@pytest.mark.parametrize("name", NETS)
def test_ekfac_scales_are_those_of_all_uses_together(name: str, limit: int) -> None:
    """The diagonal, in the basis, of the exact block of the tied net."""
    model, inputs = tied(untied(NETS[name])), words(5, 4)
    settings: dict[str, Any] = {"structure": "ekfac", "stat_decay": 0.0, "max_factor_size": limit}
    seen = observed(model, inputs, CategoricalLoss(), **settings)
    seen.curvature.refresh()
    seen.again()
    block = seen.layer(block_name(seen))
    assert isinstance(block.inverse, Corrected)
    bases = block.inverse.basis.a, block.inverse.basis.g
    a_vectors, g_vectors = (
        torch.eye(len(side.values)).double() if side.vectors is None else side.vectors
        for side in bases
    )
    q = torch.kron(g_vectors, a_vectors)
    wanted = (q.mT @ seen.truth(block.name) @ q).diagonal()
    close(block.inverse.scales.mean().flatten(), wanted)


def test_the_step_solves_the_damped_system_and_moves_all_uses() -> None:
    model, inputs = tied(untied(NETS["language"])), words(5, 4)
    seen = observed(model, inputs, CategoricalLoss(), damping=0.07)
    seen.curvature.refresh()
    model(inputs).square().sum().backward()
    gradients = {n: g.detach() for n, g in seen.curvature.gradients().items()}
    step = seen.curvature.direction(gradients)
    matrix = stored(seen.block("table"))
    flat = gradients["table.weight"].mT.flatten()
    wanted = torch.linalg.solve(matrix + 0.07 * torch.eye(len(matrix)).double(), flat)
    close(step["table.weight"].mT.flatten(), wanted)


@pytest.mark.filterwarnings(LARGE)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("limit", [None, WORDS - 1])
def test_a_sample_of_weight_two_is_two_samples(name: str, limit: int | None) -> None:
    """In both kinds of uses, and in micro-batches of which one has more weight."""
    model, inputs, weights = tied(untied(NETS[name])), words(5, 4), torch.tensor([2, 1, 1, 3, 0])
    repeated = inputs.repeat_interleave(weights, 0)
    found, settings = [], {"max_factor_size": limit}
    for rows, mine, parts in (
        (inputs, weights, (slice(0, 2), slice(2, 5))),
        (repeated, None, (slice(0, 3), slice(3, 7))),
    ):
        both = folded(model, rows, CategoricalLoss(), splits=parts, weights=mine, **settings)
        block = next(b for b in both.stats.values() if len(b.paths) > 1)
        found.append([factor.mean() for factor in block.factors])
    for side, other in zip(*found, strict=True):
        close(side, other)


def test_a_batch_in_parts_and_one_without_a_gradient() -> None:
    model = tied(untied(NETS["normalised"]))
    seen = observed(model, words(3, 2), GaussianLoss(), stat_decay=0.0)
    before = seen.layer("table").a.mean(), seen.layer("table").g.mean()
    for last in (False, True):  # two like parts are one whole
        with seen.curvature.capture() as captured:
            output = model(seen.inputs)
        seen.curvature.observe(captured, output, GaussianLoss(), source=Exact(), last=last)
    close(seen.layer("table").a.mean(), before[0])
    close(seen.layer("table").g.mean(), before[1])
    with seen.curvature.capture() as captured:
        output = model(seen.inputs)
    seen.curvature.update_curvature(captured, 0 * output.sum())
    assert float(seen.layer("table").a.mean().abs().max()) == 0
    assert float(seen.layer("table").g.mean().abs().max()) == 0
