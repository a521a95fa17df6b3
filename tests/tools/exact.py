"""Blocks as the library stores them, and the same blocks cut out of the dense Fisher matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from acktr.kfac import Exact, KFACConfig, KroneckerBlock, OutputLoss, Preconditioner, dense_fisher
from acktr.kfac.blocks.vectors import VectorBlock
from acktr.kfac.config import Sharing
from acktr.kfac.losses.sources import Source

RTOL = 1e-7
Block = KroneckerBlock | VectorBlock


class Apply(nn.Module):
    """A parameter-free function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(inputs)


def close(found: Tensor, expected: Tensor, rtol: float = RTOL) -> None:
    """Entries agree to rtol of the largest one, which must not be zero."""
    scale = float(expected.abs().max())
    assert scale > 0, "the expected tensor is zero: nothing is tested"
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * 1e-3 * scale)


def gap(found: Tensor, expected: Tensor) -> float:
    """Relative distance in the Frobenius norm."""
    return float((found.detach() - expected.detach()).norm() / expected.detach().norm())


def within_four_standard_errors(draws: Tensor, exact: Tensor, most: float = 0.15) -> Tensor:
    """The mean of draws (R, ...) is near the exact value; returns the standard errors.

    The largest of these is below ``most`` of the largest value, so that the test has the power to
    fail.
    """
    error = draws.std(0) / len(draws) ** 0.5
    assert bool(((draws.mean(0) - exact).abs() <= 4 * error + 1e-12).all())
    assert float(error.max()) < most * float(exact.abs().max())
    return error


@dataclass
class Seen:
    """A network whose curvature has observed one batch."""

    model: nn.Module
    inputs: Tensor
    loss: OutputLoss[Any]
    curvature: Preconditioner

    def again(self, source: Source | None = None) -> None:
        """Observe the same batch once more."""
        with self.curvature.capture() as captured:
            output = self.model(self.inputs)
        self.curvature.observe(captured, output, self.loss, source=source or Exact())

    def block(self, name: str) -> Block:
        return self.curvature.stats[name]

    def layer(self, name: str) -> KroneckerBlock:
        found = self.curvature.stats[name]
        assert isinstance(found, KroneckerBlock)
        return found

    def vector(self, name: str) -> VectorBlock:
        found = self.curvature.stats[name]
        assert isinstance(found, VectorBlock)
        return found

    def truth(self, name: str) -> Tensor:
        """The exact Fisher block, in the order of :func:`stored`."""
        block = self.block(name)
        fisher = dense_fisher(self.model, (self.inputs,), self.loss, block.names)
        order = positions(self.model, block)
        return fisher[order][:, order]


def positions(model: nn.Module, block: Block) -> Tensor:
    """Where the entries of the block's matrix lie in its concatenated flat parameters."""
    named = dict(model.named_parameters())
    index, start = {}, 0
    for name in block.names:
        size = named[name].numel()
        index[name] = torch.arange(start, start + size).reshape(named[name].shape)
        start += size
    if isinstance(block, VectorBlock):
        return torch.arange(start)
    return block.layer.matrix(index).flatten()


def observed(
    model: nn.Module,
    inputs: Tensor,
    loss: OutputLoss[Any],
    source: Source | None = None,
    seed: int = 0,
    **settings: Any,
) -> Seen:
    """The curvature of a network after one batch, by default with the exact source."""
    curvature = Preconditioner(model, replace(KFACConfig.for_rl(), **settings), seed=seed)
    seen = Seen(model, inputs, loss, curvature)
    seen.again(source)
    return seen


def pairs(layer: KroneckerBlock) -> list[tuple[Tensor, Tensor]]:
    """(A, G) as full matrices, one pair per group."""
    a, g = layer.a.mean(), layer.g.mean()
    if a.dim() == 1:
        return [(a.diag(), g)]
    return [(a, g)] if a.dim() == 2 else list(zip(a, g, strict=True))


def stored(block: Block) -> Tensor:
    """The block as a dense matrix, undamped; a diagonal one as a diagonal matrix."""
    if isinstance(block, KroneckerBlock):
        return torch.block_diag(*[torch.kron(g, a) for a, g in pairs(block)])
    moment = block.moment.mean()
    return moment.diag() if moment.dim() == 1 else moment


def within_groups(matrix: Tensor, groups: int) -> Tensor:
    """The matrix without its entries between different groups, which no pair of factors has."""
    size = len(matrix) // groups
    kept = [matrix[k * size : (k + 1) * size, k * size : (k + 1) * size] for k in range(groups)]
    return torch.block_diag(*kept)


def assert_exact(
    model: nn.Module,
    inputs: Tensor,
    loss: OutputLoss[Any],
    names: Sequence[str],
    sharing: Sharing = "expand",
    **settings: Any,
) -> Seen:
    """Every named block equals that of the dense Fisher, and no other block exists."""
    seen = observed(model, inputs, loss, linear_sharing=sharing, conv_sharing=sharing, **settings)
    assert sorted(seen.curvature.stats) == sorted(names)
    for name in names:
        close(stored(seen.block(name)), seen.truth(name))
    return seen
