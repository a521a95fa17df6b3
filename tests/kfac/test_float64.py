"""Kronecker factors in float64 under a network in float32."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    KroneckerBlock,
    LayerRule,
    Preconditioner,
)
from acktr.kfac.blocks.layouts import LayerFactors
from acktr.kfac.blocks.tridiagonal import TridiagonalBlock, chain_matrix
from acktr.kfac.linalg import trace_ratio
from tests.tools.exact import Seen, gap, observed
from tests.tools.kfac import build, plain_config, randn, same, seeded, snapshot

TINY = 1e-6


def narrow(*parts: nn.Module) -> nn.Sequential:
    return build(*parts, seed=2).float()


def flat_inputs(*shape: int) -> Tensor:
    """Inputs with three directions alone."""
    features = shape[1]
    spread = randn(shape[0], 3, *shape[2:], seed=4), randn(3, features, seed=5)
    return (5 * torch.einsum("nk...,kf->nf...", *spread)).float()


NETS: dict[str, tuple[nn.Module, Tensor]] = {
    "chain": (narrow(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 5)), flat_inputs(20, 12)),
    "convolutions": (
        narrow(nn.Conv1d(6, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5)),
        flat_inputs(20, 6, 4),
    ),
    "attention": (
        narrow(nn.Embedding(9, 6), nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)),
        torch.randint(9, (6, 3), generator=seeded(1)),
    ),
}


def factored(seen: Seen) -> list[LayerFactors]:
    """The layers with one pair of factors."""
    layers: list[LayerFactors] = []
    for block in seen.curvature.stats.values():
        if isinstance(block, TridiagonalBlock):
            layers += block.layers
        elif isinstance(block, KroneckerBlock) and block.g.value.dim() == 2:
            layers.append(block.layer)
    return layers


def wanted(seen: Seen, gradients: dict[str, Tensor], structure: str) -> list[Tensor]:
    """The direction of every layer by a dense solve of the observed factors in float64."""
    parts, solved = [], []
    for layer in factored(seen):
        a, g = layer.a.mean(), layer.g.mean()
        assert a.dtype == g.dtype == torch.float64
        a = a.diag() if a.dim() == 1 else a
        vector = layer.matrix(gradients).double().flatten()
        if structure == "kfac":
            matrix = torch.kron(g, a) + TINY * torch.eye(len(vector)).double()
        else:
            pi, root = trace_ratio(a.diagonal(), g.diagonal()), TINY**0.5
            a = a + root * pi * torch.eye(len(a)).double()
            g = g + root / pi * torch.eye(len(g)).double()
            matrix = torch.kron(g, a)
        parts.append((a, g, vector))
        solved.append(torch.linalg.solve(matrix, vector))
    if structure != "tridiagonal":
        return solved
    chain = seen.curvature.stats["chain"]
    assert isinstance(chain, TridiagonalBlock)
    cross = ([c.mean() for c in averages] for averages in (chain.a_cross, chain.g_cross))
    matrix = chain_matrix([a for a, _, _ in parts], [g for _, g, _ in parts], *cross)
    whole = torch.linalg.solve(matrix, torch.cat([vector for _, _, vector in parts]))
    return list(torch.split(whole, [len(vector) for _, _, vector in parts]))


CASES = [*itertools.product(NETS, ["kfac", "kfac_factored", "cholesky"]), ("chain", "tridiagonal")]


@pytest.mark.parametrize(("net", "structure"), CASES)
def test_small_dampings_are_not_lost(net: str, structure: Any) -> None:
    model, inputs = NETS[net]
    found = {}
    for float64 in (False, True):
        config: dict[str, Any] = {"structure": structure, "damping": TINY, "float64": float64}
        seen = observed(model, inputs, CategoricalLoss(), **config)
        seen.curvature.refresh()
        model.zero_grad()
        output = model(inputs)
        CategoricalLoss()(output, torch.zeros(output.shape[:-1], dtype=torch.long)).backward()
        gradients = seen.curvature.gradients()
        step = seen.curvature.direction(gradients)
        assert all(update.dtype == torch.float32 for update in step.values())
        found[float64] = [layer.matrix(step).double().flatten() for layer in factored(seen)]
    right = wanted(seen, gradients, structure)
    errors = {
        float64: max(gap(mine, truth) for mine, truth in zip(steps, right, strict=True))
        for float64, steps in found.items()
    }
    assert errors[True] < 1e-6
    assert errors[False] > 10 * errors[True]


def test_rows_are_summed_in_float64() -> None:
    model, inputs = NETS["chain"]
    seen = observed(model, inputs, CategoricalLoss(), float64=True)
    rows = torch.cat([inputs.double(), torch.ones(20, 1).double()], 1)
    assert gap(seen.layer("0").a.mean(), rows.mT @ rows / 20) < 1e-15
    with torch.no_grad():
        hidden = model[:2](inputs).double()
    rows = torch.cat([hidden, torch.ones(20, 1).double()], 1)
    assert gap(seen.layer("2").a.mean(), rows.mT @ rows / 20) < 1e-15


@pytest.mark.parametrize("structure", ["ekfac", "cholesky", "tridiagonal"])
def test_runs_train_and_resume(structure: Any) -> None:
    model, inputs = NETS["chain"]
    config = plain_config(structure=structure, float64=True, refresh_interval=2)

    def train(optimizer: KFAC, steps: int) -> None:
        for _ in range(steps):
            with optimizer.capture() as captured:
                output = model(inputs)
            optimizer.observe(captured, output, CategoricalLoss())
            optimizer.zero_grad()
            CategoricalLoss()(output, torch.zeros(20, dtype=torch.long)).backward()
            optimizer.step()

    optimizer = KFAC(model, config)
    train(optimizer, 3)
    resumed = KFAC(model, config)
    resumed.load_state_dict(snapshot(optimizer))
    assert same(resumed.state_dict(), optimizer.state_dict())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    other = KFAC(model, plain_config(structure=structure))
    other.load_state_dict(snapshot(optimizer))  # types are cast
    factors = [x.value for b in other.curvature.stats.values() for x in b.factors]
    assert {factor.dtype for factor in factors} == {torch.float32}


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_a_rule_is_tried_out_in_the_precision_of_its_layer() -> None:
    model = nn.Sequential(Turned(), nn.Tanh(), nn.Linear(3, 2))
    rule = LayerRule(matrix=lambda _, w: w.mT, tensor=lambda _, m: m.mT)
    curvature = Preconditioner(model, plain_config(float64=True), layers={Turned: rule})
    with curvature.capture() as captured:
        output = model(torch.randn(7, 4))
    curvature.observe(captured, output, CategoricalLoss())
    assert {block.a.value.dtype for block in curvature.stats.values()} == {torch.float64}


class TiedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.head(self.table(tokens).tanh())
        return output


@pytest.mark.parametrize("limit", [1, 100])
def test_a_tied_table_has_factors_in_float64(limit: int) -> None:
    config: dict[str, Any] = {"float64": True, "dense_limit": limit, "structure": "cholesky"}
    tokens = torch.randint(7, (6, 3), generator=seeded(2))
    seen = observed(TiedNet(), tokens, CategoricalLoss(), **config)
    seen.again()
    (block,) = seen.curvature.stats.values()
    assert {factor.value.dtype for factor in block.factors} == {torch.float64}
    assert {factor.mean().dtype for factor in block.factors} == {torch.float64}
