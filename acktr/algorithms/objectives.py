"""What a network learns from a batch by K-FAC, as functions of its outputs for some rows of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acktr.kfac import KFAC, FisherQuadratic, Linearized, output_tangents
from acktr.rollout import MicroBatch

Outputs = tuple[Tensor, ...]
"""What a network returns, always as a tuple."""


def as_outputs(returned: Tensor | Outputs) -> Outputs:
    """A network's return value as a tuple."""
    return returned if isinstance(returned, tuple) else (returned,)


@dataclass(frozen=True)
class Losses:
    """Of some rows of a batch."""

    objective: Tensor
    """What the step reduces, a mean over the rows."""
    terms: dict[str, Tensor]
    """Means over the rows, for metrics."""


@dataclass(frozen=True)
class Task:
    """A network and its losses on one batch."""

    network: nn.Module
    optimizer: KFAC
    losses: Callable[[Outputs, slice], Losses]
    """From the outputs for some rows, and which rows they are."""
    fisher: Callable[[Outputs, slice], Tensor]
    """Sum of the negative log-likelihoods of targets drawn from the network's distribution."""
    metric: Callable[[Outputs], Callable[..., Tensor]]
    """The output distribution's t^T H t (B,), as a function of the tangents t of the outputs."""
    stat_fraction: float = 1.0
    """Part of the batch that factors are made of."""

    def sample(self, turn: int, samples: int) -> slice | None:
        """Every k-th sample of the batch, from another one on each turn; None if that is all."""
        every = max(1, round(1 / self.stat_fraction))
        return None if every == 1 else slice(turn % min(every, samples), None, every)

    def summed_quadratic(
        self,
        observations: Tensor,
        parts: Sequence[MicroBatch],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> FisherQuadratic:
        """U -> U^T F U of a whole batch, by one forward-mode pass for each part of it.

        Args:
            observations: The whole batch's.
            parts: How it is split.
            autocast: Context factory for forward passes.
        """

        def quadratic(direction: dict[str, Tensor]) -> Tensor:
            forms = []
            for part in parts:
                inputs = (observations[part.rows],)
                with autocast():
                    output, (tangent,) = output_tangents(self.network, inputs, [direction])
                form = self.metric(as_outputs(output))
                forms.append(part.share * form(*as_outputs(tangent)).mean())
            return torch.stack(forms).sum()

        return quadratic


def differentiate(
    optimizer: KFAC, loss: Tensor, outputs: tuple[Tensor, ...], metric: Callable[..., Tensor]
) -> FisherQuadratic | None:
    """Set the gradients of a loss, and give U -> U^T F U with the exact Fisher if it is wanted.

    F = 1/B sum_b J_b^T H_b J_b with J the Jacobian of the outputs and H the Fisher of the output
    distribution, so that U^T F U is the mean over the batch of metric(J U).

    Args:
        optimizer: Whose parameters get gradients; its settings say whether F is wanted.
        loss: A scalar that depends on the parameters through the outputs alone.
        outputs: What the network returned, with its graph.
        metric: Tangents t of the outputs to t^T H t (B,).
    """
    optimizer.zero_grad()
    if optimizer.config.quadratic != "exact":
        torch.autograd.backward(loss)
        return None
    named = optimizer.curvature.named
    linear = Linearized(outputs, named, torch.autograd.grad(loss, outputs))
    for name, gradient in linear.gradients.items():
        named[name].grad = gradient
    return lambda direction: metric(*linear.tangents(direction)).mean()
