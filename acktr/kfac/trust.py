"""The trust region of a step, and the record of what a step did."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from acktr.kfac.tensors import wide

Named = dict[str, Tensor]
"""Tensors by name of a parameter."""
FisherQuadratic = Callable[[dict[str, Tensor]], Tensor]
"""U -> U^T F U with the exact Fisher."""
_SHARE = 0.5
"""Part of a radius that shared parameters may use whatever a part's own parameters do."""


class UnobservedError(ValueError):
    """Nothing was observed yet that a step could be measured with."""


@dataclass(frozen=True)
class StepInfo:
    """What the last step did; tensors stay on the device until somebody reads them."""

    quadratic: Tensor
    """q = U^T F U."""
    scale: Tensor
    """nu of the trust region; 1 in cold steps."""
    predicted_kl: Tensor
    """The KL that the quadratic model predicts: with quadratic="corrected" that of the step taken,
    momentum included; otherwise lr^2 nu^2 q / 2, that of the step without momentum. With one radius
    the parts of a SumLoss count with its weights: the sum of w_k KL_k."""
    coefficients: Tensor | None = None
    """alpha and mu of a quadratic-model step."""
    rho: float | None = None
    """Actual over predicted reduction, in steps that adapt the damping."""
    part_kl: Tensor | None = None
    """The predicted KL of each part of the loss (K,), where each has a radius."""
    spent_kl: Tensor | None = None
    """The KL that the step really cost, of each part of the loss (K,) without its weight, where it
    was asked for."""


