"""The trust region of a step, and the record of what a step did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from acktr.kfac.config import KFACConfig
from acktr.kfac.linalg import trust_scale

FisherQuadratic = Callable[[dict[str, Tensor]], Tensor]
"""U -> U^T F U with the exact Fisher."""


@dataclass(frozen=True)
class StepInfo:
    """What the last step did; tensors stay on the device until somebody reads them."""

    quadratic: Tensor
    """q = U^T F U."""
    scale: Tensor
    """nu of the trust region; 1 in cold steps."""
    predicted_kl: Tensor
    """lr^2 nu^2 q / 2, the KL that the quadratic model predicts for the step without momentum."""
    coefficients: Tensor | None = None
    """alpha and mu of a quadratic-model step."""
    rho: float | None = None
    """Actual over predicted reduction, in steps that adapt the damping."""

    def scaled(self, step: dict[str, Tensor]) -> dict[str, Tensor]:
        """The update nu U by name, and exactly 0 where the step is skipped (U may hold NaN)."""
        skipped, zero = self.scale == 0, torch.zeros_like(self.scale)
        return {
            name: torch.where(skipped, zero, self.scale * update).to(update.dtype)
            for name, update in step.items()
        }


def clip_scale(quadratic: Tensor, step: dict[str, Tensor], lr: float, config: KFACConfig) -> Tensor:
    """nu: within the KL trust region and the norm limit; 0 where q is not finite."""
    if config.kl_clip is None:
        finite = torch.isfinite(quadratic)
        scale = torch.where(finite, torch.ones_like(quadratic), torch.zeros_like(quadratic))
    else:
        scale = trust_scale(quadratic, lr, config.kl_clip)
    if config.norm_clip is not None:
        square = torch.stack([update.square().sum() for update in step.values()]).sum()
        limit = trust_scale(square, lr, config.norm_clip**2)
        scale = torch.minimum(scale, limit)
    return scale


def rescale(
    gradients: dict[str, Tensor],
    step: dict[str, Tensor],
    config: KFACConfig,
    lr: float,
    fisher_quadratic: FisherQuadratic | None,
) -> StepInfo:
    """Fit a step into the trust region.

    Args:
        gradients: g by name.
        step: U by name.
        config: Settings.
        lr: Step size.
        fisher_quadratic: Gives q; None for q = g . U, which is U^T (F + lambda) U for the damped
            Kronecker factors.
    """
    quadratic = torch.stack([(gradients[name] * step[name]).sum() for name in step]).sum()
    if fisher_quadratic is not None:
        finite = torch.isfinite(quadratic)  # the Fisher may not see a parameter that is not
        quadratic = torch.where(finite, fisher_quadratic(step).detach(), torch.nan)
    scale = clip_scale(quadratic, step, lr, config)
    predicted = 0.5 * (lr * scale).square() * quadratic
    predicted = torch.where(scale == 0, torch.zeros_like(predicted), predicted)
    return StepInfo(quadratic, scale, predicted)
