"""The matrices, their damped inverses, and how far they are from the exact ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    Exact,
    KFACConfig,
    Preconditioner,
    dense_fisher,
    dense_inverse,
    dense_kfac,
    relative_error,
)
from scripts.approximation.digits import SIDE, digits

CLASSES = 10
SEED = 0
DAMPINGS = (0.1, 0.01, 0.001)
_CHUNK = 20
"""Samples whose Jacobians are in memory at once."""
_PLAIN = replace(KFACConfig.for_rl(), quadratic="corrected")
_KFAC: dict[str, dict[str, Any]] = {
    "K-FAC": {},
    "K-FAC (factored damping)": {"structure": "kfac_factored"},
    "EKFAC": {"structure": "ekfac"},
    "K-FAC tridiagonal": {"structure": "tridiagonal"},
}
METHODS = ("exact", "exact block diagonal", "exact block tridiagonal", *_KFAC)
"""What is compared; all but the first are approximations."""


@dataclass(frozen=True)
class Settings:
    """What decides every number."""

    samples: int = 1000
    steps: int = 20
    width: int = 20
    hidden: int = 5


@dataclass(frozen=True)
class Problem:
    """A partly trained classifier, of which only the layers between hidden ones are trainable."""

    model: nn.Sequential
    inputs: Tensor
    loss: CategoricalLoss
    gradient: Tensor
    """Of the loss by the trainable parameters, (P,)."""
    objective: float
    accuracy: float
    sizes: tuple[int, ...]
    """Parameters of each trainable layer."""


class Candidate(NamedTuple):
    """An approximation: the damped matrix and its inverse."""

    matrix: Tensor
    inverse: Tensor


class Row(NamedTuple):
    """One line of the table."""

    method: str
    damping: float
    matrix: float
    """||M - (F + lambda I)|| / ||F + lambda I||."""
    blocks: float
    """The same for the diagonal blocks alone."""
    inverse: float
    """||M^-1 - (F + lambda I)^-1|| / ||(F + lambda I)^-1||."""
    cosine: float
    """Between M^-1 g and (F + lambda I)^-1 g."""
    decrease: float
    """Decrease of the damped quadratic model by the best multiple of M^-1 g, best possible = 1."""


def trained(settings: Settings) -> Problem:
    """Train the classifier for some steps, then freeze its first and last layer.

    The first layer has most of the parameters and the last has a singular factor, since the logits
    of a softmax are defined up to a constant; Martens & Grosse 2015 leave them out as well.
    """
    generator = torch.Generator().manual_seed(SEED)
    inputs, labels = digits(settings.samples, generator)
    widths = [SIDE**2, *[settings.width] * settings.hidden, CLASSES]
    parts: list[nn.Module] = []
    for before, after in pairwise(widths):
        parts += [nn.Linear(before, after, dtype=torch.float64), nn.Tanh()]
    model = nn.Sequential(*parts[:-1])
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            fan_in = parameter.shape[1] if parameter.dim() > 1 else math.inf
            parameter.copy_(drawn / fan_in**0.5)
    loss = CategoricalLoss()
    _train(model, inputs, labels, loss, settings)
    linear = [part for part in model if isinstance(part, nn.Linear)]
    for layer in (linear[0], linear[-1]):
        layer.requires_grad_(False)
    model.zero_grad()
    output = model(inputs)
    value = loss(output, labels)
    value.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    accuracy = float((output.argmax(1) == labels).double().mean())
    sizes = tuple(sum(p.numel() for p in layer.parameters()) for layer in linear[1:-1])
    return Problem(
        model, inputs, loss, torch.cat(gradients), float(value.detach()), accuracy, sizes
    )


def _train(
    model: nn.Sequential, inputs: Tensor, labels: Tensor, loss: CategoricalLoss, settings: Settings
) -> None:
    config = replace(_PLAIN, lr=0.5, kl_clip=0.01, stat_decay=0.9, refresh_interval=1)
    optimizer = KFAC(model, config, seed=SEED)
    for _ in range(settings.steps):
        with optimizer.capture() as captured:
            output = model(inputs)
        optimizer.observe(captured, output, loss)
        optimizer.zero_grad()
        loss(output, labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def exact_fisher(problem: Problem) -> Tensor:
    """The Fisher matrix (P, P) of the mean loss over all samples."""
    parts = torch.split(problem.inputs, _CHUNK)
    total = sum(dense_fisher(problem.model, (part,), problem.loss) * len(part) for part in parts)
    return torch.as_tensor(total) / len(problem.inputs)


def candidates(problem: Problem, fisher: Tensor, damping: float) -> Iterator[tuple[str, Candidate]]:
    """Every method's damped matrix and inverse, in the order of METHODS."""
    exact = fisher + damping * torch.eye(len(fisher), dtype=fisher.dtype)
    diagonal = block_diagonal(exact, problem.sizes)
    chain = tridiagonal_completion(exact, problem.sizes)
    for name, matrix in zip(METHODS[:3], (exact, diagonal, chain), strict=True):
        yield name, Candidate(matrix, torch.cholesky_inverse(torch.linalg.cholesky(matrix)))
    for name, extra in _KFAC.items():
        yield name, _kfac(problem, replace(_PLAIN, damping=damping, stat_decay=0.0, **extra))