def updates(step: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The update nu U by name, and exactly 0 where nu = 0 skips it (U may then hold NaN)."""
    if not step:
        return {}
    on_cpu = scales[next(iter(step))].device.type == "cpu"  # where no number has to be waited for
    if on_cpu:
        keys = torch.stack([scales[name] for name in step]).tolist()
    else:
        keys = [id(scales[name]) for name in step]
    groups: dict[float, list[str]] = {}  # most often one nu is for all
    for name, key in zip(step, keys, strict=True):
        groups.setdefault(key, []).append(name)
    made = {}
    for key, names in groups.items():
        nu, mine = scales[names[0]], [step[name] for name in names]
        skipped = nu == 0
        for name, update in zip(names, torch._foreach_mul(mine, nu), strict=True):
            kept = update if on_cpu and key != 0 else torch.where(skipped, 0.0, update)
            made[name] = kept.to(step[name].dtype)
    return {name: made[name] for name in step}


class Fit(NamedTuple):
    """How a step is fitted into the trust region, by parameter name."""

    step: dict[str, Tensor]
    """U."""
    scales: dict[str, Tensor]
    """nu; 0 skips U, which may then hold NaN."""
    velocity: dict[str, Tensor] | None
    """Factor of the velocity of former steps; None for mu."""
    info: StepInfo

    def updates(self) -> dict[str, Tensor]:
        """The update nu U, which the velocity takes up."""
        return updates(self.step, self.scales)

    def accelerate(self, velocities: Mapping[str, Tensor], momenta: Mapping[str, float]) -> None:
        """Multiply velocities by their factors and add the update to them, in place."""
        vectors, names = [velocities[name] for name in self.step], list(self.step)
        if self.velocity is None:
            torch._foreach_mul_(vectors, [momenta[name] for name in names])
        else:
            torch._foreach_mul_(vectors, [self.velocity[name] for name in names])
        if self.velocity is None or vectors[0].device.type != "cpu":
            torch._foreach_add_(vectors, list(self.updates().values()))
            return
        # On the CPU no number has to be waited for, and nu U need not be written to memory.
        nus = torch.stack([self.scales[name] for name in names]).tolist()
        for nu in {nu for nu in nus if nu != 0}:
            mine = [place for place, other in enumerate(nus) if other == nu]
            steps = [self.step[names[place]] for place in mine]
            torch._foreach_add_([vectors[place] for place in mine], steps, alpha=nu)


def trust_scale(quadratic: Tensor, lr: float, kl_clip: float | None) -> Tensor:
    """Scale nu of a step so that its predicted KL stays inside the trust region.

    nu = min(1, sqrt(c / (lr^2 q))), so that the step lr nu U has length min(lr, sqrt(c / q)) along
    U and the quadratic form lr^2 nu^2 q never exceeds c = 2 delta (Wu et al. 2017, section 3.2).
    q <= 0 (a zero gradient) gives 1; a q that is not finite gives 0, which skips the step.

    Args:
        quadratic: q = U^T F U, a scalar tensor; it stays on its device.
        lr: Step size.
        kl_clip: c; None for no limit.
    """
    limit = math.inf if kl_clip is None else kl_clip
    finite = quadratic.detach().nan_to_num(torch.nan, torch.inf, torch.nan)
    room = limit / (lr * lr * finite.clamp(min=0.0))  # infinite for q <= 0
    return room.sqrt().clamp(max=1.0).nan_to_num(nan=0.0)


def rescale(
    gradients: dict[str, Tensor],
    step: dict[str, Tensor],
    kl_clip: float | None,
    lr: float,
    fisher_quadratic: FisherQuadratic | None,
) -> Fit:
    """Fit the step lr U, without momentum, into the trust region.

    Args:
        gradients: g by name.
        step: U by name.
        kl_clip: c; None for no limit.
        lr: Step size.
        fisher_quadratic: Gives q; None for q = g . U, which is U^T (F + lambda) U for the damped
            Kronecker factors.
    """
    products = torch._foreach_mul(
        [wide(gradients[name]) for name in step], [wide(update) for update in step.values()]
    )
    quadratic = torch.stack([product.sum() for product in products]).sum()
    if fisher_quadratic is not None:
        finite = torch.isfinite(quadratic)  # the Fisher may not see a parameter that is not
        quadratic = torch.where(finite, fisher_quadratic(step).detach(), torch.nan)
    scale = trust_scale(quadratic, lr, kl_clip)
    predicted = 0.5 * (lr * scale).square() * quadratic
    predicted = torch.where(scale == 0, torch.zeros_like(predicted), predicted)
    info = StepInfo(quadratic, scale, predicted)
    return Fit(step, dict.fromkeys(step, scale), None, info)


def clipped(gradients: dict[str, Tensor], largest: float) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients scaled to a largest norm of all, zeros if it is not finite; and their norm."""
    norm = torch.stack([wide(grad).square().sum() for grad in gradients.values()]).sum().sqrt()
    clip = (largest / (norm + 1e-6)).clamp(max=1.0)
    finite = torch.isfinite(norm)
    updates = {
        name: torch.where(finite, clip * grad, torch.zeros_like(grad)).to(grad.dtype)
        for name, grad in gradients.items()
    }
    return updates, norm


def part_scales(forms: Tensor, clips: Tensor) -> Tensor:
    """Scales of the shared parameters, and of each part's own, for one radius per part.

    Scaled by s and x_k the step has the form a_k s^2 + 2 b_k s x_k + d_k x_k^2 in part k. All of it
    scaled alike would take s = x_k = sqrt(c_k / (a_k + 2 b_k + d_k)); a wild head would then stop
    the whole network. So s is bounded by the smallest over k of the larger of that and
    sqrt(c_k / a_k) / 2, and every x_k is the largest that the rest of its radius allows.

    Args:
        forms: (K, 2, 2), shared parameters first.
        clips: c (K,).

    Returns:
        (1 + K,), in [0, 1].
    """
    a, b, d = forms[:, 0, 0], forms[:, 0, 1], forms[:, 1, 1].clamp(min=0.0)
    alike = root(clips / (a + 2 * b + d).clamp(min=0.0))
    shared = torch.maximum(alike, _SHARE * root(clips / a)).min().clamp(max=1.0)
    across = b * shared
    room = across.square() + d * (clips - a * shared.square())
    own = (room.clamp(min=0.0).sqrt() - across) / d
    own = torch.where(d > 0, own, torch.ones_like(own)).clamp(0.0, 1.0)
    return torch.cat([shared[None], own])


def root(room: Tensor) -> Tensor:
    """Square root; infinite for no step in no bound, which is 0 / 0 or inf / inf."""
    return room.nan_to_num(nan=math.inf).sqrt()


def dot(first: Tensor, second: Tensor) -> Tensor:
    """Dot product of two tensors of one shape, at least in float32."""
    return torch.dot(wide(first).flatten(), wide(second).flatten())
