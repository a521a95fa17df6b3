"""One network and objective, in this package and in the independent library curvlinops.

Where both are asked for the same thing they share nothing but torch: curvlinops has its own hooks,
patches, roots of the loss's Hessian, scales and inverses. Only its public interface is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    BernoulliLoss,
    CategoricalLoss,
    Exact,
    GaussianLoss,
    KroneckerBlock,
    OutputLoss,
    Preconditioner,
    SumLoss,
)
from acktr.kfac.blocks.kronecker import Corrected
from tests.tools.kfac import basis, build, plain_config, randn, scales, seeded

curvlinops = pytest.importorskip("curvlinops")

Kind = Literal["cross-entropy", "squared error", "binary"]
Reduction = Literal["mean", "sum"]
KINDS: tuple[Kind, ...] = ("cross-entropy", "squared error", "binary")
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum")
TORCH_LOSSES: dict[Kind, Callable[..., nn.Module]] = {
    "cross-entropy": nn.CrossEntropyLoss,
    "squared error": nn.MSELoss,
    "binary": nn.BCEWithLogitsLoss,
}


class ClassesSecond(nn.Module):
    """(N, ..., D) to (N, D, ...), which torch's cross-entropy wants."""

    def forward(self, output: Tensor) -> Tensor:
        return output.movedim(-1, 1)


class ClassesLast(nn.Module):
    """(N, D, ...) to (N, ..., D)."""

    def forward(self, output: Tensor) -> Tensor:
        return output.movedim(1, -1)


class InTuple(nn.Module):
    """A tuple of one output, for SumLoss."""

    def forward(self, output: Tensor) -> tuple[Tensor]:
        return (output,)


class MeanOver(nn.Module):
    """Mean over some dimensions."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean(self.dims)


@dataclass(frozen=True)
class Problem:
    """A network with output (N, ..., D), its batch, and a loss of torch."""

    net: nn.Sequential
    inputs: Tensor
    kind: Kind = "cross-entropy"
    reduction: Reduction = "mean"
    sharing: Literal["expand", "reduce"] = "expand"

    @property
    def width(self) -> int:
        with torch.no_grad():
            return int(self.net(self.inputs).shape[-1])

    @property
    def targets(self) -> Tensor:
        with torch.no_grad():
            shape = self.net(self.inputs).shape
        if self.kind == "cross-entropy":
            return torch.randint(shape[-1], shape[:-1], generator=seeded(1))
        drawn = randn(*shape, seed=1)
        return (drawn > 0).double() if self.kind == "binary" else drawn

    # --- this package -----------------------------------------------------------------------------

    @property
    def loss(self) -> OutputLoss[Any]:
        """Our loss of the same value; torch's mean of squared or binary errors is also over D."""
        share = self.width if self.reduction == "mean" else 1
        if self.kind == "cross-entropy":
            return CategoricalLoss(reduction=self.reduction)
        if self.kind == "squared error":
            return GaussianLoss(std=math.sqrt(share / 2), reduction=self.reduction)
        return SumLoss(parts=(BernoulliLoss(reduction=self.reduction),), weights=(1 / share,))

    @property
    def our_net(self) -> nn.Sequential:
        return nn.Sequential(*self.net, InTuple()) if self.kind == "binary" else self.net

    def ours(self, source: Any = None, batches: int = 1, **settings: Any) -> Preconditioner:
        """Our curvature of the batch, decomposed."""
        shared = {"conv_sharing": self.sharing, "linear_sharing": self.sharing, "stat_decay": 0.0}
        found = Preconditioner(self.our_net, plain_config(**{**shared, **settings}))
        self.observe(found, source, batches)
        found.refresh()
        if found.config.structure == "ekfac":  # a second time, in the basis found by the first
            self.observe(found, source, batches)
        return found

    def observe(self, curvature: Preconditioner, source: Any = None, batches: int = 1) -> None:
        parts = torch.tensor_split(self.inputs, batches)
        for number, part in enumerate(parts, 1):
            with curvature.capture() as captured:
                output = curvature.module(part)
            last = number == len(parts)
            curvature.observe(captured, output, self.loss, source=source or Exact(), last=last)

    # --- curvlinops -------------------------------------------------------------------------------

    @property
    def torch_loss(self) -> nn.Module:
        return TORCH_LOSSES[self.kind](reduction=self.reduction)

    @property
    def their_net(self) -> nn.Sequential:
        several = self.kind == "cross-entropy" and self.targets.dim() > 1
        return nn.Sequential(*self.net, ClassesSecond()) if several else self.net

    def operator(self, name: str, batches: int = 1, **settings: Any) -> Any:
        """One of their operators, over the trainable parameters in order."""
        data = list(
            zip(
                torch.tensor_split(self.inputs, batches),
                torch.tensor_split(self.targets, batches),
                strict=True,
            )
        )
        trainable = [p for p in self.net.parameters() if p.requires_grad]
        make = getattr(curvlinops, name)
        loss, net = self.torch_loss, self.their_net
        return make(net, loss, trainable, data, check_deterministic=False, **settings)

    def theirs(self, name: str = "KFACLinearOperator", batches: int = 1, **settings: Any) -> Any:
        """Their Kronecker-factored curvature, with the bias as a homogeneous coordinate."""
        chosen = {
            "fisher_type": "type-2",
            "kfac_approx": self.sharing,
            "separate_weight_and_bias": False,
            **settings,
        }
        return self.operator(name, batches, **chosen)

    def gauss_newton(self) -> Tensor:
        """The exact Gauss-Newton matrix by curvlinops, which judges where the two differ."""
        return dense(self.operator("GGNLinearOperator"))

    def gradients(self) -> dict[str, Tensor]:
        named = {n: p for n, p in self.net.named_parameters() if p.requires_grad}
        value = self.torch_loss(self.their_net(self.inputs), self.targets)
        return dict(zip(named, torch.autograd.grad(value, list(named.values())), strict=True))


