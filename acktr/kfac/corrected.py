"""Steps in the corrected trust region of :mod:`acktr.kfac.radius`, and its measurements."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from acktr.kfac.fisher.products import repeatable
from acktr.kfac.losses.likelihoods import SumLoss
from acktr.kfac.radius import Fit
from acktr.kfac.trust import FisherQuadratic, scaled

if TYPE_CHECKING:
    from acktr.kfac.preconditioner import Preconditioner

Named = dict[str, Tensor]


def fit_step(
    curvature: Preconditioner,
    gradients: Named,
    step: Named,
    velocities: Named,
    momenta: Mapping[str, float],
    lr: float,
    fisher_quadratic: FisherQuadratic | None = None,
) -> Fit:
    """Fit the step d = -lr (1 - mu) (mu v + nu U) into the region.

    Args:
        curvature: Has the region, and what was observed.
        gradients: g by name.
        step: U by name.
        velocities: v by name; one that is missing is zero.
        momenta: mu by name.
        lr: Step size.
        fisher_quadratic: Gives d^T F d instead of the observed pass.
    """
    region = curvature.region
    assert region is not None
    lengths = {name: lr * (1 - momenta[name]) for name in step}

    def measure(scale: Tensor) -> Tensor | None:
        change = scaled(step, scale, region.places)
        for name in change.keys() & velocities.keys():
            change[name] = change[name].add(velocities[name], alpha=momenta[name])
        change = {n: (d * lengths[n]).to(curvature.named[n].dtype) for n, d in change.items()}
        if not region.separate:
            return measured(curvature, [change], fisher_quadratic)
        own = region.own_names()
        shared = {name: d for name, d in change.items() if name not in own}
        rest = {name: d for name, d in change.items() if name in own}
        return measured(curvature, [shared, rest])

    return region.fit(
        region.dots(gradients, step),
        region.dots(gradients, velocities),
        region.spread(momenta),
        region.spread(lengths),
        lr,
        measure if region.due(curvature.turn) else None,
        curvature.turn,
    )


def measured(
    curvature: Preconditioner,
    steps: Sequence[Named],
    fisher_quadratic: FisherQuadratic | None = None,
) -> Tensor | None:
    """Exact forms (parts, m, m) of steps; None, after a warning, if they cannot be had.

    Args:
        curvature: Has the region, and what was observed.
        steps: The step; with a radius for each part that of the shared parameters, and that of all
            others.
        fisher_quadratic: Gives the form of the one step instead of the observed pass.

    Raises:
        ValueError: There is a radius for each part, and nothing to measure them with.
    """
    region = curvature.region
    assert region is not None
    if fisher_quadratic is not None and not region.separate:
        return fisher_quadratic(steps[0]).detach().reshape(1, 1, 1)
    try:
        if not region.entire:
            some = curvature.estimated_grams(steps)
            if some is None:  # the next step is measured, with the graph of its pass
                region.whole = True
                return None
            grams, weights = some
        else:
            grams, weights = curvature.exact_grams(steps)
        if not region.separate:
            return grams.sum(0, keepdim=True)
        if len(grams) != region.parts:
            raise ValueError(f"kl_clip has {region.parts} radii, the output {len(grams)} parts")
        return grams / grams.new_tensor(weights)[:, None, None]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if region.separate:
            raise ValueError(f"the radii of the parts cannot be kept: {reason}") from error
        region.blind = True
        warnings.warn(
            "the trust region cannot be measured, so that a step may cost a KL far from kl_clip"
            f" / 2: {reason} (observe() with a loss before every step, or give fisher_quadratic to"
            ' step(), or say quadratic="kronecker" to have it so)',
            stacklevel=2,
        )
        return None


def spending(curvature: Preconditioner, outputs: Callable[[], Any]) -> Callable[[], Tensor]:
    """The KL that parameters move from now on will have cost when it is called, by part (K,).

    Args:
        curvature: Gives the module, the loss, and the random state of the observed pass.
        outputs: Gives the loss's output at the present parameters.

    Raises:
        ValueError: Nothing was observed with a loss, or the loss knows no KL.
    """
    observed = curvature.observed
    if observed is None:
        raise ValueError("the KL of a step needs observe() with a loss before it")
    divergence = getattr(observed.loss, "kl", None)
    if divergence is None:
        raise ValueError(f"{type(observed.loss).__name__} has no kl(output, other)")
    again = repeatable(curvature.module, outputs, observed.random)
    before = again()

    def spent() -> Tensor:
        found: Tensor = divergence(before, again())
        return found

    return spent


def part_weights(loss: object) -> tuple[float, ...]:
    """The weight of every part of a loss."""
    if not isinstance(loss, SumLoss):
        return (1.0,)
    return loss.weights or (1.0,) * len(loss.parts)
