"""Noise of a chain of layers, whose covariance is the block-tridiagonal inverse.

With F-hat^-1 = Xi^T Lambda Xi (:mod:`acktr.kfac.blocks.tridiagonal`) the noise Xi^T Lambda^1/2 eps
has that covariance:

    z_i = K_G (sqrt(gain) * eps_i) K_A^T,    e_1 = z_1,    e_i+1 = z_i+1 - G_link^T z_i A_link.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from acktr.kfac.blocks.tridiagonal import ChainInverse


def chain_noise(inverse: ChainInverse, normal: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Noise e with the covariance F-hat^-1, a matrix (out_i, in_i) for every layer.

    Args:
        inverse: F-hat^-1.
        normal: Draws standard normal numbers like a tensor.
    """
    own = [g @ (gain.sqrt() * normal(gain)) @ a.mT for a, g, gain in inverse.layers]
    linked = [own[0]]
    for (a, g), before, here in zip(inverse.links, own[:-1], own[1:], strict=True):
        linked.append(here - g.mT @ before @ a)
    return linked


def chain_spread(inverse: ChainInverse) -> tuple[list[Tensor], Tensor]:
    """The diagonal of F-hat^-1, (out_i, in_i) for every layer, and log det F-hat^-1."""
    variances = [_product(g, gain, a.mT) for a, g, gain in inverse.layers]
    for i, (a, g) in enumerate(inverse.links):
        own_a, own_g, gain = inverse.layers[i]
        variances[i + 1] = variances[i + 1] + _product(g.mT @ own_g, gain, own_a.mT @ a)
    parts = []
    for a, g, gain in inverse.layers:
        parts.append(gain.log().sum())
        parts.append(2 * len(g) * torch.linalg.slogdet(a).logabsdet)
        parts.append(2 * len(a) * torch.linalg.slogdet(g).logabsdet)
    return variances, torch.stack(parts).sum()  # det Xi = 1


def _product(left: Tensor, gain: Tensor, right: Tensor) -> Tensor:
    """Variances of left (sqrt(gain) * eps) right."""
    return left.square() @ gain @ right.square()
