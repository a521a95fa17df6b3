"""What a loss is, and what all losses that are negative log-likelihoods share."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor

from acktr.kfac.checks import check_choice
from acktr.kfac.losses.distributions import Distribution
from acktr.kfac.losses.terms import (
    REDUCTIONS,
    Reduction,
    check_generator,
    check_like,
    checked_output,
    checked_weights,
    has_rows,
    term_count,
)

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
        """Sum of the terms at these targets (not divided by Z), times roots of their weights."""

    def roots(self, output: Output) -> Iterator[Tensor]:
        """Scalars sum(r_c * output) whose constants r_c have sum_c r_c r_c^T = H of each sample.

        There is one for every position within a sample and column of the event, since positions
        that shared one would get cross terms that H does not have.
        """

    def hessian_product(self, output: Output, tangent: Output) -> Output:
        """H t for every term (not divided by Z), in the shape of the output, with H detached."""


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """A distribution as a loss: what is the same for all kinds.

    A kind says which distribution an output stands for, what fits, and the roots of H. A loss that
    :meth:`weighted` returns holds weights w of the terms: its objective is 1/Z sum w l, its H is
    w H, and Z is the sum of the weights for the reduction "mean" and N for "batchmean".
    """

    reduction: Reduction = "mean"
    _weights: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the fields; raises ValueError."""
        check_choice(f"{type(self).__name__}: reduction", self.reduction, REDUCTIONS)

    def roots(self, output: Tensor) -> Iterator[Tensor]:
        """Scalars sum(r_c * output), see :class:`OutputLoss`."""
        raise NotImplementedError

    def _distribution(self, output: Tensor) -> Distribution:
        """The distribution of the targets at a checked output."""
        raise NotImplementedError

    def _terms_last(self, output: Tensor) -> Tensor:
        """The output (N, ..., D) in single precision at least; ValueError when it does not fit."""
        return checked_output(self, output)

    def _checked_target(self, target: Tensor, output: Tensor) -> Tensor:
        """The target as the distribution takes it, without checks of its values."""
        check_like(self, "target", target, output, output.shape)
        return target

    def _check_values(self, target: Tensor, output: Tensor) -> None:
        """Raise ValueError for values that the distribution does not have."""

    def _target_weights(self, target: Tensor | None, output: Tensor) -> Tensor | None:
        """Weights (N, ...) that the targets give the terms; None for 1."""
        return None

    def _log_prob(self, output: Tensor, target: Tensor) -> Tensor:
        return self._distribution(output).log_prob(target)

    def _centred(self, output: Tensor) -> Tensor:
        """An output where a sample's terms have the same gradients and are rounded least."""
        return output

    # --- weights of the terms ---------------------------------------------------------------------

    def weighted(
        self,
        output: Tensor,
        weights: Tensor | None = None,
        target: Tensor | None = None,
        *,
        empty: bool = False,
    ) -> Self:
        """This loss with weights for the terms of one batch.

        Args:
            output: The network's output.
            weights: A mask, or numbers >= 0: (N,), or (N, ...) like the terms or fewer of their
                dimensions; None for 1.
            target: The targets, for a loss in which they decide on weights.
            empty: Whether none need be positive, as in the share of one of several ranks.

        Raises:
            ValueError: The weights do not fit, or none is positive.
        """
        checked = self._terms_last(output)
        own = self._target_weights(target, checked)
        check = partial(checked_weights, self, output=checked, empty=empty)
        given = None if weights is None else check(weights)
        if own is None and given is None:
            return self
        if own is not None:
            given = check(own if given is None else own * given)
        bound = copy(self)
        object.__setattr__(bound, "_weights", given)
        return bound

    @property
    def term_weights(self) -> list[Tensor]:
        """The weights (N, ...) of the terms; none if all are 1."""
        return [] if self._weights is None else [self._weights]

    def _root_weights(self) -> Tensor | None:
        return None if self._weights is None else self._weights.sqrt()

    def _checked(self, output: Tensor) -> Tensor:
        """(N, ..., D), where terms of weight zero are constants: what is in them does not matter.

        Raises:
            ValueError: The output does not fit, or the weights are of another batch.
        """
        checked = self._terms_last(output)
        if self._weights is None:
            self._target_weights(None, checked)  # raises if there must be targets
            return checked
        if self._weights.shape != checked.shape[:-1]:
            raise ValueError(
                f"{type(self).__name__}: the weights are those of another batch:"
                f" {tuple(self._weights.shape)} for terms {tuple(checked.shape[:-1])}"
            )
        return checked.where(self._weights[..., None] > 0, 0)

    def _terms(self, output: Tensor, target: Tensor) -> Tensor:
        """The terms -log p(y) (N, ...); zero, or what it may be, where the weight is zero."""
        checked = self._checked(output)
        target = self._checked_target(target, checked)
        if self._weights is not None:
            alive = self._weights > 0
            wide = alive.reshape(*alive.shape, *[1] * (target.dim() - alive.dim()))
            target = target.where(wide, self._harmless(target))
        self._check_values(target, checked)
        return -self._log_prob(checked, target)

    def _harmless(self, target: Tensor) -> Tensor:
        return torch.zeros_like(target)

    # --- the loss ---------------------------------------------------------------------------------

    def __call__(self, output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean, batch mean or sum of the terms (each already a sum over the event)."""
        bound = self._weights is not None and weights is None
        loss = self if bound else self.weighted(output, weights, target)
        terms = loss._terms(output, target)
        total = terms.sum() if loss._weights is None else (loss._weights * terms).sum()
        return total / (loss.normalizer(output) or 1.0)

    def normalizer(self, output: Tensor) -> float | None:
        """Z of this batch."""
        checked = self._checked(output)
        if self._weights is not None and self.reduction == "mean":
            return float(self._weights.sum())
        return term_count(checked, self.reduction)

    def sampled(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sum of -log p(t) over targets t ~ p, made of noise that is drawn first."""
        checked = self._checked(output)
        check_generator(self, generator, checked)
        distribution = self._distribution(self._centred(checked))
        drawn = distribution.sample(distribution.noise(generator))
        return self._rooted_sum(-distribution.log_prob(drawn))

    def empirical(self, output: Tensor, target: Tensor) -> Tensor:
        """Sum of -log p(y), times sqrt(w) so that a term counts w times in sum g g^T."""
        return self._rooted_sum(self._terms(output, target))

    def _rooted_sum(self, terms: Tensor) -> Tensor:
        weights = self._root_weights()
        return terms.sum() if weights is None else (weights * terms).sum()

    def hessian_product(self, output: Tensor, tangent: Tensor) -> Tensor:
        """H t for every term, with H detached."""
        checked = self._checked(output).detach()
        check_like(self, "tangent", tangent, checked, output.shape)
        product = self._distribution(checked).fisher_product(self._terms_last(tangent))
        if self._weights is not None:
            product = self._weights[..., None] * product
        return self._like_output(product).to(output.dtype)

    def kl(self, output: Tensor, other: Tensor) -> Tensor:
        """1/Z sum w KL(p_output || p_other) over the terms (1,), in nats for "mean"."""
        checked, changed = self._checked(output).detach(), self._checked(other).detach()
        terms = self._distribution(checked).kl(changed)
        if self._weights is not None:
            terms = (self._weights * terms).where(self._weights != 0, 0)
        return terms.sum().reshape(1) / (self.normalizer(output) or 1.0)

    def _like_output(self, tensor: Tensor) -> Tensor:
        """(N, ..., D) with the event where the output has it."""
        return tensor


def with_weights(
    loss: OutputLoss[Any],
    output: Any,
    weights: Any = None,
    target: Any = None,
    *,
    empty: bool = False,
) -> OutputLoss[Any]:
    """The loss with weights for the terms of this batch, see :meth:`Likelihood.weighted`.

    Raises:
        ValueError: Something does not fit, or a loss of one's own takes no weights.
    """
    if empty and not has_rows(output):
        return loss  # without rows there is nothing to weigh
    weighted = getattr(loss, "weighted", None)
    if weighted is None and weights is not None:
        raise ValueError(
            f"{type(loss).__name__} has no method weighted(output, weights, target), which weights"
            " of terms need"
        )
    if weighted is None:
        return loss
    # A loss of one's own may not know the argument.
    more = {"empty": True} if empty and "empty" in signature(weighted).parameters else {}
    bound: OutputLoss[Any] = weighted(output, weights, target, **more)
    return bound
