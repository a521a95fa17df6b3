"""Action distributions as functions of one tensor of parameters.

A policy network returns one tensor (B, P) per batch; the classes here turn it into a distribution
over actions with sampling from an explicit generator, log-probability, entropy, exact KL, and the
Fisher metric in the space of those parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

_LOG_TWO_PI = math.log(2 * math.pi)


class Distribution(Protocol):
    """A batch of B action distributions."""

    def noise(self, generator: torch.Generator | None = None) -> Tensor:
        """What one action per row is made of, (B, ...); it depends on the shape alone."""

    def action(self, noise: Tensor) -> Tensor:
        """One action per row, from :meth:`noise`."""

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One action per row: the two together."""

    def mode(self) -> Tensor:
        """The most likely action of each row."""

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-probability (B,) of one action per row."""

    def entropy(self) -> Tensor:
        """Entropy (B,) in nats."""

    def kl(self, other: Tensor) -> Tensor:
        """Exact KL(self || distribution with parameters other), (B,) in nats."""

    def fisher_quadratic(self, tangent: Tensor) -> Tensor:
        """t^T F t (B,) with F the Fisher matrix of the parameters and tangent t (B, P)."""


DistributionMaker = Callable[[Tensor], Distribution]


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def _gumbel_argmax(logits: Tensor, uniform: Tensor) -> Tensor:
    tiny = torch.finfo(logits.dtype).tiny
    return (logits - (-uniform.clamp(min=tiny).log()).log()).argmax(-1)


class Categorical:
    """Categorical over K actions; parameters are logits (B, K); actions are int64 (B,)."""

    def __init__(self, logits: Tensor) -> None:
        self.log_p = functional.log_softmax(logits, dim=-1)

    def noise(self, generator: torch.Generator | None = None) -> Tensor:
        """Uniform numbers (B, K)."""
        return _uniform(self.log_p, generator)

    def action(self, noise: Tensor) -> Tensor:
        """The Gumbel-max trick."""
        return _gumbel_argmax(self.log_p, noise)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One index per row."""
        return self.action(self.noise(generator))

    def mode(self) -> Tensor:
        """Largest logit."""
        return self.log_p.argmax(-1)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-probability of action indices (B,)."""
        return self.log_p.gather(-1, actions.long()[..., None])[..., 0]

    def entropy(self) -> Tensor:
        """-sum p log p."""
        return -(self.log_p.exp() * self.log_p).sum(-1)

    def kl(self, other: Tensor) -> Tensor:
        """Sum p (log p - log q)."""
        log_q = functional.log_softmax(other, dim=-1)
        return (self.log_p.exp() * (self.log_p - log_q)).sum(-1)

    def fisher_quadratic(self, tangent: Tensor) -> Tensor:
        """F = diag(p) - p p^T, hence the variance of the tangent under p."""
        p = self.log_p.exp()
        mean = (p * tangent).sum(-1, keepdim=True)
        return (p * (tangent - mean).square()).sum(-1)


class MultiCategorical:
    """Independent categoricals; parameters are concatenated logits, actions int64 (B, M)."""

    def __init__(self, logits: Tensor, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        self.parts = [Categorical(part) for part in torch.split(logits, list(sizes), dim=-1)]

    def noise(self, generator: torch.Generator | None = None) -> Tensor:
        """Uniform numbers (B, K_1 + ... + K_M), drawn component by component."""
        return torch.cat([part.noise(generator) for part in self.parts], dim=-1)

    def action(self, noise: Tensor) -> Tensor:
        """The Gumbel-max trick in each component."""
        pairs = zip(self.parts, torch.split(noise, list(self.sizes), dim=-1), strict=True)
        return torch.stack([part.action(drawn) for part, drawn in pairs], dim=-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One index per component."""
        return self.action(self.noise(generator))

    def mode(self) -> Tensor:
        """Most likely index of each component."""
        return torch.stack([part.mode() for part in self.parts], dim=-1)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Sum over components."""
        pairs = zip(self.parts, actions.unbind(-1), strict=True)
        return torch.stack([part.log_prob(action) for part, action in pairs]).sum(0)

    def entropy(self) -> Tensor:
        """Sum over components."""
        return torch.stack([part.entropy() for part in self.parts]).sum(0)

    def kl(self, other: Tensor) -> Tensor:
        """Sum over components."""
        pairs = zip(self.parts, torch.split(other, list(self.sizes), dim=-1), strict=True)
        return torch.stack([part.kl(logits) for part, logits in pairs]).sum(0)

    def fisher_quadratic(self, tangent: Tensor) -> Tensor:
        """Sum over components."""
        pairs = zip(self.parts, torch.split(tangent, list(self.sizes), dim=-1), strict=True)
        return torch.stack([part.fisher_quadratic(t) for part, t in pairs]).sum(0)


class Bernoulli:
    """Independent bits; parameters are logits (B, M), actions int64 0/1 (B, M)."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def noise(self, generator: torch.Generator | None = None) -> Tensor:
        """Uniform numbers (B, M)."""
        return _uniform(self.logits, generator)

    def action(self, noise: Tensor) -> Tensor:
        """1 where the noise is below the probability."""
        return (noise < self.logits.sigmoid()).long()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One bit per component."""
        return self.action(self.noise(generator))

    def mode(self) -> Tensor:
        """1 where the probability exceeds one half."""
        return (self.logits > 0).long()

    def log_prob(self, actions: Tensor) -> Tensor:
        """Sum over bits."""
        targets = actions.to(self.logits.dtype)
        return -functional.binary_cross_entropy_with_logits(
            self.logits, targets, reduction="none"
        ).sum(-1)

    def entropy(self) -> Tensor:
        """Sum over bits."""
        p = self.logits.sigmoid()
        return functional.binary_cross_entropy_with_logits(self.logits, p, reduction="none").sum(-1)

    def kl(self, other: Tensor) -> Tensor:
        """Sum over bits."""
        p = self.logits.sigmoid()
        cross = functional.binary_cross_entropy_with_logits(other, p, reduction="none").sum(-1)
        return cross - self.entropy()

    def fisher_quadratic(self, tangent: Tensor) -> Tensor:
        """F = diag(p (1 - p))."""
        p = self.logits.sigmoid()
        return (p * (1 - p) * tangent.square()).sum(-1)


class DiagonalGaussian:
    """Gaussian with diagonal covariance; parameters are [mean, log std] (B, 2 D)."""

    def __init__(self, parameters: Tensor) -> None:
        self.mean, self.log_std = parameters.chunk(2, dim=-1)

    def noise(self, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal numbers (B, D)."""
        return torch.randn(
            self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype
        )

    def action(self, noise: Tensor) -> Tensor:
        """Unbounded action (B, D), without gradient; it is clipped to bounds only when acting."""
        return (self.mean + self.log_std.exp() * noise).detach()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Unbounded sample (B, D), without gradient."""
        return self.action(self.noise(generator))

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-density of the unclipped action."""
        z = (actions - self.mean) * (-self.log_std).exp()
        return (-0.5 * z.square() - self.log_std - 0.5 * _LOG_TWO_PI).sum(-1)

    def entropy(self) -> Tensor:
        """Sum of log std + (1 + log 2 pi) / 2."""
        return (self.log_std + 0.5 * (1 + _LOG_TWO_PI)).sum(-1)

    def kl(self, other: Tensor) -> Tensor:
        """Closed form."""
        mean, log_std = other.chunk(2, dim=-1)
        ratio = (2 * (self.log_std - log_std)).exp()
        shift = (self.mean - mean).square() * (-2 * log_std).exp()
        return (log_std - self.log_std + 0.5 * (ratio + shift - 1)).sum(-1)

    def fisher_quadratic(self, tangent: Tensor) -> Tensor:
        """F = diag(1 / std^2) for the mean and 2 I for log std."""
        mean, log_std = tangent.chunk(2, dim=-1)
        return (mean.square() * (-2 * self.log_std).exp() + 2 * log_std.square()).sum(-1)


