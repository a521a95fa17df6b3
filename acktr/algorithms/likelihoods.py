"""Policy and value as the losses of :mod:`acktr.kfac`, for curvature and trust region.

They are distributions alone: what is learned from them is in :mod:`acktr.algorithms.objectives`.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import Self

from torch import Tensor

from acktr.kfac import Distribution, GaussianLoss, Likelihood
from acktr.policies import ActionHead


@dataclass(frozen=True, kw_only=True)
class PolicyLoss(Likelihood):
    """-log pi(a|s) for the parameters (B, P) of an action distribution."""

    head: ActionHead = field(compare=False)
    _masks: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def weighted(
        self,
        output: Tensor,
        weights: Tensor | None = None,
        target: Tensor | None = None,
        *,
        empty: bool = False,
    ) -> Self:
        """This loss with weights of one batch, and its action masks (B, P) in place of targets."""
        bound = super().weighted(output, weights, empty=empty)
        if target is not None:
            bound = copy(bound)
            object.__setattr__(bound, "_masks", target)
        return bound

    def _distribution(self, output: Tensor) -> Distribution:
        return self.head.make(output, self._masks)


@dataclass(frozen=True, kw_only=True)
class ValueLoss(GaussianLoss):
    """Squared error of values (B,), whose observation model is N(V, std^2)."""

    def _terms_last(self, output: Tensor) -> Tensor:
        return super()._terms_last(output[:, None])

    def _like_output(self, tensor: Tensor) -> Tensor:
        return tensor[..., 0]

    def _checked_target(self, target: Tensor, output: Tensor) -> Tensor:
        return super()._checked_target(target[:, None], output)
