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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acktr.kfac.checks import check_integer, check_number
from acktr.kfac.curvature import Curvature
from acktr.kfac.fisher.products import inner_products, repeatable
from acktr.kfac.trust import Named, StepInfo, trust_scale, updates

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
    """
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
    return slopes @ coefficients + 0.5 * (coefficients @ (gram @ coefficients))


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
    """Levenberg-Marquardt adaptation of the damping, as in Martens & Grosse 2015, section 6.5.

    Every ``interval`` steps rho > 3/4 multiplies lambda by omega_1 and rho < 1/4 divides it by
    omega_1, within the limits.
    """

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
        check_integer("interval", self.interval, 1)
        for name in ("factor", "minimum", "maximum"):
            check_number(name, getattr(self, name), open_low=True)
        if not 0 < self.factor**self.interval < 1:
            raise ValueError(
                f"factor must be below 1 and factor ** interval above 0, got {self.factor}"
            )
        if self.minimum > self.maximum:
            raise ValueError(f"minimum must be <= maximum, got {self.minimum} > {self.maximum}")

    def check(self, damping: object) -> None:
        """Raise ValueError unless a damping lies within the limits."""
        check_number("damping", damping, self.minimum, self.maximum)

    def due(self, step: int) -> bool:
        """Whether the step after ``step`` finished ones is followed by an update of lambda."""
        return (step + 1) % self.interval == 0

    def adapted(self, damping: float, rho: float) -> float:
        """The next lambda, for a reduction ratio rho; NaN raises it."""
        omega = self.factor**self.interval
        if rho > _TRUSTED:
            return max(self.minimum, damping * omega)
        if not rho >= _DISTRUSTED:
            return min(self.maximum, damping / omega)
        return damping


@dataclass(frozen=True)
class QuadraticModel:
    """M(c) = slopes . c + 1/2 c^T (fisher + decay + damping) c along k directions.

    The Fisher is the exact one of a batch (Martens & Grosse 2015, section 6.4); all matrices are
    (k, k). Weight decay acts on weight matrices only, damping on everything.
    """

    slopes: Tensor
    fisher: Tensor
    decay: Tensor
    damping: Tensor

    @classmethod
    def of(
        cls,
        curvature: Curvature,
        gradients: Named,
        vectors: Sequence[Named],
        decay: Mapping[str, float],
    ) -> QuadraticModel:
        """The model at the present parameters.

        Args:
            curvature: Gives the module, the observed loss and batch, and lambda.
            gradients: Gradient of the objective, weight decay included.
            vectors: The directions.
            decay: Weight decay by parameter name.

        Raises:
            ValueError: Nothing was observed with a loss, or the module itself was not called.
        """
        if curvature.region.observed is None:
            raise ValueError("the quadratic model needs observe() with a loss before the step")
        fisher = curvature.region.grams(vectors).sum(0)
        scaled = [
            {
                n: v * decay[n] if n in curvature.weights else torch.zeros_like(v)
                for n, v in u.items()
            }
            for u in vectors
        ]
        return cls(
            inner_products([gradients], vectors)[0].to(fisher.dtype),
            fisher,
            inner_products(scaled, vectors).to(fisher.dtype),
            curvature.damping * inner_products(vectors, vectors).to(fisher.dtype),
        )

    def minimum(self) -> Tensor:
        """The coefficients c (k,) that minimise M."""
        return solve_step(self.fisher + self.decay + self.damping, self.slopes)

    def predicted(self, coefficients: Tensor) -> Tensor:
        """Change of the objective that the model predicts, its damping term left out."""
        return model_change(self.fisher + self.decay, self.slopes, coefficients)


def model_step(
    model: QuadraticModel, vectors: Sequence[Named], kl_clip: float | None
) -> tuple[Named, StepInfo, Tensor]:
    """The best combination of the directions, inside the trust region.

    Args:
        model: The model along them.
        vectors: The directions; the first one has all parameters that move.
        kl_clip: c; None for no limit.

    Returns:
        The change of the parameters, its record, and the change of the objective that the model
        predicts.
    """
    coefficients = model.minimum()
    change = {name: (coefficients[0] * u).to(u.dtype) for name, u in vectors[0].items()}
    for coefficient, vector in zip(coefficients[1:], vectors[1:], strict=True):
        for name, u in vector.items():
            change[name] = change[name] + (coefficient * u).to(u.dtype)
    quadratic = coefficients @ model.fisher @ coefficients
    quadratic = torch.where(torch.isfinite(model.slopes).all(), quadratic, torch.nan)
    scale = trust_scale(quadratic, 1.0, kl_clip)
    taken = coefficients * scale
    info = StepInfo(quadratic, scale, 0.5 * scale.square() * quadratic, taken)
    return updates(change, dict.fromkeys(change, info.scale)), info, model.predicted(taken)


def adaptive_objective(
    curvature: Curvature,
    objective: Callable[[], Tensor] | None,
    decay: Mapping[str, float],
    maximize: bool = False,
) -> Callable[[], float]:
    """The loss with its weight decay, for evaluations before and after a step.

    All evaluations draw the random numbers (dropout) that the observed pass drew, if they draw them
    in its order; they leave the caller's random stream and the module's buffers alone.

    Args:
        curvature: Gives the module, what was observed, and the parameters that decay.
        objective: The loss at the present parameters.
        decay: Weight decay by parameter name.
        maximize: Whether the loss is to ascend.

    Raises:
        ValueError: The adaptation of the damping has nothing to work with.
    """
    if objective is None:
        raise ValueError("adaptive damping needs objective in step()")
    if curvature.region.observed is None:
        raise ValueError("adaptive damping needs observe() with a loss before the step")
    if curvature.region.observed.followed is None:
        _ = curvature.region.observed.inputs
    loss = objective

    def evaluate() -> float:
        value = curvature.region.objective(float(loss().detach().double()))
        total = torch.tensor(-value if maximize else value, dtype=torch.float64)
        for name, rate in decay.items():
            if rate and name in curvature.weights:
                total = total + 0.5 * rate * curvature.named[name].double().square().sum()
        return float(total)

    return repeatable(curvature.module, evaluate, curvature.region.observed.random)
