"""Objectives: what a network learns from one batch by a K-FAC step (Wu et al. 2017, section 3.1).

Each is a loss, the distribution that gives its Fisher matrix, and that distribution's metric, all
as functions of the network's outputs for some rows of the batch. The noise of the sampled Fisher is
drawn for the whole batch when the objective is made, so that it is the same however it is split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from acktr.algorithms.auxiliary import Auxiliary, AuxiliaryObjective
from acktr.algorithms.learner import drawn, mean, part_of, used_advantages
from acktr.algorithms.likelihoods import PolicyLoss, ValueLoss
from acktr.config import Config
from acktr.kfac import Distribution, Gaussian, Metric, OutputLoss, SumLoss
from acktr.policies import ActionHead, Outputs
from acktr.rollout import Batch


class Objective(Protocol):
    """What a K-FAC step needs to know of a batch."""

    plain: bool
    """Whether :meth:`fisher` says all that the curvature has to know."""

    @property
    def likelihood(self) -> OutputLoss[Any]:
        """The distribution as a loss of the outputs, for :meth:`acktr.kfac.KFAC.observe`."""

    def loss(self, outputs: Outputs, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to reduce, a mean over the rows, and its terms for metrics."""

    def fisher(self, outputs: Outputs, rows: slice) -> Tensor:
        """Sum of -log p of targets sampled from the network's own distribution p."""

    def metric(self, outputs: Outputs, rows: slice) -> Metric:
        """The distribution's t^T H t (B,), a function of the tangents t of the outputs."""

    def weights(self, rows: slice) -> Tensor | None:
        """Weights of the samples, None for 1."""

    def targets(self, rows: slice) -> Any:
        """What decides on the terms of the likelihood beside the weights, None for nothing."""


