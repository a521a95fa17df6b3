"""Gradients by parameter name, as preconditioning needs them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from acktr.kfac.blocks.chain import Chain
from acktr.kfac.blocks.simple import Block


def decayed_gradients(
    named: Mapping[str, nn.Parameter], weights: Collection[str], decay: Mapping[str, float]
) -> dict[str, Tensor]:
    """Present gradients, g + eta w for those named in weights; sparse ones are written out."""
    found: dict[str, Tensor] = {}
    for name, parameter in named.items():
        if parameter.grad is not None:
            grad, extra = parameter.grad, decay.get(name, 0.0)
            grad = grad.to_dense() if grad.is_sparse else grad
            found[name] = grad.add(parameter, alpha=extra) if name in weights else grad
    return found


def completed(
    gradients: dict[str, Tensor],
    blocks: Sequence[Block],
    chain: Chain | None,
    named: Mapping[str, nn.Parameter],
) -> dict[str, Tensor]:
    """The gradients, with zeros for what a block that has other gradients lacks."""
    together = [block.names for block in blocks]
    if chain is not None:
        together.append(tuple(name for block in chain.blocks for name in block.names))
    zeros = {
        name: torch.zeros_like(named[name])
        for names in together
        if any(name in gradients for name in names)
        for name in names
        if name not in gradients
    }
    return gradients | zeros
