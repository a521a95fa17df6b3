"""Losses that are negative log-likelihoods: objective, sampled targets, Hessian and its roots.

An output (N, ..., D) holds one event in its last dimension; every leading index is one *term* l of
the objective h = (1/Z) sum l. For each loss here the Fisher matrix of the output distribution is
the Gauss-Newton weight H of its term (Martens, "New insights and perspectives on the natural
gradient method", 2020, section 9), so that the same H can be sampled, factored and multiplied by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from acktr.kfac.checks import check_choice, check_number
from acktr.kfac.losses.distributions import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    Distribution,
    Gaussian,
)
from acktr.kfac.losses.terms import (
    REDUCTIONS,
    Reduction,
    categorical_roots,
    check_generator,
    check_halves,
    check_like,
    check_range,
    check_tuple,
    checked_output,
    diagonal_roots,
    term_count,
)

__all__ = [
    "BernoulliLoss",
    "CategoricalLoss",
    "GaussianLoss",
    "LearntGaussianLoss",
    "OutputLoss",
    "Reduction",
    "SumLoss",
]

Output = TypeVar("Output", bound=Tensor | tuple[Tensor, ...])


@runtime_checkable
class OutputLoss(Protocol[Output]):
    """An objective of a network's output whose curvature is a Fisher matrix.

    Output and target are one tensor, or one tuple of tensors each for :class:`SumLoss`. Every
    method raises ValueError for an output, target or tangent that does not fit. Target *values* are
    checked as well, for which ``__call__`` and ``empirical`` wait for the device.
    """

    @property
    def reduction(self) -> Reduction:
        """The choice of Z."""

    def __call__(self, output: Output, target: Output) -> Tensor:
        """The objective h, a scalar."""

    def normalizer(self, output: Output) -> float | None:
        """Z of this batch; None for the reduction "sum"."""

    def sampled(self, output: Output, generator: torch.Generator | None) -> Tensor:
        """Sum of -log p(t) over the terms, with targets t drawn from p itself (not divided by Z).

        Its gradient g with respect to the output has E[g g^T] = H for every term; no gradient flows
        through the targets.
        """

    def empirical(self, output: Output, target: Output) -> Tensor:
        """Sum of the terms at these targets (not divided by Z)."""

    def roots(self, output: Output) -> Iterator[Tensor]:
        """Scalars sum(r_c * output) whose constants r_c have sum_c r_c r_c^T = H of each sample.

        There is one for every position within a sample and column of the event, since positions
        that shared one would get cross terms that H does not have.
        """

    def hessian_product(self, output: Output, tangent: Output) -> Output:
        """H t for every term (not divided by Z), in the shape of the output, with H detached."""


@dataclass(frozen=True, kw_only=True)
class _Likelihood:
    """A distribution as a loss: what is the same for all kinds.

    A kind says which distribution an output stands for, what fits, and the roots of H.
    """

    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        """Check the fields; raises ValueError."""
        check_choice(f"{type(self).__name__}: reduction", self.reduction, REDUCTIONS)

    def roots(self, output: Tensor) -> Iterator[Tensor]:
        """Scalars sum(r_c * output), see :class:`OutputLoss`."""
        raise NotImplementedError

    def _distribution(self, output: Tensor) -> Distribution:
        """The distribution of the targets at a checked output."""
        raise NotImplementedError

    def _checked(self, output: Tensor) -> Tensor:
        """The output in single precision at least; raises ValueError when it does not fit."""
        return checked_output(self, output)

    def _check_target(self, target: Tensor, output: Tensor) -> None:
        check_like(self, "target", target, output, output.shape)

    def _centred(self, output: Tensor) -> Tensor:
        """An output where a sample's terms have the same gradients and are rounded least."""
        return output

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean, batch mean or sum of the terms (each already a sum over the event)."""
        return self.empirical(output, target) / (self.normalizer(output) or 1.0)

    def normalizer(self, output: Tensor) -> float | None:
        """Z of this batch."""
        return term_count(self._checked(output), self.reduction)

    def sampled(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sum of -log p(t) over targets t ~ p, made of noise that is drawn first."""
        checked = self._checked(output)
        check_generator(self, generator, checked)
        distribution = self._distribution(self._centred(checked))
        drawn = distribution.sample(distribution.noise(generator))
        return -distribution.log_prob(drawn).sum()

    def empirical(self, output: Tensor, target: Tensor) -> Tensor:
        """Sum of -log p(y)."""
        checked = self._checked(output)
        self._check_target(target, checked)
        return -self._distribution(checked).log_prob(target).sum()

    def hessian_product(self, output: Tensor, tangent: Tensor) -> Tensor:
        """H t for every term, with H detached."""
        checked = self._checked(output).detach()
        check_like(self, "tangent", tangent, checked, checked.shape)
        return self._distribution(checked).fisher_product(tangent).to(output.dtype)


