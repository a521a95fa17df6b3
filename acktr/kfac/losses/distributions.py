"""Distributions as functions of one tensor of parameters, a network's output (N, ..., P).

The last dimension holds the parameters of one event; all methods work row by row. Sampling is in
two steps: noise is drawn first, from an explicit generator and without knowing the parameters, and
targets are made of it. Whoever splits a batch draws the noise for all of it and gives each part its
rows, so that a split changes no target. The losses of :mod:`acktr.kfac.losses.likelihoods` and the
action heads of reinforcement learning are these distributions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional

_LOG_TWO_PI = math.log(2 * math.pi)


class Distribution(Protocol):
    """A batch of distributions; F is the Fisher matrix of a row's parameters."""

    def noise(self, generator: torch.Generator | None = None) -> Tensor:
        """Noise for one target per row; its numbers depend on the shape of the parameters alone."""

    def sample(self, noise: Tensor) -> Tensor:
        """One target per row, made of :meth:`noise`; no gradient flows through it."""

    def mode(self) -> Tensor:
        """The most likely target of each row."""

    def log_prob(self, target: Tensor) -> Tensor:
        """Log-probability (N, ...) of one target per row."""

    def entropy(self) -> Tensor:
        """Entropy (N, ...) in nats."""

    def kl(self, other: Tensor) -> Tensor:
        """Exact KL(self || distribution with parameters other), (N, ...) in nats."""

    def fisher_product(self, tangent: Tensor) -> Tensor:
        """F t (N, ..., P) for tangents t of that shape."""

    def fisher_quadratic(self, tangent: Tensor) -> Tensor:
        """t^T F t (N, ...) for tangents t (N, ..., P)."""


class Categorical:
    """Categorical over K classes; parameters are logits (N, ..., K), targets int64 (N, ...).

    F = diag(p) - p p^T. A masked class has the logit -inf: its probability is exactly zero, in
    samples, log-probability (-inf), entropy, KL and F, and so is the gradient with respect to its
    logit (Huang and Ontanon 2022, "A closer look at invalid action masking").

    Args:
        logits: Those of all classes.
        mask: Which classes are allowed, bool (N, ..., K), at least one in each row (else the row is
            NaN); None: all of them. It holds for the other distribution of a KL too.
    """

    def __init__(self, logits: Tensor, mask: Tensor | None = None) -> None:
        self._forbidden = None if mask is None else ~mask
        self.log_p = self._log_softmax(logits)

    def _log_softmax(self, logits: Tensor) -> Tensor:
        if self._forbidden is not None:
            logits = logits.masked_fill(self._forbidden, -math.inf)
        return functional.log_softmax(logits, dim=-1)

    def noise(self, generator: torch.Generator | None = None) -> Tensor:
        """Uniform numbers (N, ..., K)."""
        like = self.log_p
        return torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)

    def sample(self, noise: Tensor) -> Tensor:
        """The Gumbel-max trick: the largest log p - log(-log u)."""
        positive = noise.clamp(min=torch.finfo(noise.dtype).tiny)
        return (self.log_p.detach() - (-positive.log()).log()).argmax(-1)

    def mode(self) -> Tensor:
        """The largest logit."""
        return self.log_p.argmax(-1)

    def log_prob(self, target: Tensor) -> Tensor:
        """Log-probability of the classes."""
        return self.log_p.gather(-1, target.long()[..., None])[..., 0]

    def entropy(self) -> Tensor:
        """Sum of -p log p, where a class of probability 0 counts 0."""
        p = self.log_p.exp()
        return -(p * self.log_p.masked_fill(p == 0, 0.0)).sum(-1)

    def kl(self, other: Tensor) -> Tensor:
        """Sum of p (log p - log q), where a class of probability 0 counts 0."""
        p, log_q = self.log_p.exp(), self._log_softmax(other)
        return (p * (self.log_p - log_q).masked_fill(p == 0, 0.0)).sum(-1)

    def fisher_product(self, tangent: Tensor) -> Tensor:
        """F t = p (t - E t)."""
        p = self.log_p.exp()
        return p * (tangent - (p * tangent).sum(-1, keepdim=True))

    def fisher_quadratic(self, tangent: Tensor) -> Tensor:
        """The variance of t under p."""
        p = self.log_p.exp()
        mean = (p * tangent).sum(-1, keepdim=True)
        return (p * (tangent - mean).square()).sum(-1)


