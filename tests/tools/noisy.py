"""Ground truth for the tests of noisy K-FAC: posteriors as dense matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from acktr.kfac import Exact, GaussianLoss, OutputLoss, dense_kfac, flattened
from acktr.kfac.losses.sources import Source
from acktr.kfac.noisy import NoisyConfig, NoisyKFAC
from tests.tools.kfac import build, randn

TAU, ETA, LAMBDA = 2.0, 0.7, 0.6
"""Noise precision, prior variance and KL weight, of which none is 1."""

STRUCTURES = [
    ("mvg", "exact"),
    ("mvg", "factored"),
    ("emvg", "exact"),
    ("ffg", "exact"),
    ("tridiagonal", "factored"),
]
"""Structures with the forms of damping that they have."""


def noisy(model: nn.Module, data_size: int, **settings: Any) -> NoisyKFAC:
    """Noisy K-FAC with nothing around it: every step refreshes, no momentum, no start."""
    plain: dict[str, Any] = {
        "prior_variance": ETA,
        "kl_weight": LAMBDA,
        "lr": 1.0,
        "momentum": 0.0,
        "refresh_interval": 1,
        "initial_curvature": 0.0,
    }
    seed = settings.pop("seed", 0)
    return NoisyKFAC(model, NoisyConfig(**plain | settings), data_size=data_size, seed=seed)


def context(
    optimizer: NoisyKFAC,
    inputs: Tensor,
    targets: Tensor,
    loss: OutputLoss[Any],
    source: Source | None = None,
) -> None:
    """One weight sample of a step."""
    with optimizer.sampled_params(train=True) as captured:
        output = optimizer.module(inputs)
        optimizer.observe(captured, output, loss, source=source or Exact())
        loss(output, targets).backward()  # type: ignore[no-untyped-call]


def refreshed(optimizer: NoisyKFAC) -> None:
    """Take what was observed, and the decompositions of it, without a step."""
    optimizer.curvature.fold()
    optimizer.curvature.refresh()


def units(posterior: Any) -> Iterator[dict[str, Tensor]]:
    """The noise of every unit vector in the place of the normal numbers."""
    shapes: list[torch.Size] = []

    def record(like: Tensor) -> Tensor:
        shapes.append(like.shape)
        return torch.zeros_like(like)

    posterior.draw(record)
    sizes = [shape.numel() for shape in shapes]
    for unit in torch.eye(sum(sizes), dtype=torch.float64):
        parts = iter(torch.split(unit, sizes))

        def column(like: Tensor, parts: Iterator[Tensor] = parts) -> Tensor:
            return next(parts).reshape(like.shape).to(like.dtype)

        yield posterior.draw(column)


def names_of(optimizer: NoisyKFAC) -> list[str]:
    """Names with noise, in the order of the module."""
    return [n for n in optimizer.curvature.named if n in optimizer.posterior.prior.names]


@torch.no_grad()
def covariance(optimizer: NoisyKFAC, names: list[str] | None = None) -> Tensor:
    """Sigma = R R^T over the names, each parameter row by row."""
    names = names or names_of(optimizer)
    root = torch.stack([flattened(noise, names) for noise in units(optimizer.posterior)], dim=1)
    return root @ root.mT


def expected(optimizer: NoisyKFAC, eta: float = ETA) -> Tensor:
    """(lambda / N) (F + lambda / (N eta) I)^-1 with the curvature as a dense matrix."""
    scale = optimizer.kl_weight / optimizer.data_size
    fisher = dense_kfac(optimizer.curvature)
    return scale * torch.linalg.inv(fisher + scale / eta * torch.eye(len(fisher)).to(fisher))


def linear_data(count: int = 50, width: int = 6, outputs: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets, and the inputs with a column of ones for the bias."""
    inputs, targets = randn(count, width, seed=3), randn(count, outputs, seed=4)
    return inputs, targets, torch.cat([inputs, inputs.new_ones(count, 1)], dim=1)


def linear_posterior(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (outputs, width + 1) and covariance (width + 1, width + 1) of each output's weights."""
    eye = torch.eye(rows.shape[1], dtype=rows.dtype)
    precision = TAU * rows.mT @ rows / LAMBDA + eye / ETA
    mean = torch.linalg.solve(precision, TAU / LAMBDA * rows.mT @ targets).mT
    return mean, torch.linalg.inv(precision)


def linear_model(width: int = 6, outputs: int = 2) -> nn.Sequential:
    return build(nn.Linear(width, outputs))


def gaussian(**settings: Any) -> GaussianLoss:
    return GaussianLoss(std=TAU**-0.5, **settings)


def by_rows(weight_then_bias: Tensor, outputs: int, width: int) -> Tensor:
    """A matrix over (weight, bias) in the order of the rows (out, in + 1)."""
    weight = torch.arange(outputs * width).reshape(outputs, width)
    bias = torch.arange(outputs)[:, None] + outputs * width
    order = torch.cat([weight, bias], dim=1).flatten()
    return weight_then_bias[order[:, None], order]


def within(draws: Tensor, exact: Tensor, errors: float = 5.0) -> None:
    """The covariance of draws (n, P) is the exact one, within some standard errors everywhere."""
    found = draws.mT @ draws / len(draws)
    diagonal = exact.diagonal()
    error = ((diagonal[:, None] * diagonal + exact.square()) / len(draws)).sqrt()
    assert bool(((found - exact).abs() <= errors * error + 1e-12).all())
