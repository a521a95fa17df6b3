"""Step length and damping from a quadratic model of the objective.

Along k directions v_i the objective h is modelled, for coefficients c, as

    M(c) - M(0) = s . c + 1/2 c^T B c,    s_i = grad h . v_i,    B_ij = v_i^T C v_j,

with C the exact Fisher plus weight decay and damping (Martens & Grosse 2015, sections 6.4 and 7;
there v = (Delta, delta_0), the preconditioned gradient and the last step, and c = (alpha, mu)). How
well the model predicted the change of h decides, by the Levenberg-Marquardt rule, whether the
damping lambda grows or shrinks (section 6.5). The model of that comparison leaves lambda out: it
must predict the objective, of which weight decay is a part and lambda is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_TRUSTED = 0.75
_DISTRUSTED = 0.25
_NEUTRAL = 0.5


def solve_step(gram: Tensor, slopes: Tensor) -> Tensor:
    """Coefficients that minimise s . c + 1/2 c^T B c.

    The directions are first scaled to unit curvature. Those with none (a last step of zero), and
    combinations of curvature lost in rounding (parallel directions), get no part: the result is the
    least-squares solution of least norm in that scaling. Up to two directions are solved in closed
    form, without waiting for the device.

    Args:
        gram: B (k, k), damping included; its symmetric part counts.
        slopes: s (k,).

    Returns:
        c (k,); zeros when an input or the solution is not finite.

    Raises:
        ValueError: The shapes do not fit.
    """
    _check_shapes(gram, slopes)
    valid = torch.isfinite(gram).all()
    safe = torch.where(valid, gram, torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    diagonal = safe.diagonal()
    curved = diagonal > 0
    scale = torch.where(curved, diagonal, torch.ones_like(diagonal)).rsqrt() * curved
    inverse = _pseudo_inverse(safe * scale[:, None] * scale)
    found = -scale * (inverse @ (scale * slopes))
    valid = valid & torch.isfinite(found).all()
    return torch.where(valid, found, torch.zeros_like(found))


def _pseudo_inverse(scaled: Tensor) -> Tensor:
    """Pseudo-inverse of a symmetric matrix whose diagonal entries are 1 or 0.

    Two directions have the eigenvalues 1 + r and 1 - r along (1, 1) and (1, -1), r the off-diagonal
    entry; one without curvature has r = 0, and what is given for it is scaled away by the caller.
    """
    if len(scaled) == 1:
        return torch.ones_like(scaled)
    if len(scaled) == 2:
        r = (scaled[0, 1] + scaled[1, 0]) / 2
        along, across = _reciprocals(torch.stack([1 + r, 1 - r])).unbind()
        same, other = (along + across) / 2, (along - across) / 2
        return torch.stack([torch.stack([same, other]), torch.stack([other, same])])
    values, vectors = torch.linalg.eigh((scaled + scaled.mT) / 2)
    inverse: Tensor = (vectors * _reciprocals(values)) @ vectors.mT
    return inverse


def _reciprocals(values: Tensor) -> Tensor:
    """1 / x, and 0 for an x that is lost in rounding."""
    kept = values > 64 * torch.finfo(values.dtype).eps
    return torch.where(kept, values, torch.ones_like(values)).reciprocal() * kept


def model_change(gram: Tensor, slopes: Tensor, coefficients: Tensor) -> Tensor:
    """M(c) - M(0) = s . c + 1/2 c^T B c.

    Args:
        gram: B (k, k); with the damping lambda to compare steps, without it for
            :func:`reduction_ratio`.
        slopes: s (k,).
        coefficients: c (k,).

    Returns:
        A scalar tensor.
    """
    _check_shapes(gram, slopes)
    _check_shapes(gram, coefficients)
    return slopes @ coefficients + 0.5 * (coefficients @ (gram @ coefficients))


def _check_shapes(gram: Tensor, vector: Tensor) -> None:
    if vector.dim() != 1 or not len(vector) or gram.shape != (len(vector), len(vector)):
        raise ValueError(
            "the quadratic model needs a (k, k) matrix and (k,) vectors with k >= 1,"
            f" got {tuple(gram.shape)} and {tuple(vector.shape)}"
        )


def reduction_ratio(before: float, after: float, predicted: float) -> float:
    """Actual over predicted change, rho = (h_after - h_before) / (M(c) - M(0)).

    It is 1 where the model is exact. Both values of h belong to the same batch, the one that the
    gradient came from.

    Args:
        before: h before the step.
        after: h after it.
        predicted: M(c) - M(0), normally negative.

    Returns:
        rho; -inf when a value is NaN or Inf. A prediction that is not a descent has no ratio: a
        fall of h then counts as +inf, a rise as -inf, and none as 1/2, which changes no damping.
    """
    if not (math.isfinite(before) and math.isfinite(after) and math.isfinite(predicted)):
        return -math.inf
    change = after - before
    if predicted < 0:
        return change / predicted
    if change == 0:
        return _NEUTRAL
    return math.inf if change < 0 else -math.inf


@dataclass(frozen=True, kw_only=True)
class LMConfig:
    """Settings of :class:`LevenbergMarquardt`; the defaults are those of Martens & Grosse 2015."""

    interval: int = 5
    """Steps between two changes of the damping (T_1)."""
    factor: float = 0.95
    """Factor per step, in (0, 1): one change is by omega_1 = factor ** interval."""
    minimum: float = 1e-8
    """Smallest damping."""
    maximum: float = 1e4
    """Largest damping."""

    def __post_init__(self) -> None:
        """Check every value; raises ValueError naming the field."""
        if isinstance(self.interval, bool) or not isinstance(self.interval, int):
            raise ValueError(f"interval must be an integer >= 1, got {self.interval!r}")
        if self.interval < 1:
            raise ValueError(f"interval must be an integer >= 1, got {self.interval}")
        for name in ("factor", "minimum", "maximum"):
            value = getattr(self, name)
            if not _positive(value):
                raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
        if not 0 < self.factor**self.interval < 1:
            raise ValueError(
                f"factor must be below 1 and factor ** interval above 0, got {self.factor}"
            )
        if self.minimum > self.maximum:
            raise ValueError(f"minimum must be <= maximum, got {self.minimum} > {self.maximum}")


class LevenbergMarquardt:
    """Adaptive damping lambda.

    Every ``interval`` steps rho > 3/4 multiplies it by omega_1 and rho < 1/4 divides it by omega_1,
    within the limits (Martens & Grosse 2015, section 6.5).

    Args:
        config: Settings.
        damping: The first lambda.

    Raises:
        ValueError: The damping is outside of the limits.
    """

    def __init__(self, config: LMConfig, damping: float) -> None:
        self.config = config
        self._damping = self._checked(damping)

    @property
    def damping(self) -> float:
        """The present lambda."""
        return self._damping

    def due(self, step: int) -> bool:
        """Whether the step after ``step`` finished ones is followed by an update of lambda."""
        return (step + 1) % self.config.interval == 0

    def update(self, rho: float) -> float:
        """Apply the rule to a reduction ratio and return the new lambda; NaN raises lambda."""
        omega = self.config.factor**self.config.interval
        if rho > _TRUSTED:
            self._damping = max(self.config.minimum, self._damping * omega)
        elif not rho >= _DISTRUSTED:
            self._damping = min(self.config.maximum, self._damping / omega)
        return self._damping

    def state_dict(self) -> dict[str, Any]:
        """The damping."""
        return {"damping": self._damping}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; ValueError, and no change, when it does not fit."""
        self.check_state(state)
        self._damping = float(state["damping"])

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError when a state does not fit the settings."""
        if not isinstance(state, Mapping) or set(state) != {"damping"}:
            raise ValueError("the damping's state must have the entry 'damping' alone")
        self._checked(state["damping"])

    def _checked(self, damping: object) -> float:
        low, high = self.config.minimum, self.config.maximum
        if isinstance(damping, bool) or not isinstance(damping, int | float):
            raise ValueError(f"damping must be a number in [{low}, {high}], got {damping!r}")
        if not low <= damping <= high:
            raise ValueError(f"damping must be a number in [{low}, {high}], got {damping}")
        return float(damping)


def _positive(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < math.inf
