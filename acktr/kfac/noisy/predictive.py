"""What a posterior over the weights of a module predicts, and how well it explains data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from acktr.kfac.checks import check_integer

LogLikelihood = Callable[[Any, Any], Tensor]
"""Output and target -> log p of every term, constants included."""


class WeightPosterior(Protocol):
    """A distribution over the weights of a module."""

    module: nn.Module
    data_size: int

    def draw(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        """One sample of the weights by name."""

    def kl(self) -> Tensor:
        """KL(q || prior) in nats."""


def samples(
    posterior: WeightPosterior, count: int, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """Samples of the weights by name, with a leading dimension ``count``, as vmap takes them."""
    check_integer("samples", count, 1)
    drawn = [posterior.draw(generator) for _ in range(count)]
    return {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}


def outputs(
    posterior: WeightPosterior, inputs: Any, count: int, generator: torch.Generator | None
) -> Iterator[Any]:
    """The module's outputs at samples of the weights, one sample for all inputs of a call.

    The module itself, its buffers included, is not touched. A tuple of inputs is its positional
    arguments.
    """
    check_integer("samples", count, 1)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    for _ in range(count):
        buffers = {name: buffer.clone() for name, buffer in posterior.module.named_buffers()}
        weights = posterior.draw(generator)
        yield functional_call(posterior.module, {**buffers, **weights}, args)


@torch.no_grad()
def predict(
    posterior: WeightPosterior, inputs: Any, count: int, generator: torch.Generator | None
) -> Tensor:
    """Outputs (count, N, ...) at samples of the weights, for a module that returns one tensor."""
    return torch.stack(list(outputs(posterior, inputs, count, generator)))


@torch.no_grad()
def elbo(
    posterior: WeightPosterior,
    inputs: Any,
    targets: Any,
    log_likelihood: LogLikelihood,
    count: int,
    generator: torch.Generator | None,
) -> Tensor:
    """N times the mean over terms and samples of log p, less KL(q || prior), in nats.

    On all training data it is an unbiased estimate of a lower bound of the log evidence.
    """
    found = [
        log_likelihood(output, targets).mean()
        for output in outputs(posterior, inputs, count, generator)
    ]
    return posterior.data_size * torch.stack(found).mean() - posterior.kl()
