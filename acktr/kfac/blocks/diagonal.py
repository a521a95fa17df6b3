"""The block of a parameter that no layer claims: the diagonal of its Fisher, from whole batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from acktr.kfac.blocks.moment import MomentBlock
from acktr.kfac.config import KFACConfig
from acktr.kfac.statistics.averages import RunningAverage
from acktr.kfac.tensors import accumulation_type

PRIOR = 8.0
"""Degrees of freedom of the mean over a tensor, in batches: what its entries are drawn towards."""


class DiagonalBlock(MomentBlock):
    """A parameter of any use whose curvature is the diagonal of the Fisher.

    The scores g_n of independent samples, at targets drawn from the model, have mean zero and do
    not correlate, so that the square of a batch's summed gradient has the expectation

        1/Z E[(sum_n g_n)^2] = 1/Z sum_n E[g_n^2] = diag F.

    It takes no more than the gradient of the parameter in the backward pass of the targets:
    nothing is asked of the module, of its layers, or of the shape of a sample.

    One batch gives every entry with one degree of freedom: a chi-square, which is often near zero,
    where the step would be as long as the damping allows. The entries of a tensor are therefore
    drawn towards their mean m as the posterior mean of a precision is (Smyth 2004, Statistical
    Applications in Genetics and Molecular Biology 3),

        d = (k S + k_0 m) / (k + k_0),    U = g / (d + lambda),

    with k the batches that the average S stands for and k_0 = ``PRIOR``. The mean has a part of 8/9
    in d after the first batch and of 4 % in the long run with a decay of 0.99; the sum over the
    tensor is that of S at any time. Trainings depended little on k_0 between 1 and 64.

    It needs no decomposition and takes the present average at every step.

    Args:
        name: The parameter.
        parameter: Its tensor.
        config: Settings.
    """

    paths: tuple[str, ...] = ()
    """No layer is recorded for it."""

    def __init__(self, name: str, parameter: Tensor, config: KFACConfig) -> None:
        self.name = name
        self.names: tuple[str, ...] = (name,)
        self.decay = config.stat_decay
        self.dtype = accumulation_type(parameter)
        zero = torch.zeros(parameter.shape, dtype=self.dtype, device=parameter.device)
        super().__init__(f"parameter {name!r}", zero, config.max_failures)

    @property
    def factors(self) -> list[RunningAverage]:
        """Nothing is decomposed."""
        return []

    def square(self, gradient: Tensor) -> Tensor:
        """The square of a batch's summed gradient, in the type of the statistics."""
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        return dense.to(self.dtype).square()

    def observe(self, squares: Tensor | None, count: float) -> None:
        """Join a part of a batch.

        Args:
            squares: Sum of w_c g_c^2 over its scalars; None if none depends on the parameter, whose
                gradient is then zero (but one that nothing ever reached has no statistics).
            count: What the part adds to the divisor Z.
        """
        if squares is not None:
            self.moment.add(squares, count)
        elif self.history.started:
            self.moment.add(torch.zeros_like(self.moment.value), count)
        else:
            self.moment.pass_over(count)

    def fisher(self) -> Tensor:
        """The diagonal d that a step divides by, drawn towards its mean; NaN without statistics."""
        moment, weight = self.moment.mean(), self.moment.weight
        # (sum of weights)^2 / sum of squared weights of the batches in an exponential average.
        batches = (1 + self.decay) / (1 - self.decay) * weight / (2 - weight)
        return (batches * moment + PRIOR * moment.mean()) / (batches + PRIOR)

    def damped(self, damping: float) -> Tensor:
        """The entries of F + lambda, in the parameter's shape."""
        return self.fisher() + damping

    def turned(self, inner: Tensor, *, squared: bool = False) -> dict[str, Tensor]:
        """Entries as the parameter."""
        return {self.name: inner}

    def precondition(self, gradients: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        """Return g / (d + lambda), or the gradient before any statistics."""
        gradient = gradients[self.name]
        if not self.history.started:
            return {self.name: gradient}
        step = (gradient.to(self.dtype) / (self.fisher() + damping)).to(gradient.dtype)
        return {self.name: torch.where(self.moment.weight > 0, step, gradient)}