@dataclass(frozen=True)
class ActionHead:
    """How a policy network's output becomes actions of a space."""

    outputs: int
    """Width of the network's last layer."""
    gaussian: bool
    """Whether a free log-std parameter of the same width belongs to it."""
    make: DistributionMaker
    """From distribution parameters to the distribution."""

    def noise(self, rows: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """:meth:`Distribution.noise` of a batch whose parameters are not known yet.

        Args:
            rows: B.
            generator: Source of the noise, whose device is that of the parameters.
            dtype: Type of the parameters.
        """
        width = 2 * self.outputs if self.gaussian else self.outputs
        parameters = torch.zeros(rows, width, device=generator.device, dtype=dtype)
        return self.make(parameters).noise(generator)


def action_head(space: gymnasium.Space[Any]) -> ActionHead:
    """The head of an action space.

    Raises:
        ValueError: The space is not Discrete, Box, MultiDiscrete (1-D) or MultiBinary.
    """
    if isinstance(space, gymnasium.spaces.Discrete):
        return ActionHead(int(space.n), False, Categorical)
    if isinstance(space, gymnasium.spaces.Box):
        return ActionHead(int(np.prod(space.shape)), True, DiagonalGaussian)
    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        sizes = tuple(int(n) for n in space.nvec.ravel())
        return ActionHead(sum(sizes), False, lambda logits: MultiCategorical(logits, sizes))
    if isinstance(space, gymnasium.spaces.MultiBinary):
        return ActionHead(int(np.prod(space.shape)), False, Bernoulli)
    raise ValueError(f"unsupported action space {space}")


def to_environment(actions: NDArray[Any], space: gymnasium.Space[Any]) -> NDArray[Any]:
    """Actions as a vector environment takes them: reshaped, clipped to Box bounds, shifted.

    Args:
        actions: Samples of the head's distribution, one per row.
        space: The single action space.
    """
    if isinstance(space, gymnasium.spaces.Box):
        shaped = actions.reshape(len(actions), *space.shape)
        clipped: NDArray[Any] = np.minimum(np.maximum(shaped, space.low), space.high)
        return clipped.astype(space.dtype, copy=False)
    if isinstance(space, gymnasium.spaces.Discrete):
        return actions.astype(np.int64) + int(space.start)
    shaped = actions.reshape(len(actions), *(space.shape or ()))
    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        shaped = shaped + space.start
    result: NDArray[Any] = shaped.astype(space.dtype)
    return result
