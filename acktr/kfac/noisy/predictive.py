"""What a posterior over the weights of a module predicts, and how well it explains data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from acktr.kfac.checks import check_integer

LogLikelihood = Callable[[Any, Any], Tensor]
"""Output and target -> log p of every term, constants included."""


class Predictive:
    """A distribution over the weights of a module, from :meth:`draw` and :meth:`kl`."""

    module: nn.Module
    data_size: int

    def draw(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One sample of the weights by name."""
        raise NotImplementedError

    def kl(self) -> Tensor:
        """KL(q || prior) in nats."""
        raise NotImplementedError

    def sample(self, count: int = 1, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Samples of the weights by name (count, ...), as functional_call and vmap take them."""
        check_integer("samples", count, 1)
        drawn = [self.draw(generator) for _ in range(count)]
        return {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}

    def _outputs(self, inputs: Any, count: int, generator: torch.Generator | None) -> Iterator[Any]:
        """The module's outputs at samples of the weights; its buffers are not touched either."""
        check_integer("samples", count, 1)
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        for _ in range(count):
            buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
            weights = self.draw(generator)
            yield functional_call(self.module, {**buffers, **weights}, args)

    @torch.no_grad()
    def predict(
        self, inputs: Any, samples: int = 10, generator: torch.Generator | None = None
    ) -> Tensor:
        """Outputs (samples, N, ...) of the module, each sample of the weights for all inputs.

        The module is not touched, and runs in the mode in which it is: with dropout or batch
        normalisation it is put into evaluation mode first. Probabilities are to be averaged, not
        logits.

        Args:
            inputs: Its input, or a tuple of positional ones.
            samples: Number of weight samples.
            generator: Source of the noise; by default an own one that training does not use.
        """
        return torch.stack(list(self._outputs(inputs, samples, generator)))

    @torch.no_grad()
    def elbo(
        self,
        inputs: Any,
        targets: Any,
        log_likelihood: LogLikelihood,
        *,
        samples: int = 10,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Estimate of E_q log p(data | w) - KL(q || prior), in nats, whatever lambda is.

        It is N times the mean over terms and samples of log p, less the divergence: on all training
        data an unbiased estimate of a lower bound of the log evidence.

        Args:
            inputs: All training data, or a random part of them.
            targets: Their targets.
            log_likelihood: log p of every loss term for an output and targets, constants included.
            samples: Number of weight samples.
            generator: Source of the noise.
        """
        outputs = self._outputs(inputs, samples, generator)
        found = [log_likelihood(output, targets).mean() for output in outputs]
        return self.data_size * torch.stack(found).mean() - self.kl()
