"""The Gaussian q = N(mu, Sigma) of the weights that a curvature stands for, with its noise.

With N loss terms in the training set, the weight lambda of the KL divergence and the prior
N(0, eta I), the natural gradient of the variational objective

    E_q sum_n log p(y_n | x_n, w) - lambda KL(q || prior)

has the fixed point Sigma = (lambda / N) (F + gamma I)^-1, gamma = lambda / (N eta), where F is the
Fisher matrix of one term at w ~ q (Zhang et al. 2018). In the eigenbasis Q of a block with the
eigenvalues s, noise is Q (sqrt(v) * eps) with v = (lambda / N) / (s + gamma).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from acktr.kfac.blocks.diagonal import DiagonalBlock
from acktr.kfac.blocks.kronecker import Corrected, Eigen, KroneckerBlock
from acktr.kfac.blocks.registry import StatBlock
from acktr.kfac.blocks.tridiagonal import TridiagonalBlock
from acktr.kfac.noisy.chain import chain_noise, chain_spread
from acktr.kfac.noisy.prior import Prior

Normal = Callable[[Tensor], Tensor]
"""Draws standard normal numbers like a tensor."""


def standard_normal(generator: torch.Generator, like: Tensor) -> Tensor:
    """Numbers of N(0, 1) like a tensor."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=generator.device)


class Turned(Protocol):
    """A block with an eigenbasis."""

    def damped(self, damping: float) -> Tensor:
        """Eigenvalues of F + damping."""

    def turned(self, inner: Tensor, *, squared: bool = False) -> dict[str, Tensor]:
        """Coefficients in the basis as parameters; variances with ``squared``."""


class Spread(NamedTuple):
    """What is known of a block's covariance."""

    variances: dict[str, Tensor]
    """The diagonal of Sigma, by parameter name."""
    log_det: Tensor
    """log det Sigma."""


def noise(block: StatBlock, damping: float, scale: float, normal: Normal) -> dict[str, Tensor]:
    """Noise of a block's parameters with the covariance ``scale`` (F + damping)^-1."""
    if isinstance(block, TridiagonalBlock):
        matrices = chain_noise(block.inverse, normal)
        pairs = zip(block.layers, matrices, strict=True)
        return {n: e for layer, m in pairs for n, e in layer.split(m * scale**0.5).items()}
    found = cast(Turned, block)
    damped = found.damped(damping)
    return found.turned(normal(damped) * (scale / damped).sqrt())


def spread(block: StatBlock, damping: float, scale: float) -> Spread:
    """Variances and determinant of the covariance ``scale`` (F + damping)^-1."""
    if isinstance(block, TridiagonalBlock):
        matrices, log_det = chain_spread(block.inverse)
        pairs = zip(block.layers, matrices, strict=True)
        variances = {n: v for layer, m in pairs for n, v in layer.split(m * scale).items()}
        size = sum(matrix.numel() for matrix in matrices)
        return Spread(variances, log_det + size * math.log(scale))
    found = cast(Turned, block)
    inner = scale / found.damped(damping)
    return Spread(found.turned(inner, squared=True), inner.log().sum())


def log_det_of_row(block: StatBlock, row: int, damping: float, scale: float) -> Tensor:
    """Log det (Sigma^-1)_row of the row of an embedding's table, Sigma as in :func:`spread`.

    In the basis Q_G, with d = (F + damping) / ``scale``, it is sum_i log sum_j d_ij Q_A[row, j]^2.
    """
    precision = cast(Turned, block).damped(damping).double() / scale
    if isinstance(block, DiagonalBlock):  # of the table's own shape
        return precision[row].log().sum()
    inverse = block.inverse if isinstance(block, KroneckerBlock) else None
    basis = inverse.basis if isinstance(inverse, Corrected) else inverse
    vectors = basis.a.vectors if isinstance(basis, Eigen) else None
    own = precision[:, row] if vectors is None else precision @ vectors[row].double().square()
    return own.log().sum()


def is_known(block: StatBlock) -> bool:
    """Whether a block has a curvature already."""
    history = block.history
    return history.started if isinstance(block, DiagonalBlock) else history.ready