def _kfac(problem: Problem, config: KFACConfig) -> Candidate:
    """The library's matrices, from exact statistics of all samples."""
    curvature = Preconditioner(problem.model, config)
    for turn in range(2 if config.structure == "ekfac" else 1):
        with curvature.capture() as captured:
            output = problem.model(problem.inputs)
        curvature.observe(captured, output, problem.loss, source=Exact())
        if turn == 0:
            curvature.refresh()
    return Candidate(dense_kfac(curvature, damped=True), dense_inverse(curvature))


def compare(problem: Problem, exact: Candidate, name: str, found: Candidate, damping: float) -> Row:
    """Measure one candidate against the exact one at the same damping."""
    best, step = exact.inverse @ problem.gradient, found.inverse @ problem.gradient
    slope, curved = problem.gradient @ step, step @ exact.matrix @ step
    return Row(
        method=name,
        damping=damping,
        matrix=relative_error(found.matrix, exact.matrix),
        blocks=relative_error(
            block_diagonal(found.matrix, problem.sizes), block_diagonal(exact.matrix, problem.sizes)
        ),
        inverse=relative_error(found.inverse, exact.inverse),
        cosine=float(best @ step / (best.norm() * step.norm())),
        decrease=float(slope.square() / curved / (problem.gradient @ best)),
    )


def block_diagonal(matrix: Tensor, sizes: Sequence[int]) -> Tensor:
    """The matrix without the blocks of two different layers."""
    layer = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return torch.where(layer[:, None] == layer, matrix, 0.0)


def tridiagonal_completion(matrix: Tensor, sizes: Sequence[int]) -> Tensor:
    """The one matrix with the same blocks for |i - j| <= 1 and a block-tridiagonal inverse.

    Its other blocks are M_ij = M_i,i+1 M_i+1,i+1^-1 M_i+1,j for j > i + 1.
    """
    rows = _blocks(matrix, sizes)
    for j in range(2, len(sizes)):
        for i in range(j - 2, -1, -1):
            rows[i][j] = rows[i][i + 1] @ torch.linalg.solve(rows[i + 1][i + 1], rows[i + 1][j])
            rows[j][i] = rows[i][j].mT
    return torch.cat([torch.cat(row, 1) for row in rows], 0)


def layer_means(matrix: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mean absolute value of each layer's block with each other layer's, (L, L)."""
    rows = _blocks(matrix.abs(), sizes)
    return torch.stack([torch.stack([block.mean() for block in row]) for row in rows])


def _blocks(matrix: Tensor, sizes: Sequence[int]) -> list[list[Tensor]]:
    rows = torch.split(matrix, list(sizes), 0)
    return [list(torch.split(row, list(sizes), 1)) for row in rows]
