"""Losses that are negative log-likelihoods: objective, sampled targets, Hessian and its roots.

An output (N, ..., D) holds one event in its last dimension; every leading index is one *term* l of
the objective h = (1/Z) sum l. For each loss here the Fisher matrix of the output distribution is
the Gauss-Newton weight H of its term (Martens, "New insights and perspectives on the natural
gradient method", 2020, section 9), so that the same H can be sampled, factored and multiplied by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from acktr.kfac.checks import check_integer, check_number
from acktr.kfac.losses.base import Likelihood, OutputLoss, with_weights
from acktr.kfac.losses.distributions import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    Gaussian,
)
from acktr.kfac.losses.terms import (
    Reduction,
    categorical_roots,
    check_halves,
    check_like,
    check_range,
    check_tuple,
    checked_output,
    diagonal_roots,
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


@dataclass(frozen=True, kw_only=True)
class CategoricalLoss(Likelihood):
    """Cross-entropy: l = -log softmax(z)_y for logits z (N, ..., D), classes y int64 (N, ...).

    H = diag(p) - p p^T with p = softmax(z). Targets may also be probabilities (N, ..., D), with
    l = -sum_c y_c log p_c and the same H. It agrees with torch's cross_entropy, of which it takes

    Args:
        class_dim: Dimension of the classes: -1, or 1 for logits (N, D, T, ...) as torch has them.
        ignore_index: A class whose terms count neither in h nor in Z; torch's is -100.
        class_weights: Weight w (D,) of each class: h = sum w_y l / sum w_y for "mean".

    With either of the last two the weights of the terms depend on the targets, so that ``observe``
    wants them.
    """

    class_dim: int = -1
    ignore_index: int | None = None
    class_weights: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check the fields; raises ValueError."""
        super().__post_init__()
        if self.class_dim != -1:
            check_integer("CategoricalLoss: class_dim, unless -1,", self.class_dim, 1)
        weights = self.class_weights
        if weights is not None and not (weights.dim() == 1 and weights.is_floating_point()):
            raise ValueError(
                "CategoricalLoss: class_weights must be a floating-point tensor (D,), got"
                f" {weights.dtype} of shape {tuple(weights.shape)}"
            )

    def roots(self, output: Tensor) -> Iterator[Tensor]:
        """Columns r_c = sqrt(p_c) (e_c - p)."""
        self._checked(output)
        return categorical_roots(self._terms_last(output), self._root_weights())

    def _distribution(self, output: Tensor) -> Categorical:
        return Categorical(output)

    def _terms_last(self, output: Tensor) -> Tensor:
        checked = checked_output(self, output)
        if self.class_dim >= checked.dim():
            raise ValueError(
                f"CategoricalLoss: class_dim={self.class_dim} wants an output (N, D, ...),"
                f" got {tuple(checked.shape)}"
            )
        return checked.movedim(self.class_dim, -1)

    def _like_output(self, tensor: Tensor) -> Tensor:
        return tensor.movedim(-1, self.class_dim)

    def _checked_target(self, target: Tensor, output: Tensor) -> Tensor:
        if isinstance(target, Tensor) and target.is_floating_point():
            check_like(self, "target", target, output, self._like_output(output).shape)
            return target.movedim(self.class_dim, -1)
        channels = (len(output), *output.shape[2:])  # where classes were second
        second = isinstance(target, Tensor) and target.shape == channels != output.shape[:-1]
        if self.class_dim == -1 and second:
            raise ValueError(
                f"CategoricalLoss: the target has the shape {channels}, that of logits"
                " (N, D, ...) with the classes second: use CategoricalLoss(class_dim=1)"
            )
        check_like(self, "target", target, output, output.shape[:-1], integer=True)
        return target

    def _check_values(self, target: Tensor, output: Tensor) -> None:
        if not target.is_floating_point():
            check_range(self, target, 0, output.shape[-1] - 1)
            return
        check_range(self, target, 0, 1)
        sums = target.sum(-1)
        if not bool(((sums - 1).abs() < 1e-3).all()):
            raise ValueError(
                "CategoricalLoss: targets that are probabilities must have the sum 1, got sums from"
                f" {float(sums.min()):g} to {float(sums.max()):g}"
            )

    def _harmless(self, target: Tensor) -> Tensor:
        if not target.is_floating_point():
            return torch.zeros_like(target)
        return torch.full_like(target, 1 / target.shape[-1])

    def _log_prob(self, output: Tensor, target: Tensor) -> Tensor:
        distribution = self._distribution(output)
        if not target.is_floating_point():
            found = distribution.log_prob(target)
        else:  # a class of probability zero may have the logit -inf
            found = (distribution.log_p.where(target > 0, 0) * target).sum(-1)
        if bool(found.isnan().any()):
            nothing = (output == -math.inf).all(-1)
            if bool(nothing.any()):
                raise ValueError(
                    "CategoricalLoss: all logits of the term"
                    f" {tuple(nothing.nonzero()[0].tolist())} are -inf: a mask must allow at least"
                    " one class, and weights of 0 leave terms out"
                )
        return found

    def _target_weights(self, target: Tensor | None, output: Tensor) -> Tensor | None:
        if self.ignore_index is None and self.class_weights is None:
            return None
        if target is None:
            raise ValueError(
                "CategoricalLoss: with ignore_index or class_weights the weights of the terms"
                " depend on the targets: observe(..., target=targets)"
            )
        target = self._checked_target(target, output)
        if target.is_floating_point():
            if self.class_weights is not None:
                raise ValueError(
                    "CategoricalLoss: class_weights need classes as targets, not probabilities"
                    " (give weights for the terms instead)"
                )
            return None
        counted = torch.ones_like(target, dtype=torch.bool)
        if self.ignore_index is not None:
            counted = target != self.ignore_index
        weights = counted.to(output.dtype)
        if self.class_weights is not None:
            classes = target.where(counted, 0)
            check_range(self, classes, 0, output.shape[-1] - 1)
            if len(self.class_weights) != output.shape[-1]:
                raise ValueError(
                    f"CategoricalLoss: {len(self.class_weights)} class_weights for"
                    f" {output.shape[-1]} classes"
                )
            weights = weights * self.class_weights.to(weights)[classes]
        return weights


