"""The Kronecker-factored block of one layer, or of layers that share a weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from acktr.kfac.blocks.layouts import LayerFactors
from acktr.kfac.config import KFACConfig
from acktr.kfac.linalg import (
    LARGE_FACTOR,
    Inverse,
    Parts,
    Spectrum,
    factored_tikhonov,
    fast_bfloat16,
    trace_ratio,
)
from acktr.kfac.statistics.averages import History, RunningAverage
from acktr.kfac.statistics.uses import Observation, by_sample


class Eigen:
    """U = Q_G [(Q_G^T g Q_A) / curvature] Q_A^T with A = Q_A diag(a) Q_A^T, and G, b alike.

    The curvature is b a^T + lambda or, with factored damping,
    (b + sqrt(lambda) / pi) (a + pi sqrt(lambda))^T, pi^2 = mean(a) / mean(b) (Martens & Grosse
    2015, section 6.3). The damping is that of the step, not of the refresh.
    """

    method: Inverse = "eigen"

    def __init__(self, a: Spectrum, g: Spectrum, *, factored: bool) -> None:
        self.a, self.g, self.factored = a, g, factored

    @classmethod
    def blank(cls, layer: LayerFactors, *, factored: bool = False) -> Eigen:
        """That of a layer, to be installed."""
        return cls(Spectrum.blank(layer.a.value), Spectrum.blank(layer.g.value), factored=factored)

    def install(self, a: Parts, g: Parts) -> None:
        """Take new decompositions of A and G."""
        self.a, self.g = Spectrum(*a), Spectrum(*g)

    def damped(self, damping: float) -> Tensor:
        """The curvature in the eigenbasis ([k,] out, in [+ 1]), with its damping."""
        if not self.factored:
            return _outer(self.g.values, self.a.values) + damping
        pi, root = trace_ratio(self.a.values, self.g.values), damping**0.5
        return _outer(self.g.values + root / pi, self.a.values + root * pi)

    def solve(self, gradient: Tensor, damping: float) -> Tensor:
        """U of a gradient ([k,] out, in [+ 1])."""
        return self.divided(gradient, self.damped(damping))

    def divided(self, gradient: Tensor, curvature: Tensor) -> Tensor:
        """The gradient divided by a curvature in the eigenbasis."""
        a, g = self.a.vectors, self.g.vectors
        rotated = gradient if g is None else g.mT @ gradient
        rotated = (rotated if a is None else rotated @ a) / curvature
        return self.turned(rotated)

    def turned(self, inner: Tensor, *, squared: bool = False) -> Tensor:
        """Q_G X Q_A^T of X in the eigenbasis; with the entries of Q squared for variances."""
        a, g = self.a.vectors, self.g.vectors
        if g is not None:
            inner = (g.square() if squared else g) @ inner
        return inner if a is None else inner @ (a.square() if squared else a).mT

    def state_dict(self) -> dict[str, Any]:
        """The possibly stale eigenvalues and eigenvectors."""
        return {"basis": [*self.a, *self.g]}

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore a checked state."""
        a, a_vectors, g, g_vectors = state["basis"]
        a_vectors = None if a_vectors is None else a_vectors.to(device)
        self.a = Spectrum(a.to(device), a_vectors)
        g_vectors = None if g_vectors is None else g_vectors.to(device)
        self.g = Spectrum(g.to(device), g_vectors)


