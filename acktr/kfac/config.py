"""Settings of the K-FAC optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Sharing = Literal["expand", "reduce"]

_TINY = 5e-324


@dataclass(frozen=True, kw_only=True)
class KFACConfig:
    """Settings of :class:`acktr.kfac.KFAC`; the defaults are those of ACKTR on Atari."""

    lr: float = 0.25
    """Largest step size (eta_max); the trust region can only shorten the step."""
    kl_clip: float = 0.001
    """c = 2 delta: the step is scaled so that lr^2 q <= c, a predicted KL of at most c/2."""
    damping: float = 0.01
    """Tikhonov damping lambda added to the curvature."""
    factored_damping: bool = False
    """Split the damping between the factors by the trace-ratio pi instead of adding lambda."""
    stat_decay: float = 0.99
    """Decay of the running averages of the factors (bias-corrected)."""
    stat_fraction: float = 1.0
    """Part of the batch that the factors are computed from: every round(1/fraction)-th sample."""
    momentum: float = 0.9
    """Momentum mu of v <- mu v + U, theta <- theta - lr (1 - mu) v."""
    weight_decay: float = 0.0
    """L2 coefficient of weight matrices; also added to their damping."""
    refresh_interval: int = 10
    """Steps between eigendecompositions."""
    cold_steps: int = 0
    """First steps taken by SGD with momentum while the factors warm up."""
    cold_lr: float = 0.03
    """Learning rate of the cold steps."""
    cold_max_grad_norm: float = 0.5
    """Largest gradient norm of the cold steps (it never applies to K-FAC steps)."""
    conv_sharing: Sharing = "expand"
    """Convolution factors: every position an observation (expand) or averaged first (reduce)."""
    quadratic: Literal["kronecker", "exact"] = "kronecker"
    """Where q comes from: the damped Kronecker factors, or the exact Fisher by one JVP."""
    max_failures: int = 10
    """Failed eigendecompositions, or batches of NaN, in a row before an error is raised."""

    def __post_init__(self) -> None:
        """Check every value; raises ValueError naming the field."""
        below_one = math.nextafter(1.0, 0.0)
        for name, low, high, kind in (
            ("lr", _TINY, math.inf, "a finite number > 0"),
            ("kl_clip", _TINY, math.inf, "a finite number > 0"),
            ("damping", _TINY, math.inf, "a finite number > 0"),
            ("cold_lr", _TINY, math.inf, "a finite number > 0"),
            ("cold_max_grad_norm", _TINY, math.inf, "a finite number > 0"),
            ("weight_decay", 0.0, math.inf, "a finite number >= 0"),
            ("stat_decay", 0.0, below_one, "a number in [0, 1)"),
            ("momentum", 0.0, below_one, "a number in [0, 1)"),
            ("stat_fraction", 1e-6, 1.0, "a number in [1e-6, 1]"),
        ):
            number = getattr(self, name)
            real = isinstance(number, int | float) and math.isfinite(number)
            if not (real and low <= number <= high):
                raise ValueError(f"{name} must be {kind}, got {number}")
        for name, least in (("refresh_interval", 1), ("max_failures", 1), ("cold_steps", 0)):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {count}")
        choices = {"conv_sharing": ("expand", "reduce"), "quadratic": ("kronecker", "exact")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                wanted = " or ".join(allowed)
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