class PolicyObjective:
    """Policy gradient with entropy: L = -mean(A log pi(a|s)) - ent_coef mean(H(pi)).

    Args:
        head: Action distribution, whose parameters are the only output.
        batch: The samples.
        config: Settings: ent_coef and normalize_advantage.
        generator: Source of the noise, on the network's device.
        dtype: Type of the outputs.
    """

    def __init__(
        self,
        head: ActionHead,
        batch: Batch,
        config: Config,
        generator: torch.Generator,
        dtype: torch.dtype,
    ) -> None:
        self._head = head
        self._actions = batch.actions
        self._masks = batch.masks
        self._advantages = used_advantages(batch, config)
        self._ent_coef = config.ent_coef
        self._weights = batch.weights
        self._noise = drawn(batch, lambda rows: head.noise(rows, generator, dtype))
        self.plain = batch.weights is None

    @property
    def likelihood(self) -> OutputLoss[Any]:
        """The action distribution."""
        return PolicyLoss(head=self._head)

    def loss(self, outputs: Outputs, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """L, with the terms policy_loss and entropy."""
        dist, weights = self._dist(outputs[0], rows), self.weights(rows)
        loss = -mean(self._advantages[rows] * dist.log_prob(self._actions[rows]), weights)
        entropy = mean(dist.entropy(), weights)
        return loss - self._ent_coef * entropy, {"policy_loss": loss, "entropy": entropy}

    def fisher(self, outputs: Outputs, rows: slice) -> Tensor:
        """Sum of -log pi of actions sampled from pi."""
        dist = self._dist(outputs[0], rows)
        return -dist.log_prob(dist.sample(self._noise[rows])).sum()

    def metric(self, outputs: Outputs, rows: slice) -> Metric:
        """Fisher metric of the action distribution."""
        dist = self._dist(outputs[0].detach(), rows)
        return _weighted(dist.fisher_quadratic, self.weights(rows))

    def weights(self, rows: slice) -> Tensor | None:
        """Weights of the samples, None for 1."""
        return part_of(self._weights, rows)

    def targets(self, rows: slice) -> Any:
        """The action masks."""
        return part_of(self._masks, rows)

    def _dist(self, parameters: Tensor, rows: slice) -> Distribution:
        return self._head.make(parameters, part_of(self._masks, rows))


def value_noise(batch: Batch, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Standard normal noise (B, 1) for the sampled Fisher of the values of a batch."""
    device = generator.device
    return drawn(
        batch, lambda rows: torch.randn((rows, 1), generator=generator, device=device, dtype=dtype)
    )


class ValueObjective:
    """Gauss-Newton value function: L = mean((V - R)^2), with v ~ N(V, sigma^2) for the Fisher.

    Args:
        batch: The samples; the values are the only output.
        sigma: Standard deviation of the observation model.
        noise: That of the sampled Fisher, see :func:`value_noise`.
        fisher: Whether the distribution counts: else its Fisher matrix is 0.
    """

    def __init__(self, batch: Batch, sigma: float, noise: Tensor, fisher: bool = True) -> None:
        self._returns = batch.returns
        self._weights = batch.weights
        self._sigma = sigma
        self._counts = fisher
        self.plain = batch.weights is None
        self._noise = noise

    @property
    def likelihood(self) -> OutputLoss[Any]:
        """N(V, sigma^2)."""
        return ValueLoss(std=self._sigma)

    def loss(self, outputs: Outputs, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """L, which is the term value_loss."""
        loss = mean((outputs[0] - self._returns[rows]).square(), self.weights(rows))
        return loss, {"value_loss": loss}

    def fisher(self, outputs: Outputs, rows: slice) -> Tensor:
        """Sum of -log p of values sampled from N(V, sigma^2)."""
        if not self._counts:
            return outputs[0].sum() * 0.0  # of which the layers of the value learn that it is 0
        dist = Gaussian(outputs[0][:, None], self._sigma)
        return -dist.log_prob(dist.sample(self._noise[rows])).sum()

    def metric(self, outputs: Outputs, rows: slice) -> Metric:
        """t^2 / sigma^2."""
        if not self._counts:
            return lambda tangent: torch.zeros_like(tangent)
        dist = Gaussian(outputs[0].detach()[:, None], self._sigma)
        return _weighted(
            lambda tangent: dist.fisher_quadratic(tangent[:, None]), self.weights(rows)
        )

    def weights(self, rows: slice) -> Tensor | None:
        """Weights of the samples, None for 1."""
        return part_of(self._weights, rows)

    def targets(self, rows: slice) -> Any:
        """Nothing."""


class JointObjective:
    """All that one network learns: L = L_pi + vf_coef L_V + sum_k w_k L_k.

    The output distribution is the product p(a, v|s) = pi(a|s) N(v; V(s), sigma^2) of policy and
    value, times that of each auxiliary output to the power w_k.

    Args:
        head: Action distribution, whose parameters are the first output.
        batch: The samples.
        config: Settings: those of all, and vf_coef, on which the Fisher does not depend.
        generator: Source of the noise, on the network's device.
        dtype: Type of the outputs.
        auxiliary: Auxiliary losses by name, whose outputs come last.
        sigma: That of the value, which is the second output; None: it is not.
    """

    def __init__(
        self,
        head: ActionHead,
        batch: Batch,
        config: Config,
        generator: torch.Generator,
        dtype: torch.dtype,
        auxiliary: Mapping[str, Auxiliary] | None = None,
        sigma: float | None = 1.0,
    ) -> None:
        made: list[PolicyObjective | ValueObjective] = [
            PolicyObjective(head, batch, config, generator, dtype)
        ]
        coefficients = [1.0]
        if sigma is not None:
            counts = config.acktr.value_fisher
            noise = value_noise(batch, generator, dtype)
            made.append(ValueObjective(batch, sigma, noise, counts))
            coefficients.append(config.vf_coef)
        more = [AuxiliaryObjective(name, each, batch) for name, each in (auxiliary or {}).items()]
        self._drawn, self._weights = made, batch.weights
        self._parts: Sequence[PolicyObjective | ValueObjective | AuxiliaryObjective]
        self._parts = [*made, *more]
        self._coefficients = [*coefficients, *(part.weight for part in more)]
        self.plain = batch.weights is None and not more
        self.likelihood: OutputLoss[Any] = SumLoss(
            parts=tuple(part.likelihood for part in self._parts),
            weights=(*(1.0 for _ in made), *(part.weight for part in more)),
        )

    def loss(self, outputs: Outputs, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """L, with the terms of all."""
        total, terms = self._parts[0].loss(outputs[:1], rows)
        for place in range(1, len(self._parts)):
            loss, more = self._parts[place].loss(outputs[place : place + 1], rows)
            total, terms = total + self._coefficients[place] * loss, terms | more
        return total, terms

    def fisher(self, outputs: Outputs, rows: slice) -> Tensor:
        """Sum of those of policy and value, which are independent."""
        parts = enumerate(self._drawn)
        each = [part.fisher(outputs[place : place + 1], rows) for place, part in parts]
        return each[0] if len(each) == 1 else each[0] + each[1]

    def metric(self, outputs: Outputs, rows: slice) -> Metric:
        """Sum of all, those of auxiliary outputs with their weights."""
        forms = [p.metric(outputs[n : n + 1], rows) for n, p in enumerate(self._parts)]

        def whole(*tangents: Tensor) -> Tensor:
            values = [form(tangent) for form, tangent in zip(forms, tangents, strict=True)]
            return torch.stack(values).sum(0) if len(values) != 2 else values[0] + values[1]

        return whole

    def weights(self, rows: slice) -> Tensor | None:
        """Weights of the samples, None for 1."""
        return part_of(self._weights, rows)

    def targets(self, rows: slice) -> Any:
        """Those of every part."""
        return tuple(part.targets(rows) for part in self._parts)


def _weighted(metric: Metric, weights: Tensor | None) -> Metric:
    """The form of every sample times its weight."""
    return metric if weights is None else lambda tangent: weights * metric(tangent)
