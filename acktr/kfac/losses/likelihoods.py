"""Losses that are negative log-likelihoods: objective, sampled targets, Hessian and its roots.

An output (N, ..., D) holds one event in its last dimension; every leading index is one *term* l of
the objective h = (1/Z) sum l. For each loss here the Fisher matrix of the output distribution is
the Gauss-Newton weight H of its term (Martens, "New insights and perspectives on the natural
gradient method", 2020, section 9), so that the same H can be sampled, factored and multiplied by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from acktr.kfac.checks import check_integer, check_number
from acktr.kfac.losses.base import Likelihood, OutputLoss
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