class MultiCategorical:
    """M independent categoricals; parameters are their logits side by side, targets (N, ..., M).

    A mask, bool like the logits, has those of the categoricals side by side.
    """

    def __init__(self, logits: Tensor, sizes: tuple[int, ...], mask: Tensor | None = None) -> None:
        self._sizes = list(sizes)
        masks: Sequence[Tensor | None] = [None] * len(sizes)
        if mask is not None:
            masks = self._split(mask)
        pairs = zip(self._split(logits), masks, strict=True)
        self._parts = [Categorical(part, mine) for part, mine in pairs]

    def _split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return torch.split(tensor, self._sizes, dim=-1)

    def _summed(self, method: Callable[[Categorical, Tensor], Tensor], tensor: Tensor) -> Tensor:
        pairs = zip(self._parts, self._split(tensor), strict=True)
        return torch.stack([method(part, mine) for part, mine in pairs]).sum(0)

    def noise(self, generator: torch.Generator | None = None) -> Tensor:
        """Uniform numbers, drawn component by component."""
        return torch.cat([part.noise(generator) for part in self._parts], dim=-1)

    def sample(self, noise: Tensor) -> Tensor:
        """One class per component."""
        pairs = zip(self._parts, self._split(noise), strict=True)
        return torch.stack([part.sample(mine) for part, mine in pairs], dim=-1)

    def mode(self) -> Tensor:
        """The most likely class of each component."""
        return torch.stack([part.mode() for part in self._parts], dim=-1)

    def log_prob(self, target: Tensor) -> Tensor:
        """Sum over components."""
        pairs = zip(self._parts, target.unbind(-1), strict=True)
        return torch.stack([part.log_prob(mine) for part, mine in pairs]).sum(0)

    def entropy(self) -> Tensor:
        """Sum over components."""
        return torch.stack([part.entropy() for part in self._parts]).sum(0)

    def kl(self, other: Tensor) -> Tensor:
        """Sum over components."""
        return self._summed(Categorical.kl, other)

    def fisher_product(self, tangent: Tensor) -> Tensor:
        """F t of the components, side by side."""
        pairs = zip(self._parts, self._split(tangent), strict=True)
        return torch.cat([part.fisher_product(mine) for part, mine in pairs], dim=-1)

    def fisher_quadratic(self, tangent: Tensor) -> Tensor:
        """Sum over components."""
        return self._summed(Categorical.fisher_quadratic, tangent)


