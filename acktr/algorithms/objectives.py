"""Objectives: what a network learns from one batch by a K-FAC step (Wu et al. 2017, section 3.1).

Each is a loss, the distribution that gives its Fisher matrix, and that distribution's metric, all
as functions of the network's outputs for some rows of the batch. The noise of the sampled Fisher is
drawn for the whole batch when the objective is made, so that it is the same however it is split.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from acktr.algorithms.learner import used_advantages
from acktr.config import Config
from acktr.kfac import Gaussian, Metric
from acktr.policies import ActionHead
from acktr.rollout import Batch

Outputs = tuple[Tensor, ...]
"""What a network returns, always as a tuple."""


class Objective(Protocol):
    """What a K-FAC step needs to know of a batch."""

    def loss(self, outputs: Outputs, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to reduce, a mean over the rows, and its terms for metrics."""

    def fisher(self, outputs: Outputs, rows: slice) -> Tensor:
        """Sum of -log p of targets sampled from the network's own distribution p."""

    def metric(self, outputs: Outputs) -> Metric:
        """The distribution's t^T H t (B,), a function of the tangents t of the outputs."""


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
        self._advantages = used_advantages(batch, config)
        self._ent_coef = config.ent_coef
        self._noise = head.noise(len(self._advantages), generator, dtype)

    def loss(self, outputs: Outputs, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """L, with the terms policy_loss and entropy."""
        dist = self._head.make(outputs[0])
        loss = -(self._advantages[rows] * dist.log_prob(self._actions[rows])).mean()
        entropy = dist.entropy().mean()
        return loss - self._ent_coef * entropy, {"policy_loss": loss, "entropy": entropy}

    def fisher(self, outputs: Outputs, rows: slice) -> Tensor:
        """Sum of -log pi of actions sampled from pi."""
        dist = self._head.make(outputs[0])
        return -dist.log_prob(dist.sample(self._noise[rows])).sum()

    def metric(self, outputs: Outputs) -> Metric:
        """Fisher metric of the action distribution."""
        return self._head.make(outputs[0].detach()).fisher_quadratic


class ValueObjective:
    """Gauss-Newton value function: L = mean((V - R)^2), with v ~ N(V, sigma^2) for the Fisher.

    Args:
        batch: The samples; the values are the only output.
        config: Settings: sigma is acktr.value_sigma.
        generator: Source of the noise, on the network's device.
        dtype: Type of the output.
    """

    def __init__(
        self, batch: Batch, config: Config, generator: torch.Generator, dtype: torch.dtype
    ) -> None:
        self._returns = batch.returns
        self._sigma = config.acktr.value_sigma
        shape = (len(batch.returns), 1)
        device = generator.device
        self._noise = torch.randn(shape, generator=generator, device=device, dtype=dtype)

    def loss(self, outputs: Outputs, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """L, which is the term value_loss."""
        loss = (outputs[0] - self._returns[rows]).square().mean()
        return loss, {"value_loss": loss}

    def fisher(self, outputs: Outputs, rows: slice) -> Tensor:
        """Sum of -log p of values sampled from N(V, sigma^2)."""
        dist = Gaussian(outputs[0][:, None], self._sigma)
        return -dist.log_prob(dist.sample(self._noise[rows])).sum()

    def metric(self, outputs: Outputs) -> Metric:
        """t^2 / sigma^2."""
        dist = Gaussian(outputs[0].detach()[:, None], self._sigma)
        return lambda tangent: dist.fisher_quadratic(tangent[:, None])


class JointObjective:
    """Policy and value function of a network that shares its trunk: L = L_pi + vf_coef L_V.

    The output distribution is the product p(a, v|s) = pi(a|s) N(v; V(s), sigma^2).

    Args:
        head: Action distribution, whose parameters are the first output; the second is V.
        batch: The samples.
        config: Settings: those of both, and vf_coef, on which the Fisher does not depend.
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
        self._policy = PolicyObjective(head, batch, config, generator, dtype)
        self._value = ValueObjective(batch, config, generator, dtype)
        self._vf_coef = config.vf_coef

    def loss(self, outputs: Outputs, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """L, with the terms of both."""
        policy, terms = self._policy.loss(outputs[:1], rows)
        value, more = self._value.loss(outputs[1:], rows)
        return policy + self._vf_coef * value, terms | more

    def fisher(self, outputs: Outputs, rows: slice) -> Tensor:
        """Sum of both, which are independent."""
        return self._policy.fisher(outputs[:1], rows) + self._value.fisher(outputs[1:], rows)

    def metric(self, outputs: Outputs) -> Metric:
        """Sum of both."""
        policy, value = self._policy.metric(outputs[:1]), self._value.metric(outputs[1:])
        return lambda *tangents: policy(tangents[0]) + value(tangents[1])