@dataclass(frozen=True, kw_only=True)
class CategoricalLoss(_Likelihood):
    """Cross-entropy: l = -log softmax(z)_y for logits z (N, ..., D), classes y int64 (N, ...).

    H = diag(p) - p p^T with p = softmax(z).
    """

    def roots(self, output: Tensor) -> Iterator[Tensor]:
        """Columns r_c = sqrt(p_c) (e_c - p)."""
        return categorical_roots(self._checked(output))

    def _distribution(self, output: Tensor) -> Categorical:
        return Categorical(output)

    def _check_target(self, target: Tensor, output: Tensor) -> None:
        check_like(self, "target", target, output, output.shape[:-1], integer=True)
        check_range(self, target, 0, output.shape[-1] - 1)


@dataclass(frozen=True, kw_only=True)
class BernoulliLoss(_Likelihood):
    """Binary cross-entropy of D logits: l = -sum_d [y log p + (1 - y) log(1 - p)], p = sigmoid(z).

    Targets (N, ..., D) lie in [0, 1]. H = diag(p (1 - p)).
    """

    def roots(self, output: Tensor) -> Iterator[Tensor]:
        """Columns r_d = sqrt(p_d (1 - p_d)) e_d."""
        logits = self._checked(output)
        return diagonal_roots(logits, self._distribution(logits).variance().sqrt())

    def _distribution(self, output: Tensor) -> Bernoulli:
        return Bernoulli(output)

    def _check_target(self, target: Tensor, output: Tensor) -> None:
        check_like(self, "target", target, output, output.shape)
        check_range(self, target, 0, 1)


