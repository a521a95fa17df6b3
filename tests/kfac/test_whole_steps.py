"""Whole steps of networks of many kinds, in every setting, against dense matrices of Jacobians."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import KFAC, Exact, KFACConfig, KroneckerBlock
from acktr.kfac.blocks.diagonal import PRIOR, DiagonalBlock
from acktr.kfac.blocks.registry import Block
from acktr.kfac.blocks.vectors import VectorBlock
from acktr.kfac.losses import sources
from tests.tools.kfac import basis, moved, parameters, plain_config, scales
from tests.tools.product_cases import filled
from tests.tools.rows import Dense, Taps
from tests.tools.written_out import WRITTEN, Named, Written

LAMBDA, LR, CLIP, MOMENTUM, RTOL = 0.03, 0.7, 0.002, 0.9, 1e-10
SETTINGS: dict[str, dict[str, Any]] = {
    "kfac": {},
    "reduce": {"conv_sharing": "reduce", "linear_sharing": "reduce"},
    "pi": {"structure": "kfac_factored"},
    "cholesky": {"structure": "cholesky"},
    "ekfac": {"structure": "ekfac"},
    "exact": {"quadratic": "exact"},
    "corrected": {"quadratic": "corrected"},
    "gradient": {"small_parameters": "gradient"},
    "dense": {"small_parameters": "dense"},
}


def agree(found: Tensor, expected: Tensor) -> None:
    """Largest entries are of the order of 0.01 to 10; keys have none with "reduce"."""
    torch.testing.assert_close(found, expected, rtol=RTOL, atol=1e-13)


def model_of(case: Written) -> nn.Module:
    return filled(case.make())


@cache
def dense(name: str) -> Dense:
    case = WRITTEN[name]
    model, taps = model_of(case), Taps()
    named = dict(model.named_parameters())
    outputs = case.reference(named, case.inputs, taps)
    given = model(case.inputs)
    for mine, theirs in zip(outputs, given if isinstance(given, tuple) else (given,), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
    return Dense(outputs, taps, named, case.hessians, case.weights)


# --- the dense step -------------------------------------------------------------------------------


def cut(truth: Dense, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Where parameters lie in the whole Fisher."""
    index, start = {}, 0
    for name, parameter in truth.named.items():
        index[name] = torch.arange(start, start + parameter.numel()).view(parameter.shape)
        start += parameter.numel()
    return {name: index[name] for name in names}


def pairs(truth: Dense, case: Written, name: str, sharing: str) -> list[tuple[Tensor, Tensor]]:
    """A and G of every matrix of a layer; of a tied table the partial traces of the sum."""
    if (name, 1) in truth.taps.rows and name not in case.parts:
        (left, right), (hidden, logits) = (truth.factors((name, k), "expand") for k in (0, 1))
        table = right.trace() * left + hidden.trace() * logits
        return [(table / table.trace(), left.trace() * right + logits.trace() * hidden)]
    return [truth.factors((name, k), sharing) for k in range(case.parts.get(name, 1))]


def solved(a: Tensor, g: Tensor, gradient: Tensor, structure: str) -> Tensor:
    """U of a matrix."""
    eye_a, eye_g = torch.eye(len(a)).double(), torch.eye(len(g)).double()
    if structure == "kfac":
        full = torch.kron(g, a) + LAMBDA * torch.kron(eye_g, eye_a)
    else:
        pi, root = (a.trace() / len(a) / (g.trace() / len(g))).sqrt(), LAMBDA**0.5
        full = torch.kron(g + root / pi * eye_g, a + root * pi * eye_a)
    return torch.linalg.solve(full, gradient.flatten()).view_as(gradient)


def corrected(bases: tuple[Tensor, Tensor], fisher: Tensor, gradient: Tensor) -> Tensor:
    """U of a matrix in the basis of A and of G, and the diagonal of the Fisher there."""
    turn = torch.kron(bases[1].contiguous(), bases[0].contiguous())
    exact = (turn.mT @ fisher @ turn).diagonal()
    step = turn @ (turn.mT @ gradient.flatten() / (exact + LAMBDA))
    return torch.stack([step.view_as(gradient), exact.view_as(gradient)])