class Bernoulli:
    """Independent bits; parameters are logits (N, ..., M), targets 0 or 1 of that shape.

    F = diag(p (1 - p)). Targets between 0 and 1 have a log-probability as well, the cross-entropy.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def noise(self, generator: torch.Generator | None = None) -> Tensor:
        """Uniform numbers (N, ..., M)."""
        like = self.logits
        return torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)

    def sample(self, noise: Tensor) -> Tensor:
        """1 where the noise is below the probability (int64)."""
        return (noise < self.logits.sigmoid()).long()

    def mode(self) -> Tensor:
        """1 where the probability exceeds one half."""
        return (self.logits > 0).long()

    def log_prob(self, target: Tensor) -> Tensor:
        """Sum over bits."""
        return -self._cross_entropy(self.logits, target.to(self.logits.dtype))

    def entropy(self) -> Tensor:
        """Sum over bits."""
        return self._cross_entropy(self.logits, self.logits.sigmoid())

    def kl(self, other: Tensor) -> Tensor:
        """Cross-entropy minus entropy, summed over bits."""
        return self._cross_entropy(other, self.logits.sigmoid()) - self.entropy()

    def fisher_product(self, tangent: Tensor) -> Tensor:
        """F t = p (1 - p) t."""
        return self.variance() * tangent

    def fisher_quadratic(self, tangent: Tensor) -> Tensor:
        """Sum of p (1 - p) t^2."""
        return (self.variance() * tangent.square()).sum(-1)

    def variance(self) -> Tensor:
        """Variance p (1 - p) of every bit."""
        # sigmoid(-z) is 1 - p without its cancellation for p near 1.
        return self.logits.sigmoid() * (-self.logits).sigmoid()

    @staticmethod
    def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        terms = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return terms.sum(-1)


class Gaussian:
    """Gaussian N(m, std^2 I) of a known deviation; parameters are means (N, ..., D), as targets.

    F = I / std^2.
    """

    def __init__(self, mean: Tensor, std: float) -> None:
        self.mean = mean
        self.std = std

    def noise(self, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal numbers (N, ..., D)."""
        return _normal(self.mean, generator)

    def sample(self, noise: Tensor) -> Tensor:
        """Targets m + std noise."""
        return (self.mean + self.std * noise).detach()

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def log_prob(self, target: Tensor) -> Tensor:
        """Log-density, without the constants that a known deviation makes of the normalisation."""
        return -0.5 * ((target - self.mean) / self.std).square().sum(-1)

    def entropy(self) -> Tensor:
        """D (log std + (1 + log 2 pi) / 2)."""
        each = math.log(self.std) + 0.5 * (1 + _LOG_TWO_PI)
        return torch.full_like(self.mean, each).sum(-1)

    def kl(self, other: Tensor) -> Tensor:
        """Half the squared distance of the means, in deviations."""
        return 0.5 * ((self.mean - other) / self.std).square().sum(-1)

    def fisher_product(self, tangent: Tensor) -> Tensor:
        """F t = t / std^2."""
        return tangent / self.std / self.std

    def fisher_quadratic(self, tangent: Tensor) -> Tensor:
        """Sum of t^2 / std^2."""
        return (tangent.square() / self.std**2).sum(-1)


class DiagonalGaussian:
    """Gaussian with diagonal covariance; parameters are [mean, log std] (N, ..., 2 D).

    F = diag(1 / std^2, 2).
    """

    LOG_STD_FISHER: ClassVar[float] = 2.0
    """Fisher information of a log-deviation, whatever its value."""

    def __init__(self, parameters: Tensor) -> None:
        self.mean, self.log_std = parameters.chunk(2, dim=-1)

    def noise(self, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal numbers (N, ..., D)."""
        return _normal(self.mean, generator)

    def sample(self, noise: Tensor) -> Tensor:
        """Targets mean + std noise (N, ..., D)."""
        return (self.mean + self.log_std.exp() * noise).detach()

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def log_prob(self, target: Tensor) -> Tensor:
        """Log-density."""
        z = (target - self.mean) * (-self.log_std).exp()
        return (-0.5 * z.square() - self.log_std - 0.5 * _LOG_TWO_PI).sum(-1)

    def entropy(self) -> Tensor:
        """Sum of log std + (1 + log 2 pi) / 2."""
        return (self.log_std + 0.5 * (1 + _LOG_TWO_PI)).sum(-1)

    def kl(self, other: Tensor) -> Tensor:
        """The closed form."""
        mean, log_std = other.chunk(2, dim=-1)
        ratio = (2 * (self.log_std - log_std)).exp()
        shift = (self.mean - mean).square() * (-2 * log_std).exp()
        return (log_std - self.log_std + 0.5 * (ratio + shift - 1)).sum(-1)

    def fisher_product(self, tangent: Tensor) -> Tensor:
        """F t = (t_mean / std^2, 2 t_log_std)."""
        return self.fisher_diagonal() * tangent

    def fisher_quadratic(self, tangent: Tensor) -> Tensor:
        """Sum of t_mean^2 / std^2 + 2 t_log_std^2."""
        mean, log_std = tangent.chunk(2, dim=-1)
        precision = (-2 * self.log_std).exp()
        return (mean.square() * precision + self.LOG_STD_FISHER * log_std.square()).sum(-1)

    def fisher_diagonal(self) -> Tensor:
        """The diagonal of F (N, ..., 2 D)."""
        precision = (-2 * self.log_std).exp()
        return torch.cat([precision, torch.full_like(precision, self.LOG_STD_FISHER)], dim=-1)


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