def layers(curvature: Preconditioner) -> list[KroneckerBlock]:
    return [block for block in curvature.blocks if isinstance(block, KroneckerBlock)]


def dense(operator: Any) -> Tensor:
    """An operator of curvlinops as a matrix over all parameters in order."""
    found: Tensor = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
    return found


def dense_block(block: KroneckerBlock) -> Tensor:
    """Our block over its row-major ([k,] out, in [+ 1]) matrix, with corrected eigenvalues if any.

    There are no products between the k groups of a convolution.
    """
    if not isinstance(block.inverse, Corrected):
        a, g = block.a.mean(), block.g.mean()
        a = a.diag() if a.dim() == 1 else a
        if a.dim() == 2:
            return torch.kron(g, a)
        groups = [torch.kron(*pair) for pair in zip(g, a, strict=True)]
        joined: Tensor = torch.block_diag(*groups)  # type: ignore[no-untyped-call]
        return joined
    _, a_vectors, _, g_vectors = basis(block)
    assert a_vectors is not None
    vectors = torch.kron(g_vectors, a_vectors)
    return vectors @ scales(block).flatten().diag() @ vectors.mT


def places(block: KroneckerBlock, named: dict[str, nn.Parameter]) -> Tensor:
    """Where the entries of the block's matrix are among all parameters in order."""
    offsets, start = {}, 0
    for name, parameter in named.items():
        offsets[name] = torch.arange(start, start + parameter.numel()).reshape(parameter.shape)
        start += parameter.numel()
    return block.layer.matrix(offsets)


def whole(curvature: Preconditioner) -> Tensor:
    """Our curvature as a matrix over all parameters in order, zero between blocks."""
    size = sum(parameter.numel() for parameter in curvature.named.values())
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for block in layers(curvature):
        rows = places(block, curvature.named).flatten()
        matrix[rows[:, None], rows] = dense_block(block)
    return matrix


def masked(matrix: Tensor, curvature: Preconditioner) -> Tensor:
    """A matrix over all parameters without the products that our curvature leaves out."""
    kept = torch.zeros_like(matrix)
    for block in layers(curvature):
        where = places(block, curvature.named)
        for rows in where.flatten(1) if where.dim() == 3 else (where.flatten(),):
            kept[rows[:, None], rows] = matrix[rows[:, None], rows]
    return kept


def block_deviations(found: Tensor, expected: Tensor, curvature: Preconditioner) -> Tensor:
    """The deviation in each of our blocks by itself; what lies outside of them is not looked at."""
    rows = [places(block, curvature.named).flatten() for block in layers(curvature)]
    cuts = [(found[r[:, None], r], expected[r[:, None], r]) for r in rows]
    return torch.tensor([deviation(*cut) for cut in cuts])


def deviation(found: Tensor, expected: Tensor) -> float:
    """Largest difference in units of the largest expected entry."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def mlp() -> tuple[nn.Sequential, Tensor]:
    net = build(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))
    return net, randn(6, 4, seed=11)


def without_bias() -> tuple[nn.Sequential, Tensor]:
    net = build(
        nn.Linear(4, 5, bias=False), nn.Sigmoid(), nn.Linear(5, 4), nn.Linear(4, 3, bias=False)
    )
    return net, randn(6, 4, seed=12)


def deep_linear() -> tuple[nn.Sequential, Tensor]:
    return build(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 3)), randn(5, 3, seed=13)


def strided() -> tuple[nn.Sequential, Tensor]:
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    return build(conv, nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)), randn(4, 2, 6, 5, seed=14)


def dilated() -> tuple[nn.Sequential, Tensor]:
    first = nn.Conv2d(2, 3, (2, 3), dilation=(2, 1), padding=(0, 2), stride=(1, 2))
    second = nn.Conv2d(3, 2, 2, dilation=2, bias=False)
    net = build(first, nn.Tanh(), second, nn.ELU(inplace=True), nn.Flatten(), nn.Linear(8, 3))
    return net, randn(4, 2, 6, 6, seed=15)


def pooled_conv() -> tuple[nn.Sequential, Tensor]:
    convs = (nn.Conv2d(2, 3, 3, padding="same"), nn.Tanh(), nn.Conv2d(3, 4, 2, padding="valid"))
    return build(*convs, MeanOver(2, 3), nn.Linear(4, 3)), randn(4, 2, 4, 5, seed=16)


def pooled_series() -> tuple[nn.Sequential, Tensor]:
    net = build(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), MeanOver(1, 2), nn.Linear(4, 3)
    )
    return net, randn(4, 2, 3, 3, seed=17)


def series() -> tuple[nn.Sequential, Tensor]:
    net = build(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False))
    return net, randn(4, 5, 3, seed=18)


def pixels() -> tuple[nn.Sequential, Tensor]:
    convs = (nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 1))
    return build(*convs, ClassesLast()), randn(3, 2, 3, 2, seed=19)


NETS = {
    "mlp": mlp,
    "without bias": without_bias,
    "deep linear": deep_linear,
    "strided": strided,
    "dilated": dilated,
    "pooled conv": pooled_conv,
    "pooled series": pooled_series,
    "series": series,
    "pixels": pixels,
}
SEVERAL_TERMS = ("series", "pixels")