@dataclass(frozen=True, kw_only=True)
class GaussianLoss(_Likelihood):
    """Squared error: l = 1/2 ||(y - m) / std||^2 for means m (N, ..., D), targets of that shape.

    The constants of the density are left out. H = I / std^2; std is in the units of the targets.
    """

    std: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields; raises ValueError."""
        super().__post_init__()
        check_number("GaussianLoss: std", self.std, open_low=True)

    def roots(self, output: Tensor) -> Iterator[Tensor]:
        """Columns r_d = e_d / std."""
        mean = self._checked(output)
        return diagonal_roots(mean, torch.ones_like(mean) / self.std)

    def _distribution(self, output: Tensor) -> Gaussian:
        return Gaussian(output, self.std)

    def _centred(self, output: Tensor) -> Tensor:
        return output - output.detach()  # a large mean would round off the noise


@dataclass(frozen=True, kw_only=True)
class LearntGaussianLoss(_Likelihood):
    """Negative log-density of N(m, s^2) for outputs (N, ..., 2 D): D means m, then D of log s.

    l = sum_d 1/2 ((y - m) / s)^2 + log s + 1/2 log 2 pi for targets y (N, ..., D). H is the Fisher
    matrix, diag(1 / s^2, 2): the Hessian of l averaged over y from the model, and no Hessian at
    the given y.
    """

    def roots(self, output: Tensor) -> Iterator[Tensor]:
        """Columns e_d / s for the means and sqrt(2) e_{D + d} for the log-stds."""
        checked = self._checked(output)
        return diagonal_roots(checked, self._distribution(checked).fisher_diagonal().sqrt())

    def _distribution(self, output: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(output)

    def _checked(self, output: Tensor) -> Tensor:
        checked = checked_output(self, output)
        check_halves(self, checked)
        return checked

    def _check_target(self, target: Tensor, output: Tensor) -> None:
        mean, _ = output.chunk(2, dim=-1)
        check_like(self, "target", target, mean, mean.shape)

    def _centred(self, output: Tensor) -> Tensor:
        mean, log_std = output.chunk(2, dim=-1)
        return torch.cat([mean - mean.detach(), log_std], dim=-1)


@dataclass(frozen=True, kw_only=True)
class SumLoss:
    """h = sum_k w_k h_k for a network with several outputs, such as a policy and a value.

    Output and target are tuples with one tensor for each part. Everything that is not divided by Z
    is scaled to the normalizer Z_0 of the first part: H_k counts w_k Z_0 / Z_k times, so that
    dividing by Z_0 gives the curvature of h.

    Args:
        parts: The losses, all with the same reduction.
        weights: A finite number > 0 for each part; None means 1 for all of them.

    Raises:
        ValueError: No parts, different reductions, or weights that do not fit.
    """

    parts: tuple[OutputLoss[Tensor], ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check the fields; raises ValueError."""
        if not isinstance(self.parts, tuple) or not self.parts:
            raise ValueError(f"SumLoss: parts must be a tuple of losses, got {self.parts!r}")
        reductions = [part.reduction for part in self.parts]
        if len(set(reductions)) > 1:
            raise ValueError(f"SumLoss: parts must share one reduction, got {reductions}")
        if self.weights is not None:
            check_tuple(self, "weights", self.weights, len(self.parts), "numbers")
            for index, weight in enumerate(self.weights):
                check_number(f"SumLoss: weights[{index}]", weight, open_low=True)

    @property
    def reduction(self) -> Reduction:
        """The reduction of the parts."""
        return self.parts[0].reduction

    def __call__(self, output: tuple[Tensor, ...], target: tuple[Tensor, ...]) -> Tensor:
        """Sum of w_k h_k."""
        check_tuple(self, "output", output, len(self.parts))
        check_tuple(self, "target", target, len(self.parts))
        losses = zip(self._weights(), self.parts, output, target, strict=True)
        return torch.stack([weight * part(o, t) for weight, part, o, t in losses]).sum()

    def normalizer(self, output: tuple[Tensor, ...]) -> float | None:
        """Z_0, that of the first part."""
        check_tuple(self, "output", output, len(self.parts))
        return self.parts[0].normalizer(output[0])

    def sampled(self, output: tuple[Tensor, ...], generator: torch.Generator | None) -> Tensor:
        """Sum of the parts' samples times sqrt(w_k Z_0 / Z_k), drawn one part after another."""
        scaled = zip(self._scales(output), self.parts, output, strict=True)
        sums = [math.sqrt(scale) * part.sampled(o, generator) for scale, part, o in scaled]
        return torch.stack(sums).sum()

    def empirical(self, output: tuple[Tensor, ...], target: tuple[Tensor, ...]) -> Tensor:
        """Sum of the parts' terms times w_k Z_0 / Z_k."""
        check_tuple(self, "target", target, len(self.parts))
        scaled = zip(self._scales(output), self.parts, output, target, strict=True)
        return torch.stack([scale * part.empirical(o, t) for scale, part, o, t in scaled]).sum()

    def roots(self, output: tuple[Tensor, ...]) -> Iterator[Tensor]:
        """The parts' columns times sqrt(w_k Z_0 / Z_k), each part with columns of its own."""
        scaled = zip(self._scales(output), self.parts, output, strict=True)
        columns = [(math.sqrt(scale), part.roots(o)) for scale, part, o in scaled]
        return (root * column for root, part in columns for column in part)

    def hessian_product(
        self, output: tuple[Tensor, ...], tangent: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """w_k Z_0 / Z_k H_k t_k for each part."""
        check_tuple(self, "tangent", tangent, len(self.parts))
        scaled = zip(self._scales(output), self.parts, output, tangent, strict=True)
        return tuple(scale * part.hessian_product(o, t) for scale, part, o, t in scaled)

    def _weights(self) -> tuple[float, ...]:
        return self.weights or (1.0,) * len(self.parts)

    def _scales(self, output: tuple[Tensor, ...]) -> list[float]:
        """w_k Z_0 / Z_k of every part."""
        check_tuple(self, "output", output, len(self.parts))
        sizes = [p.normalizer(o) or 1.0 for p, o in zip(self.parts, output, strict=True)]
        return [w * sizes[0] / size for w, size in zip(self._weights(), sizes, strict=True)]
