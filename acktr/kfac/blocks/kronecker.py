"""The Kronecker-factored block of one layer, or of layers that share a weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from acktr.kfac.blocks.failures import COUNTS, FailureCount
from acktr.kfac.blocks.layouts import Layout, layout_of
from acktr.kfac.config import KFACConfig
from acktr.kfac.linalg import (
    FactorError,
    Inverse,
    Parts,
    Request,
    all_finite,
    decompose,
    factored_tikhonov,
    trace_ratio,
)
from acktr.kfac.statistics.averages import (
    Observation,
    RunningAverage,
    check_count,
    check_list,
    check_sizes,
    check_tensor,
)
from acktr.kfac.statistics.factors import accumulation_type


class KroneckerBlock:
    """Weight and bias of a layer with curvature A (x) G, or its eigenvalue-corrected form.

    Args:
        name: Path of the layer.
        module: Linear, convolution or embedding.
        weight: Name of its weight.
        bias: Name of its bias; None without.
        paths: Paths of all layers that share the weight, by default this one alone.

    Raises:
        TypeError: There is no Kronecker block for this kind of module.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        weight: str,
        bias: str | None,
        paths: Sequence[str] | None = None,
    ) -> None:
        self.name = name
        self.module = module
        self.layout: Layout = layout_of(module, bias is not None)
        self.paths = tuple(paths) if paths else (name,)
        self.weight_name = weight
        self.bias_name = bias
        self.names: tuple[str, ...] = (weight,) if bias is None else (weight, bias)
        self.a = RunningAverage()
        self.g = RunningAverage()
        self.scales = RunningAverage()
        self.basis: tuple[Tensor, Tensor | None, Tensor, Tensor] | None = None
        self.inverses: tuple[Tensor, Tensor] | None = None
        self.references: list[Tensor | None] = [None, None]
        place = next(module.parameters())
        self.dtype = accumulation_type(place)
        self.counts = FailureCount(name, place.device)

    @property
    def failures(self) -> int:
        """Failed refreshes in a row."""
        return self.counts.failures

    @property
    def total_failures(self) -> int:
        """Failed refreshes so far."""
        return self.counts.total_failures

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of A and G, the factors that a refresh decomposes."""
        return self.layout.a_shape, self.layout.g_shape

    @property
    def device(self) -> torch.device:
        """Where the statistics are."""
        return self.counts.rejected.device

    def method(self, config: KFACConfig) -> Inverse:
        """How the factors are decomposed."""
        return config.inverse

    # --- statistics -------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, seen: Observation, config: KFACConfig) -> None:
        """Join a part of a batch to the statistics."""
        if config.structure == "ekfac" or self.layout.reduces(config):
            check_sizes(seen.uses, self.name)
        self.a.add(*self.layout.input_factor(seen.uses, config))
        total: Tensor | None = None
        for index, weight in enumerate(seen.weights):
            part = self.layout.output_factor(seen.uses, index, config)
            part = part if weight == 1 else part * weight
            total = part if total is None else total + part
        if total is not None:
            self.g.add(total if seen.factor == 1 else total * seen.factor, seen.count)
        if config.structure == "ekfac" and self.basis is not None:
            squares = self._squares(seen, self.basis[1], self.basis[3])
            self.scales.add(squares * seen.factor, seen.count)

    def _squares(self, seen: Observation, a_vectors: Tensor | None, g_vectors: Tensor) -> Tensor:
        """Sum over samples of (Q_G^T (sum_t g a^T) Q_A)^2 (George et al. 2018, equation 10)."""
        total: Tensor | None = None
        for index, weight in enumerate(seen.weights):
            part = self.layout.squares(seen.uses, index, a_vectors, g_vectors) * weight
            total = part if total is None else total + part
        assert total is not None
        return total

    def pass_over(self, count: float) -> None:
        """Count a part of a batch in which the layer was not used."""
        for average in (self.g, self.scales):
            average.pass_over(count)

    def drop(self) -> None:
        """Forget the parts of an unfinished batch."""
        for average in (self.a, self.g, self.scales):
            average.drop()

    @torch.no_grad()
    def fold(self, decay: float) -> None:
        """Take the joined batch into the running averages."""
        a, g, scales = self.a.take(), self.g.take(), self.scales.take()
        if a is None or g is None:
            return
        valid = all_finite(a) & all_finite(g)
        self.counts.judge(valid)
        self.a.update(a, decay, valid)
        self.g.update(g, decay, valid)
        if scales is not None:
            self.scales.update(scales, decay)

    # --- decomposition ----------------------------------------------------------------------------

    @torch.no_grad()
    def requests(self, config: KFACConfig, damping: float) -> list[Request]:
        """The matrices to decompose, A and G; empty before any statistics.

        Raises:
            FactorError: After ``max_failures`` batches of NaN or Inf in a row.
        """
        if self.a.value is None:
            return []
        self.counts.check_rejected(config.max_failures)
        a, g = self.a.mean(), self.g.mean()
        if config.inverse == "cholesky":
            a, g = factored_tikhonov(a, g, damping)
        return [(a, config.inverse), (g, config.inverse)]

    @torch.no_grad()
    def install(self, results: Sequence[Parts | FactorError | None], config: KFACConfig) -> None:
        """Take new decompositions; None leaves a factor's former one, an error leaves both.

        Raises:
            FactorError: After ``max_failures`` failures in a row.
        """
        if not results or not self.counts.settle(results, config.max_failures):
            return
        found = [result for result in results if not isinstance(result, FactorError)]
        if all(result is None for result in found):
            return
        first, second = found
        if config.inverse == "cholesky":
            old_a, old_g = self.inverses or (None, None)
            new_a = old_a if first is None else first[0]
            new_g = old_g if second is None else second[0]
            assert new_a is not None and new_g is not None
            self.inverses = (new_a, new_g)
            return
        if first is None:
            assert self.basis is not None
            first_parts: tuple[Tensor, Tensor | None] = self.basis[:2]
        else:
            first_parts = (first[0], first[1] if len(first) > 1 else None)
        if second is None:
            assert self.basis is not None
            second_parts = self.basis[2:]
        else:
            second_parts = (second[0], second[1])
        self.basis = (*first_parts, *second_parts)
        if config.structure == "ekfac":
            # The eigenvalues' products stand in for one batch, and fade like one.
            self.scales = RunningAverage()
            self.scales.update(_outer(self.basis[2], self.basis[0]), config.stat_decay)

    @torch.no_grad()
    def refresh(self, config: KFACConfig, damping: float | None = None) -> None:
        """Renew the decomposition of this block alone; on failure keep the former one.

        Raises:
            FactorError: After ``max_failures`` failures, or batches of NaN or Inf, in a row.
        """
        damping = config.damping + config.weight_decay if damping is None else damping
        self.install(decompose(self.requests(config, damping)), config)

    # --- step -------------------------------------------------------------------------------------

    def matrix(self, tensors: dict[str, Tensor]) -> Tensor:
        """Weight and bias tensors as one ([k,] out, in [+ 1]) matrix."""
        bias = None if self.bias_name is None else tensors[self.bias_name]
        return self.layout.matrix(tensors[self.weight_name], bias)

    def split(self, matrix: Tensor) -> dict[str, Tensor]:
        """Inverse of :meth:`matrix`."""
        weight, bias = self.layout.split(matrix)
        if self.bias_name is None or bias is None:
            return {self.weight_name: weight}
        return {self.weight_name: weight, self.bias_name: bias}

    def precondition(
        self, gradients: dict[str, Tensor], damping: float, factored: bool
    ) -> dict[str, Tensor]:
        """U = Q_G [(Q_G^T g Q_A) / (b a^T + lambda)] Q_A^T, or the gradient before any refresh.

        With factored damping the denominator is (a + pi sqrt(lambda)) (b + sqrt(lambda) / pi),
        pi^2 = mean(a) / mean(b) (Martens & Grosse 2015, section 6.3); with EKFAC it is s + lambda
        with s the second moments of the rotated gradients. Cholesky inverses hold their damping.
        """
        present = {name: gradients[name] for name in self.names if name in gradients}
        if len(present) < len(self.names) or (self.basis is None and self.inverses is None):
            return present
        gradient = self.matrix(present)
        step = self._solve(gradient.to(self.dtype), damping, factored)
        return self.split(step.to(gradient.dtype))

    def _solve(self, gradient: Tensor, damping: float, factored: bool) -> Tensor:
        if self.inverses is not None:
            a, g = self.inverses
            step = g @ gradient
            return step * a if a.dim() == 1 else step @ a
        assert self.basis is not None
        a_values, a_vectors, g_values, g_vectors = self.basis
        rotated = g_vectors.mT @ gradient
        rotated = rotated if a_vectors is None else rotated @ a_vectors
        if self.scales.value is not None:
            curvature = self.scales.mean() + damping
        elif factored:
            pi = trace_ratio(a_values, g_values)
            root = damping**0.5
            curvature = _outer(g_values + root / pi, a_values + root * pi)
        else:
            curvature = _outer(g_values, a_values) + damping
        step = g_vectors @ (rotated / curvature)
        return step if a_vectors is None else step @ a_vectors.mT

    def extreme_eigenvalues(self) -> tuple[Tensor, Tensor] | None:
        """Smallest and largest eigenvalue of A (x) G, or None without eigenvalues."""
        if self.basis is None:
            return None
        a_values, _, g_values, _ = self.basis
        lowest = a_values.amin(-1) * g_values.amin(-1)
        return lowest.min(), (a_values.amax(-1) * g_values.amax(-1)).max()

    # --- state ------------------------------------------------------------------------------------

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        a, g = self.layout.a_shape, self.layout.g_shape
        scales = (*g[:-1], a[-1])
        return {
            "a": a,
            "a_weight": (),
            "g": g,
            "g_weight": (),
            "scales": scales,
            "scales_weight": (),
            "a_reference": a,
            "g_reference": g,
        }

    def state_dict(self) -> dict[str, Any]:
        """Factors, the possibly stale decompositions, and failure counts."""
        (a, a_weight), (g, g_weight) = self.a.tensors(), self.g.tensors()
        scales, scales_weight = self.scales.tensors()
        return {
            "a": a,
            "a_weight": a_weight,
            "g": g,
            "g_weight": g_weight,
            "scales": scales,
            "scales_weight": scales_weight,
            "a_reference": self.references[0],
            "g_reference": self.references[1],
            "basis": None if self.basis is None else list(self.basis),
            "inverses": None if self.inverses is None else list(self.inverses),
            **self.counts.state_dict(),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError when a state does not fit the layer."""
        shapes = self._shapes()
        where = f"K-FAC layer {self.name!r}"
        keys = {*shapes, "basis", "inverses", *COUNTS}
        if not isinstance(state, dict) or set(state) != keys:
            raise ValueError(f"{where}: its state must have the entries {sorted(keys)}")
        for key, shape in shapes.items():
            if state[key] is not None:
                check_tensor(state[key], shape, self.dtype, f"{where}: {key}")
        if len({state[key] is None for key in ("a", "a_weight", "g", "g_weight")}) != 1:
            raise ValueError(f"{where}: some of the factors are missing")
        if (state["scales"] is None) != (state["scales_weight"] is None):
            raise ValueError(f"{where}: some of the scales are missing")
        a, g = shapes["a"], shapes["g"]
        vectors: tuple[int, ...] | None = None if len(a) == 1 else a
        values = a if vectors is None else a[:-1]
        sizes = (values, vectors, g[:-1], g)
        check_list(state["basis"], sizes, self.dtype, f"{where}: basis")
        check_list(state["inverses"], (a, g), self.dtype, f"{where}: inverses")
        for key in COUNTS:
            check_count(state[key], f"{where}: {key}")

    def check_settings(self, state: dict[str, Any], config: KFACConfig) -> None:
        """Raise ValueError when a state that fits the layer is one of other settings."""
        corrected, plain = config.structure == "ekfac", config.inverse != "cholesky"
        wrong = state["scales"] is not None and not corrected
        wrong |= corrected and state["basis"] is not None and state["scales"] is None
        if wrong or state["inverses" if plain else "basis"] is not None:
            raise ValueError(
                f"K-FAC layer {self.name!r}: its state has decompositions of another structure or"
                f" inverse than structure={config.structure} with inverse={config.inverse}"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises ValueError, and changes nothing, when the state does not fit."""
        self.check_state(state)
        device = self.device
        self.a.load(state["a"], state["a_weight"], device)
        self.g.load(state["g"], state["g_weight"], device)
        self.scales.load(state["scales"], state["scales_weight"], device)

        def load(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device)

        self.references = [load(state["a_reference"]), load(state["g_reference"])]
        self.basis = None
        if state["basis"] is not None:
            first, second, third, fourth = state["basis"]
            self.basis = (first.to(device), load(second), third.to(device), fourth.to(device))
        self.inverses = None
        if state["inverses"] is not None:
            left, right = state["inverses"]
            self.inverses = (left.to(device), right.to(device))
        self.counts.load_state_dict(state)


def extreme_eigenvalues(blocks: Iterable[KroneckerBlock]) -> tuple[float, float]:
    """Smallest and largest eigenvalue over all blocks; NaN before a refresh."""
    found = [pair for block in blocks if (pair := block.extreme_eigenvalues()) is not None]
    if not found:
        return float("nan"), float("nan")
    low = torch.stack([pair[0] for pair in found]).min()
    high = torch.stack([pair[1] for pair in found]).max()
    return float(low), float(high)


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    return rows[..., :, None] * columns[..., None, :]
