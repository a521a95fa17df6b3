"""The precision of Gaussian noise, learnt beside the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Gamma, kl_divergence

from acktr.kfac.checks import check_integer, check_number
from acktr.kfac.state import cast_like, require_like, with_own_generators
from acktr.kfac.statistics.averages import RunningAverage


def gaussian_log_prob(output: Tensor, target: Tensor, precision: Tensor | float) -> Tensor:
    """Log N(target; output, 1 / precision) of every number, constants included.

    Args:
        output: Means (..., N, D), with dimensions of samples in front or without.
        target: Targets (N, D), or whatever else the last dimensions of the output are.
        precision: A number, or a tensor that the output's dimensions fit, as (samples, 1, 1).

    Raises:
        ValueError: The shapes do not fit, as torch would make (N, N) of (N, 1) and (N).
    """
    lead = output.dim() - target.dim()
    if lead < 0 or output.shape[lead:] != target.shape:
        raise ValueError(
            f"gaussian_log_prob got an output {tuple(output.shape)} and a target"
            f" {tuple(target.shape)}: the target must have the output's shape (dimensions of"
            " samples in front of the output's excepted)"
        )
    tau = torch.as_tensor(precision, dtype=output.dtype, device=output.device)
    pairs = zip(reversed(tau.shape), reversed(output.shape), strict=False)
    if any(size not in (1, wanted) for size, wanted in pairs):
        raise ValueError(
            f"gaussian_log_prob got an output {tuple(output.shape)} and a precision"
            f" {tuple(tau.shape)}: every dimension of the precision must be 1 or the output's"
        )
    return 0.5 * (tau.log() - math.log(2 * math.pi) - tau * (target - output).square())


class NoisePrecision:
    """q(tau) = Gamma(alpha, beta) for targets y ~ N(f(x), 1 / tau), with a Gamma(a, b) prior.

    The prior is conjugate, so that the optimum of the variational objective given q(w) is

        alpha = a + N / (2 lambda),   beta = b + SSE / (2 lambda),   SSE = sum_n E_q (y_n - f_n)^2,

    with the squared errors of N terms as a running average over batches at weights drawn from q.
    Several precisions, as of the splits of a data set, are a vector. Before the first batch q is
    the prior. Zhang et al. 2018 take steps of Adam to the same optimum.

    Args:
        data_size: N.
        count: Number of precisions; None for a single one, a scalar.
        prior_shape: a.
        prior_rate: b.
        kl_weight: lambda.
        decay: Of the running average of squared errors.
        seed: Seed of the generator of samples.
        dtype: Type of the numbers.
    """

    def __init__(
        self,
        data_size: int,
        count: int | None = None,
        *,
        prior_shape: float = 6.0,
        prior_rate: float = 6.0,
        kl_weight: float = 1.0,
        decay: float = 0.99,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_integer("data_size (the loss terms of the whole training set)", data_size, 1)
        for name, value in (("prior_shape", prior_shape), ("prior_rate", prior_rate)):
            check_number(name, value, open_low=True)
        check_number("kl_weight", kl_weight, open_low=True)
        check_number("decay", decay, high=1.0, open_high=True)
        shape = () if count is None else (count,)
        self.data_size, self.kl_weight, self._decay = data_size, kl_weight, decay
        self._errors = RunningAverage(torch.zeros(shape, dtype=dtype))
        self._prior = (prior_shape, prior_rate)
        self.generator = torch.Generator().manual_seed(seed)

    def observe(self, output: Tensor, target: Tensor) -> None:
        """Learn from the squared errors of a batch, (N,) or (N, count), at sampled weights.

        Raises:
            ValueError: The output and the target have not both that shape.
        """
        if output.shape != target.shape:
            raise ValueError(
                f"NoisePrecision got an output {tuple(output.shape)} and a target"
                f" {tuple(target.shape)}: they must have one shape"
            )
        errors = (target - output).detach().square()
        if errors.shape[1:] != self._errors.value.shape:
            raise ValueError(
                f"NoisePrecision has the shape {tuple(self._errors.value.shape)}, and a term of the"
                f" errors {tuple(errors.shape[1:])}"
            )
        self._errors.update(errors.mean(0).to(self._errors.value), self._decay)

    @property
    def shape(self) -> Tensor:
        """The shape alpha."""
        seen = (self._errors.weight > 0).to(self._errors.value)
        return self._prior[0] + seen * self._pull + torch.zeros_like(self._errors.value)

    @property
    def rate(self) -> Tensor:
        """The rate beta."""
        errors = self._errors.mean().nan_to_num(0.0)
        return self._prior[1] + self._pull * errors

    @property
    def _pull(self) -> float:
        return self.data_size / (2 * self.kl_weight)

    def mean(self) -> Tensor:
        """E tau = alpha / beta."""
        return self.shape / self.rate

    def expected_log(self) -> Tensor:
        """E log tau = psi(alpha) - log beta."""
        return torch.digamma(self.shape) - self.rate.log()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw of tau."""
        drawn: Tensor = torch._standard_gamma(self.shape, generator or self.generator)
        return drawn / self.rate

    def kl(self) -> Tensor:
        """KL(q(tau) || prior) of every precision, in nats."""
        like = self._errors.value
        prior = Gamma(torch.full_like(like, self._prior[0]), torch.full_like(like, self._prior[1]))
        return kl_divergence(Gamma(self.shape, self.rate), prior)

    def state_dict(self) -> dict[str, Any]:
        """The running average and the generator."""
        return {
            "errors": self._errors.value,
            "weight": self._errors.weight,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; ValueError and no change if it does not fit."""
        own = self.state_dict()
        state = with_own_generators(state, own)
        require_like(state, own, "NoisePrecision state")
        fitting = cast_like(state, own)
        self._errors.load(fitting["errors"], fitting["weight"])
        self.generator.set_state(fitting["generator"].cpu())
