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
from torch.nn import functional

from acktr.kfac.losses.terms import (
    Reduction,
    bernoulli_variance,
    categorical_roots,
    check_generator,
    check_like,
    check_positive,
    check_range,
    check_reduction,
    check_tuple,
    checked_output,
    diagonal_roots,
    gaussian_terms,
    learnt_gaussian_fisher,
    mean_and_log_std,
    reduced,
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
    "curvature_quadratic",
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
class CategoricalLoss:
    """Cross-entropy: l = -log softmax(z)_y for logits z (N, ..., D), classes y int64 (N, ...).

    H = diag(p) - p p^T with p = softmax(z).
    """

    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        """Check the fields; raises ValueError."""
        check_reduction(self, self.reduction)

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean, batch mean or sum of the terms."""
        return reduced(self.empirical(output, target), output, self.reduction)

    def normalizer(self, output: Tensor) -> float | None:
        """Z of this batch."""
        return term_count(checked_output(self, output), self.reduction)

    def sampled(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        """-sum log p(t) with t ~ softmax(z), by a race of exponentials: argmax p / E."""
        logits = checked_output(self, output)
        check_generator(self, generator, logits)
        log_p = logits.log_softmax(-1)
        race = torch.empty_like(log_p).exponential_(generator=generator)
        race = race.clamp(min=torch.finfo(race.dtype).tiny)
        drawn = (log_p.detach().exp() / race).argmax(-1, keepdim=True)
        return -log_p.gather(-1, drawn).sum()

    def empirical(self, output: Tensor, target: Tensor) -> Tensor:
        """-sum log p(y)."""
        logits = checked_output(self, output)
        check_like(self, "target", target, logits, logits.shape[:-1], integer=True)
        check_range(self, target, 0, logits.shape[-1] - 1)
        return -logits.log_softmax(-1).gather(-1, target[..., None]).sum()

    def roots(self, output: Tensor) -> Iterator[Tensor]:
        """Columns r_c = sqrt(p_c) (e_c - p)."""
        return categorical_roots(checked_output(self, output))

    def hessian_product(self, output: Tensor, tangent: Tensor) -> Tensor:
        """Product p * (t - p . t)."""
        p = checked_output(self, output).detach().softmax(-1)
        check_like(self, "tangent", tangent, p, p.shape)
        return (p * (tangent - (p * tangent).sum(-1, keepdim=True))).to(output.dtype)


@dataclass(frozen=True, kw_only=True)
class BernoulliLoss:
    """Binary cross-entropy of D logits: l = -sum_d [y log p + (1 - y) log(1 - p)], p = sigmoid(z).

    Targets (N, ..., D) lie in [0, 1]. H = diag(p (1 - p)).
    """

    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        """Check the fields; raises ValueError."""
        check_reduction(self, self.reduction)

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean, batch mean or sum of the terms (each already a sum over D)."""
        return reduced(self.empirical(output, target), output, self.reduction)

    def normalizer(self, output: Tensor) -> float | None:
        """Z of this batch."""
        return term_count(checked_output(self, output), self.reduction)

    def sampled(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        """-sum log p(t) with t ~ Bernoulli(p)."""
        logits = checked_output(self, output)
        check_generator(self, generator, logits)
        uniform = torch.empty_like(logits).uniform_(generator=generator)
        drawn = (uniform < logits.detach().sigmoid()).to(logits.dtype)
        return functional.binary_cross_entropy_with_logits(logits, drawn, reduction="sum")

    def empirical(self, output: Tensor, target: Tensor) -> Tensor:
        """Sum of the binary cross-entropies."""
        logits = checked_output(self, output)
        check_like(self, "target", target, logits, logits.shape)
        check_range(self, target, 0, 1)
        wanted = target.to(logits.dtype)
        return functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")

    def roots(self, output: Tensor) -> Iterator[Tensor]:
        """Columns r_d = sqrt(p_d (1 - p_d)) e_d."""
        logits = checked_output(self, output)
        return diagonal_roots(logits, bernoulli_variance(logits).sqrt())

    def hessian_product(self, output: Tensor, tangent: Tensor) -> Tensor:
        """Product p (1 - p) t."""
        variance = bernoulli_variance(checked_output(self, output))
        check_like(self, "tangent", tangent, variance, variance.shape)
        return (variance * tangent).to(output.dtype)


@dataclass(frozen=True, kw_only=True)
class GaussianLoss:
    """Squared error: l = 1/2 ||(y - m) / std||^2 for means m (N, ..., D), targets of that shape.

    The constants of the density are left out. H = I / std^2; std is in the units of the targets.
    """

    std: float = 1.0
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        """Check the fields; raises ValueError."""
        check_reduction(self, self.reduction)
        check_positive(self, "std", self.std)

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean, batch mean or sum of the terms (each already a sum over D)."""
        return reduced(self.empirical(output, target), output, self.reduction)

    def normalizer(self, output: Tensor) -> float | None:
        """Z of this batch."""
        return term_count(checked_output(self, output), self.reduction)

    def sampled(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sum of 1/2 ((t - m) / std)^2 with t ~ N(m, std^2)."""
        mean = checked_output(self, output)
        check_generator(self, generator, mean)
        # t - m as noise plus an exact zero, so that a large mean rounds nothing off the noise.
        noise = torch.empty_like(mean).normal_(generator=generator)
        return 0.5 * (noise + (mean.detach() - mean) / self.std).square().sum()

    def empirical(self, output: Tensor, target: Tensor) -> Tensor:
        """Sum of 1/2 ((y - m) / std)^2."""
        mean = checked_output(self, output)
        check_like(self, "target", target, mean, mean.shape)
        return 0.5 * ((target.to(mean.dtype) - mean) / self.std).square().sum()

    def roots(self, output: Tensor) -> Iterator[Tensor]:
        """Columns r_d = e_d / std."""
        mean = checked_output(self, output)
        return diagonal_roots(mean, torch.ones_like(mean) / self.std)

    def hessian_product(self, output: Tensor, tangent: Tensor) -> Tensor:
        """Product t / std^2."""
        mean = checked_output(self, output)
        check_like(self, "tangent", tangent, mean, mean.shape)
        return (tangent / self.std / self.std).to(output.dtype)


@dataclass(frozen=True, kw_only=True)
class LearntGaussianLoss:
    """Negative log-density of N(m, s^2) for outputs (N, ..., 2 D): D means m, then D of log s.

    l = sum_d 1/2 ((y - m) / s)^2 + log s + 1/2 log 2 pi for targets y (N, ..., D). H is the Fisher
    matrix, diag(1 / s^2, 2): the Hessian of l averaged over y from the model, and no Hessian at
    the given y.
    """

    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        """Check the fields; raises ValueError."""
        check_reduction(self, self.reduction)

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean, batch mean or sum of the terms (each already a sum over D)."""
        return reduced(self.empirical(output, target), output, self.reduction)

    def normalizer(self, output: Tensor) -> float | None:
        """Z of this batch."""
        mean, _ = mean_and_log_std(self, output)
        return term_count(mean, self.reduction)

    def sampled(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        """-sum log p(t) with t ~ N(m, s^2)."""
        mean, log_std = mean_and_log_std(self, output)
        check_generator(self, generator, mean)
        noise = torch.empty_like(mean).normal_(generator=generator)
        residual = log_std.detach().exp() * noise + (mean.detach() - mean)
        return gaussian_terms(residual, log_std)

    def empirical(self, output: Tensor, target: Tensor) -> Tensor:
        """-sum log p(y)."""
        mean, log_std = mean_and_log_std(self, output)
        check_like(self, "target", target, mean, mean.shape)
        return gaussian_terms(target.to(mean.dtype) - mean, log_std)

    def roots(self, output: Tensor) -> Iterator[Tensor]:
        """Columns e_d / s for the means and sqrt(2) e_{D + d} for the log-stds."""
        mean, log_std = mean_and_log_std(self, output)
        root = learnt_gaussian_fisher(log_std).sqrt()
        return diagonal_roots(torch.cat([mean, log_std], dim=-1), root)

    def hessian_product(self, output: Tensor, tangent: Tensor) -> Tensor:
        """Products t_m / s^2 for the means and 2 t for the log-stds."""
        fisher = learnt_gaussian_fisher(mean_and_log_std(self, output)[1])
        check_like(self, "tangent", tangent, fisher, fisher.shape)
        return (fisher * tangent).to(output.dtype)


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
                check_positive(self, f"weights[{index}]", weight)

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


def curvature_quadratic(loss: OutputLoss[Output], output: Output, t1: Output, t2: Output) -> Tensor:
    """1/Z sum over terms of t1^T H t2, a scalar.

    Args:
        loss: Gives H and Z.
        output: Where H is taken, (N, ..., D) or a tuple for :class:`SumLoss`.
        t1: Tangent of the output's shape.
        t2: Tangent of the output's shape.

    Raises:
        ValueError: A tangent does not fit.
    """
    left, right = _tensors(t1), _tensors(loss.hessian_product(output, t2))
    if [t.shape for t in left] != [t.shape for t in right]:
        shapes = [tuple(t.shape) for t in left]
        raise ValueError(f"t1 must have the shapes {[tuple(t.shape) for t in right]}, got {shapes}")
    products = torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)])
    return products.sum() / (loss.normalizer(output) or 1.0)


def _tensors(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
