"""Ground truth for the tests of the losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from acktr.kfac.losses.likelihoods import (
    BernoulliLoss,
    CategoricalLoss,
    GaussianLoss,
    LearntGaussianLoss,
    OutputLoss,
    Reduction,
)
from tests.tools.kfac import EXACT, randn, seeded

REDUCTIONS: tuple[Reduction, ...] = ("mean", "batchmean", "sum")
hessian: Callable[..., Any] = torch.autograd.functional.hessian
jacobian: Callable[..., Any] = torch.autograd.functional.jacobian
SHAPES = [(4, 3), (3, 2, 3), (2, 2, 2, 3)]
STD = 0.7
Maker = Callable[[Reduction], OutputLoss[Tensor]]
MAKERS: dict[str, Maker] = {
    "categorical": lambda r: CategoricalLoss(reduction=r),
    "bernoulli": lambda r: BernoulliLoss(reduction=r),
    "gaussian": lambda r: GaussianLoss(std=STD, reduction=r),
    "learnt": lambda r: LearntGaussianLoss(reduction=r),
}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=EXACT["rtol"], atol=EXACT["atol"])


def divisor(shape: tuple[int, ...], reduction: Reduction) -> float:
    return {"mean": math.prod(shape[:-1]), "batchmean": shape[0], "sum": 1}[reduction]


def made_output(kind: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random output for events of width shape[-1]; twice as wide for the learnt Gaussian."""
    wide = (*shape[:-1], 2 * shape[-1]) if kind == "learnt" else shape
    return randn(*wide, seed=seed)


def made_target(kind: str, shape: tuple[int, ...], seed: int = 1) -> Tensor:
    if kind == "categorical":
        return torch.randint(shape[-1], shape[:-1], generator=seeded(seed))
    if kind == "bernoulli":
        return torch.rand(shape, generator=seeded(seed), dtype=torch.float64)
    return randn(*shape, seed=seed)


def spread_targets(kind: str, output: Tensor) -> list[Tensor]:
    """Targets over which the average Hessian is the expected one.

    Only the learnt Gaussian's Hessian depends on them, as a quadratic function of (y - m) / s: two
    points at -1 and 1 have the mean and the variance of the model's distribution.
    """
    if kind == "learnt":
        mean, log_std = output.chunk(2, -1)
        return [mean - log_std.exp(), mean + log_std.exp()]
    return [made_target(kind, tuple(output.shape))]


def autograd_hessian(loss: OutputLoss[Tensor], kind: str, output: Tensor) -> Tensor:
    """Dense expected Hessian of the *objective* over the flattened output."""
    size = output.numel()
    targets = spread_targets(kind, output)
    found = [hessian(lambda o, y=y: loss(o, y), output).reshape(size, size) for y in targets]
    return torch.stack(found).mean(0)


def dense(loss: OutputLoss[Tensor], output: Tensor) -> Tensor:
    """H of all terms as a matrix, from its products with unit vectors."""
    units = torch.eye(output.numel(), dtype=output.dtype)
    columns = [loss.hessian_product(output, unit.reshape(output.shape)).flatten() for unit in units]
    return torch.stack(columns, dim=1)


def gradient(scalar: Tensor, output: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(scalar, output)
    return found


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over rows and its standard error."""
    return rows.mean(0), rows.std(0) / len(rows) ** 0.5
