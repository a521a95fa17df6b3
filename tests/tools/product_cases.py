"""Small networks for the tests of Fisher products, and their Fisher matrix written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import functional
from torch.func import functional_call

from acktr.kfac.losses.likelihoods import (
    BernoulliLoss,
    CategoricalLoss,
    GaussianLoss,
    LearntGaussianLoss,
    OutputLoss,
    Reduction,
)
from acktr.kfac.losses.sums import SumLoss
from tests.tools.kfac import build, mlp, randn, seeded


class TwoHeads(nn.Module):
    """A trunk with two outputs; the heads see different numbers of terms for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.policy = nn.Linear(5, 3)
        self.value = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x).tanh()
        return self.policy(hidden), self.value(hidden).mean(1) if x.dim() > 2 else self.value(
            hidden
        )


class Tied(nn.Module):
    """One weight under two names, and one layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(3, 3)
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.twice(self.twice(x).tanh()).tanh()
        output: Tensor = self.second(self.first(hidden).sigmoid())
        return output


class LogStd(nn.Module):
    """A policy whose log-stds are parameters of their own, and a value of shape (N,)."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(4, 2)
        self.log_std = nn.Parameter(torch.tensor([0.3, -0.2]))
        self.value = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.mean(x)
        return torch.cat([mean, self.log_std.expand_as(mean)], -1), self.value(x)[:, 0]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def filled(model: nn.Module, seed: int = 3) -> nn.Module:
    model.double()
    generator = seeded(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                drawn = 0.5 * torch.randn(tensor.shape, generator=generator)
                tensor.copy_(drawn)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.abs_().add_(0.5)
    return model


def convolutional() -> nn.Module:
    layers = (
        nn.Conv2d(2, 3, 2, stride=2),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    return filled(nn.Sequential(*layers)).eval()


@dataclass(frozen=True)
class Case:
    model: nn.Module
    inputs: Tensor
    loss: OutputLoss[Any]


def cases(reduction: Reduction) -> dict[str, Case]:
    flat, series = randn(3, 4, seed=1), randn(3, 2, 4, seed=2)
    pair = SumLoss(
        parts=(CategoricalLoss(reduction=reduction), GaussianLoss(std=0.5, reduction=reduction)),
        weights=(0.7, 1.9),
    )
    categorical = CategoricalLoss(reduction=reduction)
    return {
        "categorical": Case(mlp(), flat, categorical),
        "categorical series": Case(mlp(), series, categorical),
        "bernoulli": Case(mlp(), series, BernoulliLoss(reduction=reduction)),
        "gaussian": Case(mlp(), flat, GaussianLoss(std=0.5, reduction=reduction)),
        "learnt gaussian": Case(
            build(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4)),
            series,
            LearntGaussianLoss(reduction=reduction),
        ),
        "two heads": Case(filled(TwoHeads()), flat, pair),
        "heads of different length": Case(filled(TwoHeads()), series, pair),
        "convolution": Case(convolutional(), randn(3, 2, 4, 4, seed=4), categorical),
        "tied": Case(filled(Tied()), randn(3, 3, seed=5), categorical),
    }


def split(model: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    parts = torch.split(flat, [p.numel() for p in named.values()])
    return {n: part.reshape(named[n].shape) for n, part in zip(named, parts, strict=True)}


def joined(vector: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in vector.values()])


def directions(
    model: nn.Module, count: int, seed: int = 0
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    size = sum(p.numel() for p in model.parameters())
    matrix = randn(count, size, seed=seed)
    return matrix, [split(model, row) for row in matrix]


def flat_function(case: Case) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """All outputs in one vector as a function of all parameters in one vector."""
    start = joined({n: p.detach() for n, p in case.model.named_parameters()})

    def function(values: Tensor) -> Tensor:
        output = functional_call(case.model, split(case.model, values), (case.inputs,))
        parts = output if isinstance(output, tuple) else (output,)
        return torch.cat([part.flatten() for part in parts])

    return function, start


def some_targets(loss: OutputLoss[Any], output: Any, sign: float) -> Any:
    """Targets whose Hessian of the loss, averaged over sign = 1 and -1, is the Fisher matrix."""
    if isinstance(loss, SumLoss):
        return tuple(some_targets(p, o, sign) for p, o in zip(loss.parts, output, strict=True))
    if isinstance(loss, CategoricalLoss):
        return torch.zeros(output.shape[:-1], dtype=torch.int64)
    if isinstance(loss, BernoulliLoss):
        return torch.full_like(output, 0.3)
    if isinstance(loss, LearntGaussianLoss):
        mean, log_std = output.chunk(2, -1)
        return mean + sign * log_std.exp()
    return output + 0.4


def written_out(case: Case) -> Tensor:
    """F = J^T H J with J and the Hessian of the objective itself in its outputs, by autograd."""
    function, start = flat_function(case)
    jac = functional.jacobian(function, start)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        output = case.model(case.inputs)
    tensors = output if isinstance(output, tuple) else (output,)
    sizes = [part.numel() for part in tensors]

    def objective(flat: Tensor, target: Any) -> Tensor:
        split_up = torch.split(flat, sizes)
        parts = tuple(p.reshape(o.shape) for p, o in zip(split_up, tensors, strict=True))
        return case.loss(parts if isinstance(output, tuple) else parts[0], target)

    flat = torch.cat([part.flatten() for part in tensors])
    curvature = torch.zeros(len(flat), len(flat), dtype=flat.dtype)
    for sign in (1.0, -1.0):
        target = some_targets(case.loss, output, sign)
        found = functional.hessian(  # type: ignore[no-untyped-call]
            lambda z, t=target: objective(z, t), flat
        )
        curvature += 0.5 * found
    result: Tensor = jac.mT @ curvature @ jac
    return result
