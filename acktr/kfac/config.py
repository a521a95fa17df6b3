"""Settings of the K-FAC optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from acktr.kfac.linalg import Inverse

Sharing = Literal["expand", "reduce"]
Structure = Literal["kfac", "ekfac", "tridiagonal"]

_TINY = 5e-324
_OPTIONAL = ("kl_clip", "norm_clip", "refresh_staleness", "refresh_delay")
_CHOICES = {
    "conv_sharing": ("expand", "reduce"),
    "linear_sharing": ("expand", "reduce"),
    "quadratic": ("kronecker", "exact"),
    "structure": ("kfac", "ekfac", "tridiagonal"),
    "inverse": ("eigen", "cholesky"),
    "small_parameters": ("gradient", "dense", "diagonal"),
}


@dataclass(frozen=True, kw_only=True)
class KFACConfig:
    """Settings of :class:`acktr.kfac.KFAC`; the defaults are plain K-FAC.

    Step size, trust region, momentum, decay, damping and refresh are those of ACKTR on Atari.
    """

    lr: float = 0.25
    """Largest step size (eta_max); the trust region can only shorten the step."""
    kl_clip: float | None = 0.001
    """c = 2 delta: the step is scaled so that lr^2 q <= c, a predicted KL of at most c/2."""
    norm_clip: float | None = None
    """Largest Euclidean norm of a step lr U, beside the trust region."""
    damping: float = 0.01
    """Tikhonov damping lambda added to the curvature."""
    factored_damping: bool = False
    """Split the damping between the factors by the trace-ratio pi instead of adding lambda."""
    structure: Structure = "kfac"
    """Kronecker factors, these with corrected eigenvalues, or a chain's tridiagonal inverse."""
    inverse: Inverse = "eigen"
    """Eigendecomposition, or Cholesky inverses (factored damping only, fixed at each refresh)."""
    stat_decay: float = 0.99
    """Decay of the running averages of the factors (bias-corrected)."""
    stat_fraction: float = 1.0
    """Part of the batch that the factors are computed from: every round(1/fraction)-th sample.

    ACKTR measures the KL of a step, train/approx_kl, on as many samples.
    """
    stat_interval: int = 1
    """Fold the batches of every stat_interval-th step only, and of all cold steps."""
    momentum: float = 0.9
    """Momentum mu of v <- mu v + U, theta <- theta - lr (1 - mu) v."""
    weight_decay: float = 0.0
    """L2 coefficient of weight matrices; also added to their damping."""
    refresh_interval: int = 10
    """Steps between decompositions of the factors."""
    refresh_staleness: float | None = None
    """At a refresh, decompose only factors that changed by more than this since the last time."""
    refresh_delay: int | None = None
    """Decompose in a background thread and use the result this many steps later (None: inline)."""
    cold_steps: int = 0
    """First steps taken by SGD with momentum while the factors warm up."""
    cold_lr: float = 0.03
    """Learning rate of the cold steps, of the parameter group with the largest lr."""
    cold_max_grad_norm: float = 0.5
    """Largest gradient norm of the cold steps (it never applies to K-FAC steps)."""
    conv_sharing: Sharing = "expand"
    """Convolution factors: every position an observation (expand) or averaged first (reduce)."""
    linear_sharing: Sharing = "expand"
    """The same for the extra dimensions, and several uses, of a linear layer."""
    small_parameters: Literal["gradient", "dense", "diagonal"] = "gradient"
    """Parameters outside of known layers: plain gradient, or second moments of gradients."""
    dense_limit: int = 1024
    """Largest number of parameters in a dense block (normalisations, lone biases, small
    parameters); above it only the diagonal is kept."""
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
            ("norm_clip", _TINY, math.inf, "a finite number > 0"),
            ("refresh_staleness", 0.0, math.inf, "a finite number >= 0"),
            ("damping", _TINY, math.inf, "a finite number > 0"),
            ("cold_lr", _TINY, math.inf, "a finite number > 0"),
            ("cold_max_grad_norm", _TINY, math.inf, "a finite number > 0"),
            ("weight_decay", 0.0, math.inf, "a finite number >= 0"),
            ("stat_decay", 0.0, below_one, "a number in [0, 1)"),
            ("momentum", 0.0, below_one, "a number in [0, 1)"),
            ("stat_fraction", 1e-6, 1.0, "a number in [1e-6, 1]"),
        ):
            number = getattr(self, name)
            if number is None and name in _OPTIONAL:
                continue
            real = isinstance(number, int | float) and math.isfinite(number)
            if not (real and low <= number <= high):
                raise ValueError(f"{name} must be {kind}, got {number}")
        for name, least in (
            ("refresh_interval", 1),
            ("stat_interval", 1),
            ("max_failures", 1),
            ("cold_steps", 0),
            ("dense_limit", 1),
            ("refresh_delay", 0),
        ):
            count = getattr(self, name)
            if count is None and name in _OPTIONAL:
                continue
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {count}")
        self._check_choices()

    def _check_choices(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                wanted = " or ".join(allowed)
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        if self.refresh_delay is not None and self.refresh_delay > self.refresh_interval:
            raise ValueError(
                f"refresh_delay must be at most refresh_interval ({self.refresh_interval}),"
                f" got {self.refresh_delay}"
            )
        if self.inverse == "cholesky" and not self.factored_damping:
            raise ValueError("inverse=cholesky needs factored_damping=True")
        if self.structure == "ekfac" and self.factored_damping:
            raise ValueError("structure=ekfac adds its damping: factored_damping must be False")
        if self.structure == "ekfac" and self.refresh_staleness is not None:
            raise ValueError("structure=ekfac renews both bases at once: no refresh_staleness")
        if self.structure == "tridiagonal" and not self.factored_damping:
            raise ValueError("structure=tridiagonal needs factored_damping=True")
        if self.structure == "tridiagonal" and self.refresh_delay is not None:
            raise ValueError("structure=tridiagonal refreshes inline: refresh_delay must be None")