class Corrected:
    """EKFAC: the second moments s of gradients in the eigenbasis in place of b a^T, plus lambda.

    George et al. 2018, equation 10: s = E[(Q_G^T (sum_t g a^T) Q_A)^2], averaged over batches. A
    refresh carries the average, the batch before it included, into the new basis: the diagonal
    there of Q diag(s) Q^T, which is R_G s R_A^T with R = (Q_new^T Q_old)^2 elementwise.
    """

    method: Inverse = "eigen"

    def __init__(self, layer: LayerFactors, decay: float) -> None:
        self.basis = Eigen.blank(layer)
        self.decay = decay
        self.scales = RunningAverage(torch.zeros_like(self._products()))
        self._started = False
        """Whether there is a basis."""

    def _products(self) -> Tensor:
        return _outer(self.basis.g.values, self.basis.a.values)

    def observe(self, layer: LayerFactors, seen: Observation) -> None:
        """Join a part of a batch to the second moments."""
        a, g = self.basis.a.vectors, self.basis.g.vectors
        squares = (w * layer.squares(seen.uses, i, a, g) for i, w in enumerate(seen.weights))
        self.scales.add(reduce(torch.add, squares), seen.count)

    def install(self, a: Parts, g: Parts) -> None:
        """Take new decompositions of A and G, and the second moments into the new basis."""
        old_a, old_g = self.basis.a, self.basis.g
        self.basis.install(a, g)
        new_a, new_g = self.basis.a, self.basis.g
        if self._started:
            self.scales.move(lambda s: new_g.carried(old_g, new_a.carried(old_a, s).mT).mT)
            return
        # The eigenvalues' products stand in for one batch, and fade like one.
        self._started = True
        self.scales.update(self._products(), self.decay)

    def damped(self, damping: float) -> Tensor:
        """The second moments ([k,] out, in [+ 1]) plus the damping."""
        return self.scales.mean() + damping

    def turned(self, inner: Tensor, *, squared: bool = False) -> Tensor:
        """As that of the basis."""
        return self.basis.turned(inner, squared=squared)

    def solve(self, gradient: Tensor, damping: float) -> Tensor:
        """U of a gradient ([k,] out, in [+ 1])."""
        return self.basis.divided(gradient, self.damped(damping))

    def state_dict(self) -> dict[str, Any]:
        """The possibly stale basis, and the second moments in it."""
        return self.basis.state_dict() | self.scales.state_dict("scales")

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore a checked state."""
        self.basis.load(state, device)
        self.scales.load_state_dict("scales", state)
        self._started = state["ready"]


class Cholesky:
    """U = (G + sqrt(lambda) / pi)^-1 g (A + pi sqrt(lambda))^-1, lambda being the refresh's.

    Args:
        a: Inverse of A, (in [+ 1]) square or its diagonal.
        g: Inverse of G.
        narrow: Whether the product with the inverse of G takes bfloat16 for both. That of A has
            directions of a great length to cancel, the mean of the inputs, and stays as it is.
    """

    method: Inverse = "cholesky"

    def __init__(self, a: Tensor, g: Tensor, *, narrow: bool = False) -> None:
        self.a, self.g = a, g
        self._narrow: Tensor | None = g.bfloat16() if narrow else None

    def install(self, a: Parts, g: Parts) -> None:
        """Take new inverses."""
        (self.a,), (self.g,) = a, g
        if self._narrow is not None:
            self._narrow = self.g.bfloat16()

    def solve(self, gradient: Tensor, damping: float) -> Tensor:
        """U of a gradient ([k,] out, in [+ 1])."""
        if self._narrow is not None:  # what is rounded has been through the inverse of A
            return (self._narrow @ (gradient @ self.a).bfloat16()).to(gradient.dtype)
        step = self.g[:, None] * gradient if self.g.dim() == 1 else self.g @ gradient
        return step * self.a if self.a.dim() == 1 else step @ self.a

    def state_dict(self) -> dict[str, Any]:
        """The possibly stale inverses."""
        return {"inverses": [self.a, self.g]}

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore a checked state."""
        a, g = (inverse.to(device) for inverse in state["inverses"])
        self.install((a,), (g,))