def kronecker_step(
    block: KroneckerBlock, truth: Dense, case: Written, gradients: Named, config: KFACConfig
) -> Named:
    """U of a layer; its factors are compared on the way."""
    words = isinstance(block.layer.module, nn.Embedding)  # tokens have no mean
    every = pairs(truth, case, block.name, "expand" if words else config.linear_sharing)
    a, g = (torch.stack(parts) for parts in zip(*every, strict=True))
    mine = block.a.mean()
    agree((mine.diag() if mine.dim() == 1 else mine).view_as(a), a)
    agree(block.g.mean().view_as(g), g)
    matrix = block.layer.matrix(gradients)
    stacked = matrix.reshape(len(a), *matrix.shape[-2:])
    if config.structure == "ekfac":
        places = block.layer.matrix(cut(truth, block.names)).reshape(len(a), -1)
        fishers = [truth.fisher[place][:, place] for place in places]
        _, q_a, _, q_g = basis(block)
        q_a = torch.eye(a.shape[-1]).double() if q_a is None else q_a
        bases = [q_a.view_as(a), q_g.view_as(g)]
        for factor, vectors in zip((a, g), bases, strict=True):
            rotated = vectors.mT @ factor @ vectors
            agree(torch.diag_embed(rotated.diagonal(dim1=1, dim2=2)), rotated)
        each = zip(zip(*bases, strict=True), fishers, stacked, strict=True)
        steps, exact = torch.stack([corrected(*one) for one in each], 1)
        agree(scales(block).view_as(exact), exact)
    else:
        each = zip(a, g, stacked, strict=True)
        steps = torch.stack([solved(*one, config.structure) for one in each])
    return block.layer.split(steps.view_as(matrix))


def dense_step(
    block: Block, truth: Dense, case: Written, gradients: Named, config: KFACConfig
) -> Named:
    """U of a block by dense algebra; what the block stores is compared on the way."""
    if isinstance(block, KroneckerBlock):
        return kronecker_step(block, truth, case, gradients, config)
    if not isinstance(block, DiagonalBlock | VectorBlock):
        return {name: gradients[name] for name in block.names}
    index = cut(truth, block.names)
    places = torch.cat([place.flatten() for place in index.values()])
    fisher = truth.fisher[places][:, places]
    flat = torch.cat([gradients[name].flatten() for name in block.names])
    if isinstance(block, DiagonalBlock):
        agree(block.moment.mean().flatten(), fisher.diagonal())
        drawn = (fisher.diagonal() + PRIOR * fisher.diagonal().mean()) / (1 + PRIOR)
        flat = flat / (drawn + LAMBDA)
    else:
        agree(block.moment.mean(), fisher)
        flat = torch.linalg.solve(fisher + LAMBDA * torch.eye(len(flat)).double(), flat)
    sizes = [place.numel() for place in index.values()]
    given = zip(index.items(), flat.split(sizes), strict=True)
    return {name: part.view(place.shape) for (name, place), part in given}


HADAMARD = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 1]]).double()
"""Signs, 1 and 0 for -1, whose products for different samples have a mean of exactly zero."""


def observe(
    optimizer: KFAC, model: nn.Module, case: Written, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Curvature of one batch, in four equal parts with every row of signs; returns the output."""
    with optimizer.capture() as captured:
        output = model(case.inputs)
    for turn, signs in enumerate(HADAMARD):
        with monkeypatch.context() as patch:
            patch.setattr(sources.torch, "rand", lambda n, *, s=signs, **_: s[:n].clone())
            optimizer.observe(captured, output, case.loss, source=Exact(), last=turn == 3)
    return output


@pytest.mark.filterwarnings("ignore::acktr.kfac.UnsupportedParameterWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", WRITTEN)
def test_a_step_is_that_of_dense_matrices(
    name: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, truth = WRITTEN[name], dense(name)
    model = model_of(case)
    chosen = {"quadratic": "kronecker", **SETTINGS[setting]}
    fixed: dict[str, Any] = {
        "damping": LAMBDA,
        "lr": LR,
        "kl_clip": CLIP,
        "momentum": MOMENTUM,
        "stat_decay": 0.0,
    }
    config = plain_config(**fixed, **chosen)
    optimizer = KFAC(model, config)
    output = observe(optimizer, model, case, monkeypatch)
    optimizer.refresh()
    if config.structure == "ekfac":  # its scales are of batches after the basis
        output = observe(optimizer, model, case, monkeypatch)
    case.loss(output, case.target).backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    steps: dict[str, Tensor] = {}
    for block in optimizer.blocks:
        steps.update(dense_step(block, truth, case, gradients, config))
    assert set(steps) == set(gradients)
    direction = optimizer.direction()
    size = max(float(step.abs().max()) for step in steps.values())
    near: dict[str, Any] = {"rtol": RTOL, "atol": RTOL * size}
    for key, step in steps.items():
        torch.testing.assert_close(direction[key], step, **near)
    flat = torch.cat([steps[key].flatten() for key in truth.named])
    whole = torch.cat([gradients[key].flatten() for key in truth.named])
    q = whole @ flat if config.quadratic == "kronecker" else flat @ truth.fisher @ flat
    nu = float((CLIP / (LR**2 * q)) ** 0.5)
    assert nu < 1
    before = parameters(model)
    optimizer.step()
    assert optimizer.last_step is not None
    torch.testing.assert_close(optimizer.last_step.quadratic, q, rtol=RTOL, atol=0.0)
    assert float(optimizer.last_step.scale) == pytest.approx(nu, rel=RTOL)
    for key, change in moved(before, model).items():
        torch.testing.assert_close(change, LR * (1 - MOMENTUM) * nu * steps[key], **near)