class Posterior:
    """q over the parameters of a module, around what the module holds.

    Args:
        module: The network.
        named: Its parameters by name.
        prior: Which of them have noise, and their prior.
        data_size: N.
        weight: lambda.
    """

    def __init__(
        self,
        module: nn.Module,
        named: Mapping[str, nn.Parameter],
        prior: Prior,
        data_size: int,
        weight: float,
    ) -> None:
        self.named, self.prior, self.data_size = named, prior, data_size
        self.weight = weight
        """The present lambda."""
        self.chain_weight = weight
        """Lambda when the inverse of a chain was made, which holds the damping of that time."""
        names = {id(parameter): name for name, parameter in named.items()}
        self._padding = {
            names[id(layer.weight)]: layer.padding_idx
            for layer in module.modules()
            if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.padding_idx is not None
            if id(layer.weight) in names
        }
        """Rows of tables that stand for no token, which have neither noise nor a prior."""

    @property
    def scale(self) -> float:
        """The factor lambda / N of the covariance."""
        return self.weight / self.data_size

    def _scale(self, block: StatBlock) -> float:
        """The lambda / N that belongs to the inverse of a block."""
        weight = self.chain_weight if isinstance(block, TridiagonalBlock) else self.weight
        return weight / self.data_size

    def damping(self, name: str) -> float:
        """gamma_in = lambda / (N eta) of a block by its name."""
        return self.scale / self.prior.variance[name]

    def draw(self, normal: Normal) -> dict[str, Tensor]:
        """Noise w - mu by name, of the parameters whose curvature is known; nothing is waited for.

        Args:
            normal: Draws standard normal numbers like a tensor.
        """
        drawn: dict[str, Tensor] = {}
        if self.weight == 0:
            return drawn
        for block in self.prior.sampled:
            if is_known(block):
                drawn.update(noise(block, self.damping(block.name), self._scale(block), normal))
        return {n: self.unpadded(n, e).to(self.named[n].dtype) for n, e in drawn.items()}

    def unpadded(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor like a parameter, with zeros where that is the row of padding."""
        row = self._padding.get(name)
        if row is None:
            return tensor
        tensor = tensor.clone()
        tensor[row] = 0
        return tensor

    def deviations(self) -> dict[str, Tensor]:
        """Standard deviations by name; those of the prior where no curvature is known yet."""
        found: dict[str, Tensor] = {}
        for block in self.prior.sampled:
            variance = self.prior.variance[block.name]
            unknown = {n: torch.full_like(self.named[n], variance) for n in block.names}
            if self.weight == 0:
                unknown = {n: torch.zeros_like(self.named[n]) for n in block.names}
            elif is_known(block):
                damping, scale = self.damping(block.name), self._scale(block)
                unknown = spread(block, damping, scale).variances
            found.update({n: v.sqrt().to(self.named[n].dtype) for n, v in unknown.items()})
        return {name: self.unpadded(name, deviation) for name, deviation in found.items()}

    def kl(self) -> Tensor:
        """KL(q || prior) in nats; infinite without noise, and with the prior's covariance at first.

        1/2 [tr Sigma / eta + ||mu||^2 / eta - P + P log eta - log det Sigma]

        Rows of padding are no part of it: of a table it is the divergence of the other rows, with
        log det Sigma_rest = log det Sigma + log det (Sigma^-1)_row.
        """
        parts = []
        for block in self.prior.sampled:
            variance = self.prior.variance[block.name]
            named = {name: self.named[name].detach() for name in block.names}
            means = [self.unpadded(name, mean).double() for name, mean in named.items()]
            parts.append(torch.stack([mean.square().sum() for mean in means]).sum() / variance)
            if self.weight == 0:
                parts.append(torch.full_like(parts[-1], math.inf))
            elif is_known(block):
                damping, scale = self.damping(block.name), self._scale(block)
                found = spread(block, damping, scale)
                size, log_det = sum(mean.numel() for mean in means), found.log_det.double()
                for name in self._padding.keys() & named.keys():
                    size -= named[name].shape[1]
                    log_det = log_det + log_det_of_row(block, self._padding[name], damping, scale)
                left = [self.unpadded(n, v).double().sum() for n, v in found.variances.items()]
                constant = size * (math.log(variance) - 1)
                parts.append(torch.stack(left).sum() / variance + constant - log_det)
        return 0.5 * torch.stack(parts).sum() if parts else torch.zeros(())
