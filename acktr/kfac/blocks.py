"""Curvature blocks: state, statistics and preconditioning of one group of parameters."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from acktr.kfac.capture import LayerRecord
from acktr.kfac.config import KFACConfig
from acktr.kfac.factors import conv_input_factor, linear_input_factor, output_factor
from acktr.kfac.linalg import FactorError, symmetric_eigen

_logger = logging.getLogger(__name__)


def check_tensor(value: object, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> None:
    """Raise ValueError unless value is a finite tensor of this shape and type."""
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        raise ValueError(f"{what} does not fit {shape}")
    if value.dtype != dtype or not bool(torch.isfinite(value).all()):
        raise ValueError(f"{what} must be finite {dtype}")


def check_count(value: object, what: str) -> None:
    """Raise ValueError unless value is an integer >= 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{what} must be an integer >= 0, got {value!r}")


class PlainBlock:
    """A parameter without curvature: its step direction is its gradient."""

    def __init__(self, name: str) -> None:
        self.names = (name,)

    def precondition(self, gradients: dict[str, Tensor], config: KFACConfig) -> dict[str, Tensor]:
        """Return the gradient itself."""
        return {name: gradients[name] for name in self.names if name in gradients}


class KnownBlock:
    """A parameter whose Fisher is known in closed form and diagonal, such as 2 I of a log-std."""

    def __init__(self, name: str, fisher: float) -> None:
        if not 0 <= fisher < math.inf:
            raise ValueError(f"known_fisher of {name} must be finite and >= 0, got {fisher}")
        self.names = (name,)
        self.fisher = fisher

    def precondition(self, gradients: dict[str, Tensor], config: KFACConfig) -> dict[str, Tensor]:
        """Return g / (F + lambda)."""
        scale = self.fisher + config.damping
        return {name: gradients[name] / scale for name in self.names if name in gradients}