class KroneckerBlock:
    """Weight and bias of a layer with curvature A (x) G, or its eigenvalue-corrected form.

    Args:
        layer: The layer.
        config: Settings; the structure says how A (x) G is inverted.
    """

    def __init__(self, layer: LayerFactors, config: KFACConfig) -> None:
        self.layer = layer
        self.name, self.paths, self.names = layer.name, layer.paths, layer.names
        self.a, self.g = layer.a, layer.g
        self._float64 = config.float64
        self.history = History(f"layer {layer.name!r}", config.max_failures, layer.device)
        self.inverse: Eigen | Cholesky | Corrected
        if config.structure == "cholesky":
            narrow = config.fast_products and _gains(layer)
            self.inverse = Cholesky(layer.a.value, layer.g.value, narrow=narrow)
        elif config.structure == "ekfac":
            self.inverse = Corrected(layer, config.stat_decay)
        else:
            self.inverse = Eigen.blank(layer, factored=config.structure == "kfac_factored")
        self.method = self.inverse.method

    @property
    def needs_samples(self) -> bool:
        """Whether rows are added up sample by sample."""
        return isinstance(self.inverse, Corrected) or self.layer.layout.sharing == "reduce"

    @property
    def factors(self) -> list[RunningAverage]:
        """What a refresh decomposes."""
        return [self.a, self.g]

    @property
    def averages(self) -> list[RunningAverage]:
        """All that batches are folded into."""
        scales = [self.inverse.scales] if isinstance(self.inverse, Corrected) else []
        return [self.a, self.g, *scales]

    # --- statistics -------------------------------------------------------------------------------

    def observe(self, seen: Observation) -> None:
        """Join a part of a batch to the statistics."""
        seen = seen.double() if self._float64 else seen
        if isinstance(self.inverse, Corrected):
            by_sample(seen.uses, self.name)
        self.layer.observe(seen.uses, seen.weights, seen.count)
        if isinstance(self.inverse, Corrected) and self.history.ready:
            self.inverse.observe(self.layer, seen)

    def pass_over(self, count: float) -> None:
        """Count a part of a batch in which the layer was not used."""
        self.g.pass_over(count)  # A has a divisor of its own: the rows that it is made of
        if isinstance(self.inverse, Corrected):
            self.inverse.scales.pass_over(count)

    def fold(self, decay: float) -> None:
        """Take the joined batch into the running averages."""
        if isinstance(self.inverse, Corrected) and (new := self.inverse.scales.take()) is not None:
            self.inverse.scales.update(new, decay)
        self.history.fold(self.factors, decay)

    # --- decomposition ----------------------------------------------------------------------------

    def requests(self, damping: float) -> list[Tensor]:
        """The matrices to decompose, of A and G; empty before any statistics.

        Raises:
            FactorError: After ``max_failures`` batches of NaN or Inf in a row.
        """
        if not self.history.has_statistics():
            return []
        a, g = self.a.mean(), self.g.mean()
        if isinstance(self.inverse, Cholesky):
            a, g = factored_tikhonov(a, g, damping)
        return [a, g]

    def install(self, results: Sequence[Parts]) -> None:
        """Take new decompositions of A and G."""
        self.inverse.install(*results)

    # --- step -------------------------------------------------------------------------------------

    def precondition(self, gradients: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        """(F + lambda)^-1 g, or the gradient before any refresh."""
        if not self.history.ready:
            return {name: gradients[name] for name in self.names}
        gradient = self.layer.matrix(gradients)
        step = self.inverse.solve(gradient.to(self.layer.dtype), damping)
        return self.layer.split(step.to(gradient.dtype))

    def damped(self, damping: float) -> Tensor:
        """Eigenvalues of F + lambda in the basis of :meth:`turned`, after the first refresh."""
        assert not isinstance(self.inverse, Cholesky)
        return self.inverse.damped(damping)

    def turned(self, inner: Tensor, *, squared: bool = False) -> dict[str, Tensor]:
        """Coefficients in the eigenbasis as parameters; variances with ``squared``."""
        assert not isinstance(self.inverse, Cholesky)
        return self.layer.split(self.inverse.turned(inner, squared=squared))

    def extremes(self) -> Tensor | None:
        """Smallest and largest eigenvalue of A (x) G (2,); None without eigenvalues."""
        inverse = self.inverse.basis if isinstance(self.inverse, Corrected) else self.inverse
        if isinstance(inverse, Cholesky) or not self.history.ready:
            return None
        a, g = inverse.a.values, inverse.g.values
        return torch.stack([(a.amin(-1) * g.amin(-1)).min(), (a.amax(-1) * g.amax(-1)).max()])

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Factors, the possibly stale decompositions, and what happened so far."""
        return {
            **self.layer.state_dict(),
            **self.inverse.state_dict(),
            **self.history.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a checked state; parts of an unfinished batch are dropped."""
        self.layer.load(state)
        self.inverse.load(state, self.layer.device)
        self.history.load(state)


def extreme_eigenvalues(blocks: Iterable[object]) -> tuple[float, float]:
    """Smallest and largest eigenvalue over all Kronecker blocks; NaN before a refresh."""
    kronecker = (block for block in blocks if isinstance(block, KroneckerBlock))
    pairs = [pair for block in kronecker if (pair := block.extremes()) is not None]
    if not pairs:
        return math.nan, math.nan
    low, high = torch.stack(pairs).unbind(1)
    least, most = torch.stack((low.min(), high.max())).tolist()  # one wait for the device
    return least, most


def _gains(layer: LayerFactors) -> bool:
    """Whether products of a layer's inverses are large, and take half the time in bfloat16."""
    shapes = [factor.value.shape for factor in (layer.a, layer.g)]
    large = all(len(shape) == 2 and shape[-1] >= LARGE_FACTOR for shape in shapes)
    return large and layer.dtype == torch.float32 and fast_bfloat16(layer.device)


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    return rows[..., :, None] * columns[..., None, :]