@dataclass(frozen=True, kw_only=True)
class BernoulliLoss(Likelihood):
    """Binary cross-entropy of D logits: l = -sum_d [y log p + (1 - y) log(1 - p)], p = sigmoid(z).

    Targets (N, ..., D) lie in [0, 1]. H = diag(p (1 - p)).
    """

    def roots(self, output: Tensor) -> Iterator[Tensor]:
        """Columns r_d = sqrt(p_d (1 - p_d)) e_d."""
        logits = self._checked(output)
        root = self._distribution(logits).variance().sqrt()
        return diagonal_roots(self._terms_last(output), root, self._root_weights())

    def _distribution(self, output: Tensor) -> Bernoulli:
        return Bernoulli(output)

    def _check_values(self, target: Tensor, output: Tensor) -> None:
        check_range(self, target, 0, 1)


@dataclass(frozen=True, kw_only=True)
class GaussianLoss(Likelihood):
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
        root = torch.ones_like(mean) / self.std
        return diagonal_roots(self._terms_last(output), root, self._root_weights())

    def _distribution(self, output: Tensor) -> Gaussian:
        return Gaussian(output, self.std)

    def _centred(self, output: Tensor) -> Tensor:
        return output - output.detach()  # a large mean would round off the noise


@dataclass(frozen=True, kw_only=True)
class LearntGaussianLoss(Likelihood):
    """Negative log-density of N(m, s^2) for outputs (N, ..., 2 D): D means m, then D of log s.

    l = sum_d 1/2 ((y - m) / s)^2 + log s + 1/2 log 2 pi for targets y (N, ..., D). H is the Fisher
    matrix, diag(1 / s^2, 2): the Hessian of l averaged over y from the model, and no Hessian at
    the given y.
    """

    def roots(self, output: Tensor) -> Iterator[Tensor]:
        """Columns e_d / s for the means and sqrt(2) e_{D + d} for the log-stds."""
        checked = self._checked(output)
        root = self._distribution(checked).fisher_diagonal().sqrt()
        return diagonal_roots(self._terms_last(output), root, self._root_weights())

    def _distribution(self, output: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(output)

    def _terms_last(self, output: Tensor) -> Tensor:
        checked = checked_output(self, output)
        check_halves(self, checked)
        return checked

    def _checked_target(self, target: Tensor, output: Tensor) -> Tensor:
        mean, _ = output.chunk(2, dim=-1)
        check_like(self, "target", target, mean, mean.shape)
        return target

    def _centred(self, output: Tensor) -> Tensor:
        mean, log_std = output.chunk(2, dim=-1)
        return torch.cat([mean - mean.detach(), log_std], dim=-1)


@dataclass(frozen=True, init=False)
class SumLoss:
    """h = sum_k w_k h_k for a network with several outputs, such as a policy and a value.

    Output and target are tuples with one tensor for each part. Everything that is not divided by Z
    is scaled to the normalizer Z_0 of the first part: H_k counts w_k Z_0 / Z_k times, so that
    dividing by Z_0 gives the curvature of h.

    Args:
        parts: The losses, all with the same reduction; each an argument, or together a tuple.
        weights: A finite number > 0 for each part; None means 1 for all of them.

    Raises:
        ValueError: No parts, different reductions, or weights that do not fit.
    """

    parts: tuple[OutputLoss[Tensor], ...]
    weights: tuple[float, ...] | None

    def __init__(
        self,
        *losses: OutputLoss[Tensor] | tuple[OutputLoss[Tensor], ...],
        parts: tuple[OutputLoss[Tensor], ...] | None = None,
        weights: tuple[float, ...] | None = None,
    ) -> None:
        if losses and parts is not None:
            raise ValueError("SumLoss: give the losses as arguments or as parts, not both")
        given: Any = losses[0] if len(losses) == 1 and isinstance(losses[0], tuple) else losses
        object.__setattr__(self, "parts", given if parts is None else parts)
        object.__setattr__(self, "weights", weights)
        whole = isinstance(self.parts, tuple) and all(isinstance(p, OutputLoss) for p in self.parts)
        if not self.parts or not whole:
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

    def weighted(
        self,
        output: tuple[Tensor, ...],
        weights: Tensor | tuple[Tensor | None, ...] | None = None,
        target: tuple[Tensor, ...] | None = None,
    ) -> SumLoss:
        """This loss with weights for the terms of one batch, see :class:`Likelihood`.

        Args:
            output: The network's outputs.
            weights: One tensor for all parts, or a tuple with one, or None, for each part.
            target: The targets.

        Raises:
            ValueError: Something does not fit.
        """
        count = len(self.parts)
        check_tuple(self, "output", output, count)
        each = (weights,) * count if weights is None or isinstance(weights, Tensor) else weights
        check_tuple(self, "weights of the terms", each, count, "tensors or None")
        targets = (None,) * count if target is None else target
        check_tuple(self, "target", targets, count)
        given = zip(self.parts, output, each, targets, strict=True)
        bound = copy(self)
        object.__setattr__(bound, "parts", tuple(with_weights(p, o, w, t) for p, o, w, t in given))
        return bound

    @property
    def term_weights(self) -> list[Tensor]:
        """The weights of the parts' terms, of those that have some."""
        return [weights for part in self.parts for weights in getattr(part, "term_weights", [])]

    def __call__(
        self,
        output: tuple[Tensor, ...],
        target: tuple[Tensor, ...],
        weights: Tensor | tuple[Tensor | None, ...] | None = None,
    ) -> Tensor:
        """Sum of w_k h_k."""
        check_tuple(self, "output", output, len(self.parts))
        check_tuple(self, "target", target, len(self.parts))
        bound = self if weights is None else self.weighted(output, weights, target)
        losses = zip(self._weights(), bound.parts, output, target, strict=True)
        return torch.stack([weight * part(o, t) for weight, part, o, t in losses]).sum()

    def normalizer(self, output: tuple[Tensor, ...]) -> float | None:
        """Z_0, that of the first part."""
        check_tuple(self, "output", output, len(self.parts))
        return self.parts[0].normalizer(output[0])

    def sampled(self, output: tuple[Tensor, ...], generator: torch.Generator | None) -> Tensor:
        """Sum of the parts' samples times sqrt(w_k Z_0 / Z_k), drawn one part after another."""
        scaled = zip(self.scales(output), self.parts, output, strict=True)
        sums = [math.sqrt(scale) * part.sampled(o, generator) for scale, part, o in scaled]
        return torch.stack(sums).sum()

    def empirical(self, output: tuple[Tensor, ...], target: tuple[Tensor, ...]) -> Tensor:
        """Sum of the parts' terms times w_k Z_0 / Z_k."""
        check_tuple(self, "target", target, len(self.parts))
        scaled = zip(self.scales(output), self.parts, output, target, strict=True)
        return torch.stack([scale * part.empirical(o, t) for scale, part, o, t in scaled]).sum()

    def roots(self, output: tuple[Tensor, ...]) -> Iterator[Tensor]:
        """The parts' columns times sqrt(w_k Z_0 / Z_k), each part with columns of its own."""
        scaled = zip(self.scales(output), self.parts, output, strict=True)
        columns = [(math.sqrt(scale), part.roots(o)) for scale, part, o in scaled]
        return (root * column for root, part in columns for column in part)

    def hessian_product(
        self, output: tuple[Tensor, ...], tangent: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """w_k Z_0 / Z_k H_k t_k for each part."""
        check_tuple(self, "tangent", tangent, len(self.parts))
        scaled = zip(self.scales(output), self.parts, output, tangent, strict=True)
        return tuple(scale * part.hessian_product(o, t) for scale, part, o, t in scaled)

    def kl(self, output: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> Tensor:
        """The KL of each part (K,), without its weight w_k."""
        check_tuple(self, "output", output, len(self.parts))
        check_tuple(self, "other", other, len(self.parts))
        each = []
        for part, old, new in zip(self.parts, output, other, strict=True):
            divergence = getattr(part, "kl", None)
            if divergence is None:
                raise ValueError(f"SumLoss: {type(part).__name__} has no kl(output, other)")
            each.append(divergence(old, new))
        return torch.cat(each)

    def _weights(self) -> tuple[float, ...]:
        return self.weights or (1.0,) * len(self.parts)

    def scales(self, output: tuple[Tensor, ...]) -> list[float]:
        """w_k Z_0 / Z_k of every part, which must not differ between micro-batches."""
        check_tuple(self, "output", output, len(self.parts))
        sizes = [p.normalizer(o) or 1.0 for p, o in zip(self.parts, output, strict=True)]
        return [w * sizes[0] / size for w, size in zip(self._weights(), sizes, strict=True)]