class RunningAverage:
    """Bias-corrected exponential average of a matrix: value and weight decay together.

    A batch whose statistic is not finite leaves the average as it was; this is decided on the
    device, without a host synchronisation.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.weight: Tensor | None = None

    def update(self, new: Tensor, decay: float, valid: Tensor | None = None) -> None:
        """S <- decay S + (1 - decay) S_new, and the same for the weight with 1 in place of S."""
        if self.value is None or self.weight is None:
            self.value = torch.zeros_like(new)
            self.weight = new.new_zeros(())
        finite = torch.isfinite(new).all() if valid is None else valid
        old_weight = self.weight
        target = torch.where(finite, new, self.value)
        grown = torch.where(finite, torch.ones_like(old_weight), old_weight)
        self.value = self.value.lerp(target, 1 - decay)
        self.weight = old_weight + (1 - decay) * (grown - old_weight)

    def mean(self) -> Tensor:
        """The corrected average S / weight; NaN before the first finite batch."""
        if self.value is None or self.weight is None:
            raise FactorError("factor has no statistics yet")
        return self.value / self.weight


class KroneckerBlock:
    """Weight and bias of a Linear or Conv2d layer with curvature A (x) G."""

    def __init__(self, name: str, module: nn.Module, weight: str, bias: str | None) -> None:
        if not isinstance(module, nn.Linear | nn.Conv2d):
            raise TypeError(f"no Kronecker block for {type(module).__name__}")
        self.name = name
        self.module: nn.Linear | nn.Conv2d = module
        self.weight_name = weight
        self.bias_name = bias
        self.names: tuple[str, ...] = (weight,) if bias is None else (weight, bias)
        self.a = RunningAverage()
        self.g = RunningAverage()
        self.basis: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self.failures = 0
        self.total_failures = 0
        self.rejected = torch.zeros((), dtype=torch.int64, device=module.weight.device)

    @torch.no_grad()
    def update(
        self, record: LayerRecord, grads: list[Tensor | None], config: KFACConfig, turn: int = 0
    ) -> None:
        """Fold one batch into the running factors; uses without a gradient are left out.

        Args:
            record: The layer's inputs.
            grads: Gradient of each use.
            config: Settings.
            turn: Number of the update; with stat_fraction < 1 it rotates the chosen samples.
        """
        stride = max(1, round(1 / config.stat_fraction))
        inputs, gradients = [], []
        for a, g in zip(record.inputs, grads, strict=True):
            if g is not None:
                first = turn % min(stride, len(g))
                inputs.append(a[first::stride])
                gradients.append(g[first::stride])
        if not inputs:
            return
        bias = self.bias_name is not None
        if isinstance(self.module, nn.Conv2d):
            a = conv_input_factor(inputs, self.module, bias, config.conv_sharing)
            g = output_factor(gradients, 1, config.conv_sharing)
        else:
            a = linear_input_factor(inputs, bias, "expand")
            g = output_factor(gradients, -1, "expand")
        valid = torch.isfinite(a).all() & torch.isfinite(g).all()
        self.rejected = torch.where(valid, 0, self.rejected + 1)
        self.a.update(a, config.stat_decay, valid)
        self.g.update(g, config.stat_decay, valid)

    @torch.no_grad()
    def refresh(self, config: KFACConfig) -> None:
        """Renew the eigenbases; on failure keep the former ones.

        Raises:
            FactorError: After ``max_failures`` failures, or batches of NaN or Inf, in a row.
        """
        if self.a.value is None:
            return
        rejected = int(self.rejected)
        if rejected >= config.max_failures:
            raise FactorError(
                f"K-FAC layer {self.name!r}: the statistics of {rejected} batches in a row were"
                " NaN or Inf (lower lr or kl_clip, or normalise rewards)"
            )
        try:
            a_values, a_vectors = symmetric_eigen(self.a.mean())
            g_values, g_vectors = symmetric_eigen(self.g.mean())
        except FactorError as error:
            self.failures += 1
            self.total_failures += 1
            if self.failures >= config.max_failures:
                raise FactorError(
                    f"K-FAC layer {self.name!r}: {error}; {self.failures} refreshes failed in a"
                    " row (lower lr or kl_clip, raise damping, or normalise rewards)"
                ) from error
            _logger.warning("K-FAC layer %r keeps its former basis: %s", self.name, error)
            return
        self.failures = 0
        self.basis = (a_values, a_vectors, g_values, g_vectors)

    def matrix(self, tensors: dict[str, Tensor]) -> Tensor:
        """Weight and bias tensors as one (out, in [+ 1]) matrix."""
        weight = tensors[self.weight_name].flatten(1)
        if self.bias_name is None:
            return weight
        return torch.cat([weight, tensors[self.bias_name][:, None]], dim=1)

    def split(self, matrix: Tensor, shape: torch.Size) -> dict[str, Tensor]:
        """Inverse of :meth:`matrix`; shape is the weight's."""
        if self.bias_name is None:
            return {self.weight_name: matrix.reshape(shape)}
        return {
            self.weight_name: matrix[:, :-1].reshape(shape),
            self.bias_name: matrix[:, -1].contiguous(),
        }

    def precondition(self, gradients: dict[str, Tensor], config: KFACConfig) -> dict[str, Tensor]:
        """U = Q_G [(Q_G^T g Q_A) / (b a^T + lambda)] Q_A^T, or the gradient before any refresh.

        With factored damping the denominator is (a + pi sqrt(lambda)) (b + sqrt(lambda) / pi),
        pi^2 = mean(a) / mean(b) (Martens & Grosse 2015, section 6.3). Weight decay adds to lambda.
        """
        present = {name: gradients[name] for name in self.names if name in gradients}
        if self.basis is None or len(present) < len(self.names):
            return present
        a_values, a_vectors, g_values, g_vectors = self.basis
        rotated = g_vectors.mT @ self.matrix(present) @ a_vectors
        damping = config.damping + config.weight_decay
        if config.factored_damping:
            ratio = (a_values.mean() / g_values.mean().clamp(min=1e-30)).clamp(1e-20, 1e20)
            pi = ratio.sqrt()
            root = damping**0.5
            curvature = torch.outer(g_values + root / pi, a_values + root * pi)
        else:
            curvature = torch.outer(g_values, a_values) + damping
        step = g_vectors @ (rotated / curvature) @ a_vectors.mT
        return self.split(step, present[self.weight_name].shape)

    def extreme_eigenvalues(self) -> tuple[Tensor, Tensor] | None:
        """Smallest and largest eigenvalue of A (x) G, or None before the first refresh."""
        if self.basis is None:
            return None
        a_values, _, g_values, _ = self.basis
        return a_values[0] * g_values[0], a_values[-1] * g_values[-1]

    def state_dict(self) -> dict[str, Any]:
        """Factors, the possibly stale eigenbases, and failure counts."""
        basis = None if self.basis is None else list(self.basis)
        return {
            "a": self.a.value,
            "a_weight": self.a.weight,
            "g": self.g.value,
            "g_weight": self.g.weight,
            "basis": basis,
            "failures": self.failures,
            "total_failures": self.total_failures,
            "rejected": int(self.rejected),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError when a state does not fit the layer."""
        weight = self.module.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        rows, width = len(weight), weight[0].numel() + (self.bias_name is not None)
        shapes = {"a": (width, width), "a_weight": (), "g": (rows, rows), "g_weight": ()}
        where = f"K-FAC layer {self.name!r}"
        counts = ("failures", "total_failures", "rejected")
        keys = {*shapes, "basis", *counts}
        if not isinstance(state, dict) or set(state) != keys:
            raise ValueError(f"{where}: its state must have the entries {sorted(keys)}")
        for key, shape in shapes.items():
            if state[key] is not None:
                check_tensor(state[key], shape, dtype, f"{where}: {key}")
        if len({state[key] is None for key in shapes}) != 1:
            raise ValueError(f"{where}: some of the factors are missing")
        basis = state["basis"]
        sizes = ((width,), (width, width), (rows,), (rows, rows))
        if basis is not None:
            if not isinstance(basis, list) or len(basis) != len(sizes):
                raise ValueError(f"{where}: basis must be {len(sizes)} tensors")
            for tensor, size in zip(basis, sizes, strict=True):
                check_tensor(tensor, size, dtype, f"{where}: basis")
        for key in counts:
            check_count(state[key], f"{where}: {key}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises ValueError, and changes nothing, when the state does not fit."""
        self.check_state(state)
        device = self.module.weight.device

        def load(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device)

        self.a.value, self.a.weight = load(state["a"]), load(state["a_weight"])
        self.g.value, self.g.weight = load(state["g"]), load(state["g_weight"])
        self.basis = None
        if state["basis"] is not None:
            first, second, third, fourth = (tensor.to(device) for tensor in state["basis"])
            self.basis = (first, second, third, fourth)
        self.failures = state["failures"]
        self.total_failures = state["total_failures"]
        self.rejected = torch.tensor(state["rejected"], device=device)


Block = KroneckerBlock | KnownBlock | PlainBlock
"""A group of parameters with its own curvature."""
