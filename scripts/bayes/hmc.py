"""Hamiltonian Monte Carlo: many chains side by side, each with a step size of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Potential = Callable[[Tensor], Tensor]
"""Minus the log density up to a constant, (C,), of points (C, P)."""

_TARGET = 0.8
"""Acceptance that the step size is led to."""
_GAIN = 0.5


def sample(
    potential: Potential,
    start: Tensor,
    *,
    warmup: int,
    samples: int,
    steps: int,
    generator: torch.Generator,
    size: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Draw from a density by leapfrog trajectories (Neal 2011).

    In the warm-up, whose draws are left out, the log of each chain's step size rises by half of
    acceptance less 0.8 per draw. Afterwards it is fixed, but for a factor in [0.8, 1.2] that is
    drawn for each trajectory, as its length is, in [steps / 2, steps].

    Args:
        potential: U.
        start: Where the chains begin, (C, P), float64.
        warmup: Draws that are left out.
        samples: Draws that are kept.
        steps: Leapfrog steps of a trajectory at most.
        generator: Of everything random.
        size: Step size at first.

    Returns:
        Draws (samples, C, P), and the mean acceptance of the kept ones (C,).
    """
    here = start.detach().clone()
    sizes = torch.full((len(start), 1), size, dtype=start.dtype)
    energy, force = _potential(potential, here)
    kept, accepted = [], torch.zeros(len(start), dtype=start.dtype)
    for draw in range(warmup + samples):
        momentum = torch.randn(here.shape, generator=generator, dtype=here.dtype)
        jitter = 0.8 + 0.4 * torch.rand(sizes.shape, generator=generator, dtype=here.dtype)
        length = int(torch.randint(max(steps // 2, 1), steps + 1, (), generator=generator))
        at, pull, step = here, force, sizes * jitter
        before, level = energy + 0.5 * momentum.square().sum(1), energy
        for _ in range(length):
            momentum = momentum - 0.5 * step * pull
            at = at + step * momentum
            level, pull = _potential(potential, at)
            momentum = momentum - 0.5 * step * pull
        change = before - level - 0.5 * momentum.square().sum(1)
        chance = change.clamp(max=0).exp().nan_to_num(0.0)
        uniform = torch.rand(len(here), generator=generator, dtype=here.dtype)
        taken = uniform < chance
        here = torch.where(taken[:, None], at, here)
        energy, force = torch.where(taken, level, energy), torch.where(taken[:, None], pull, force)
        if draw < warmup:
            sizes = sizes * (_GAIN * (chance[:, None] - _TARGET)).exp()
        else:
            kept.append(here)
            accepted += chance
    return torch.stack(kept), accepted / samples


def _potential(potential: Potential, at: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = at.detach().requires_grad_()
        level = potential(leaf)
        (force,) = torch.autograd.grad(level.sum(), leaf)
    return level.detach(), force
