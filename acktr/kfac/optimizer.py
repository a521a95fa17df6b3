"""K-FAC as a torch optimizer."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acktr.kfac.blocks import (
    Block,
    KnownBlock,
    KroneckerBlock,
    PlainBlock,
    check_count,
    check_tensor,
)
from acktr.kfac.capture import Capture, capture
from acktr.kfac.config import KFACConfig
from acktr.kfac.linalg import trust_scale

FisherQuadratic = Callable[[dict[str, Tensor]], Tensor]


class UnsupportedParameterWarning(UserWarning):
    """A parameter without a curvature block follows its plain gradient."""


@dataclass(frozen=True)
class StepInfo:
    """What the last step did; tensors stay on the device until somebody reads them."""

    quadratic: Tensor
    """q = U^T F U."""
    scale: Tensor
    """nu of the trust region; 1 in cold steps."""
    predicted_kl: Tensor
    """lr^2 nu^2 q / 2, the KL that the quadratic model predicts for the step without momentum."""


class KFAC(torch.optim.Optimizer):
    """Natural gradient descent with Kronecker-factored curvature and a KL trust region.

    Linear and Conv2d layers (one group) get a block A (x) G with the bias as a homogeneous
    coordinate; parameters named in ``known_fisher`` get that constant diagonal Fisher; everything
    else follows its plain gradient, is counted in the quadratic form, and is warned of once. The
    module is not changed.

    One update with one forward pass::

        with optimizer.capture() as captured:
            output = model(inputs)
        optimizer.update_curvature(captured, log_likelihood_of_sampled_targets.sum())
        optimizer.zero_grad()
        loss(output).backward()
        optimizer.step()

    The update is U = (F + lambda)^-1 g, nu = min(1, sqrt(c / (lr^2 q))) with q = U^T F U,
    v <- mu v + nu U, theta <- theta - lr (1 - mu) v (Martens & Grosse 2015; Wu et al. 2017,
    section 3.3; the trust region comes before momentum).

    Args:
        module: The network; its parameters are optimised.
        config: Settings.
        known_fisher: Diagonal Fisher by parameter name, for parameters outside of layers.

    Raises:
        ValueError: ``known_fisher`` names a parameter that does not exist.
    """

    def __init__(
        self,
        module: nn.Module,
        config: KFACConfig | None = None,
        *,
        known_fisher: Mapping[str, float] | None = None,
    ) -> None:
        self.config = config or KFACConfig()
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        super().__init__(list(named.values()), {"lr": self.config.lr})
        self._named = named
        self.blocks = _build_blocks(module, named, dict(known_fisher or {}))
        self._layers = {b.name: b for b in self.blocks if isinstance(b, KroneckerBlock)}
        self._steps = 0
        self._refreshes = 0
        self._statistics = 0
        self.refresh_seconds = 0.0
        self.last_step: StepInfo | None = None

    @property
    def lr(self) -> float:
        """Step size of the next step (a scheduler may change it in param_groups)."""
        return float(self.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        self.param_groups[0]["lr"] = value

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return self._steps

    def capture(self) -> AbstractContextManager[Capture]:
        """Context in which forward passes are recorded for :meth:`update_curvature`."""
        return capture({name: block.module for name, block in self._layers.items()})

    def update_curvature(self, captured: Capture, log_likelihood: Tensor) -> None:
        """Fold one batch into the Fisher factors.

        Args:
            captured: The records of the forward pass.
            log_likelihood: *Sum* over the samples of the log-likelihood (its sign is irrelevant) of
                targets sampled from the model's own output distribution, which gives the true
                Fisher. No weight gradient is computed.
        """
        gradients = captured.output_gradients(log_likelihood)
        for name, block in self._layers.items():
            if gradients.get(name):
                block.update(captured.layers[name], gradients[name], self.config, self._statistics)
        self._statistics += 1

    def refresh(self) -> None:
        """Renew every eigenbasis now; raises FactorError after max_failures in a row."""
        started = time.perf_counter()
        for block in self._layers.values():
            block.refresh(self.config)
        self._refreshes += 1
        self.refresh_seconds += time.perf_counter() - started

    @property
    def needs_refresh(self) -> bool:
        """Whether the next step renews the eigenbases."""
        due = self._steps - self.config.cold_steps
        return due >= 0 and due % self.config.refresh_interval == 0

    @torch.no_grad()
    def direction(self) -> dict[str, Tensor]:
        """U = (F + lambda)^-1 (g + weight decay) by parameter name, from the current gradients."""
        return self._precondition(self._gradients())

    def _precondition(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        step: dict[str, Tensor] = {}
        for block in self.blocks:
            step.update(block.precondition(gradients, self.config))
        return step

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Tensor] | None = None,
        *,
        fisher_quadratic: FisherQuadratic | None = None,
    ) -> Tensor | None:
        """Take one step.

        Args:
            closure: Optional re-evaluation of the loss, as for every torch optimizer.
            fisher_quadratic: U -> U^T F U with the exact Fisher, used when the configuration says
                ``quadratic="exact"``; otherwise q = g . U, which is U^T (F + lambda) U for the
                Kronecker factors.

        Raises:
            FactorError: A factor could not be decomposed ``max_failures`` times in a row.
            ValueError: ``quadratic="exact"`` without ``fisher_quadratic``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._steps < self.config.cold_steps:
            self._cold_step()
        else:
            if self._steps == self.config.cold_steps:
                self._clear_momentum()
            if self.needs_refresh:
                self.refresh()
            self._natural_step(fisher_quadratic)
        self._steps += 1
        return loss

    def _gradients(self) -> dict[str, Tensor]:
        decay = self.config.weight_decay
        weights = {block.weight_name for block in self._layers.values()}
        found: dict[str, Tensor] = {}
        for name, parameter in self._named.items():
            if parameter.grad is not None:
                grad = parameter.grad
                found[name] = grad.add(parameter, alpha=decay) if name in weights else grad
        return found

    def _natural_step(self, fisher_quadratic: FisherQuadratic | None) -> None:
        gradients = self._gradients()
        step = self._precondition(gradients)
        if not step:
            return
        if self.config.quadratic == "exact":
            if fisher_quadratic is None:
                raise ValueError('quadratic="exact" needs fisher_quadratic in step()')
            quadratic = fisher_quadratic(step).detach()
        else:
            quadratic = torch.stack([(gradients[name] * step[name]).sum() for name in step]).sum()
        lr = self.lr
        scale = trust_scale(quadratic, lr, self.config.kl_clip)
        skip = scale == 0
        for name, update in step.items():
            scaled = torch.where(skip, torch.zeros_like(update), scale * update)
            self._move(name, scaled, lr * (1 - self.config.momentum))
        predicted = 0.5 * (lr * scale).square() * quadratic
        predicted = torch.where(skip, torch.zeros_like(predicted), predicted)
        self.last_step = StepInfo(quadratic, scale, predicted)

    def _cold_step(self) -> None:
        gradients = self._gradients()
        if not gradients:
            return
        norm = torch.stack([grad.square().sum() for grad in gradients.values()]).sum().sqrt()
        clip = (self.config.cold_max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        finite = torch.isfinite(norm)
        for name, grad in gradients.items():
            update = torch.where(finite, clip * grad, torch.zeros_like(grad))
            self._move(name, update, self.config.cold_lr)
        zero = torch.zeros_like(norm)
        self.last_step = StepInfo(zero, torch.ones_like(norm), zero)

    def _move(self, name: str, update: Tensor, rate: float) -> None:
        """V <- mu v + update, theta <- theta - rate v."""
        parameter = self._named[name]
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        velocity = state["momentum"].mul_(self.config.momentum).add_(update)
        parameter.add_(velocity, alpha=-rate)

    def _clear_momentum(self) -> None:
        for state in self.state.values():
            state["momentum"].zero_()

    def extreme_eigenvalues(self) -> tuple[float, float]:
        """Smallest and largest eigenvalue over all Kronecker blocks; NaN before a refresh."""
        pairs = [block.extreme_eigenvalues() for block in self._layers.values()]
        found = [pair for pair in pairs if pair is not None]
        if not found:
            return float("nan"), float("nan")
        low = torch.stack([pair[0] for pair in found]).min()
        high = torch.stack([pair[1] for pair in found]).max()
        return float(low), float(high)

    @property
    def failures(self) -> int:
        """Failed eigendecompositions so far, over all layers."""
        return sum(block.total_failures for block in self._layers.values())

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-exact resume needs: factors, stale bases, momentum, counters, lr."""
        return {
            "lr": self.lr,
            "steps": self._steps,
            "refreshes": self._refreshes,
            "statistics": self._statistics,
            "momentum": {
                name: self.state[p]["momentum"].clone()
                for name, p in self._named.items()
                if p in self.state
            },
            "layers": {name: block.state_dict() for name, block in self._layers.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; ValueError and no change if it does not fit."""
        self._check_state(state_dict)
        for name, block in self._layers.items():
            block.load_state_dict(state_dict["layers"][name])
        self.state.clear()
        for name, value in state_dict["momentum"].items():
            parameter = self._named[name]
            self.state[parameter]["momentum"] = value.to(parameter.device).clone()
        self.lr = float(state_dict["lr"])
        self._steps = state_dict["steps"]
        self._refreshes = state_dict["refreshes"]
        self._statistics = state_dict["statistics"]

    def _check_state(self, state: dict[str, Any]) -> None:
        keys = {"lr", "steps", "refreshes", "statistics", "momentum", "layers"}
        if not isinstance(state, dict) or set(state) != keys:
            raise ValueError(f"K-FAC state must have the entries {sorted(keys)}")
        if not isinstance(state["layers"], dict) or set(state["layers"]) != set(self._layers):
            raise ValueError("K-FAC state belongs to a network with other layers")
        for name, block in self._layers.items():
            block.check_state(state["layers"][name])
        if not isinstance(state["momentum"], dict):
            raise ValueError("K-FAC state: momentum must be a dict")
        for name, value in state["momentum"].items():
            if name not in self._named:
                raise ValueError(f"K-FAC state has momentum for an unknown parameter {name!r}")
            place = self._named[name]
            check_tensor(value, tuple(place.shape), place.dtype, f"K-FAC momentum of {name!r}")
        for key in ("steps", "refreshes", "statistics"):
            check_count(state[key], f"K-FAC {key}")
        lr = state["lr"]
        if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 <= lr < math.inf:
            raise ValueError(f"K-FAC lr must be a finite number >= 0, got {lr!r}")


def _build_blocks(
    module: nn.Module, named: dict[str, nn.Parameter], known: dict[str, float]
) -> list[Block]:
    """One block per layer, per known parameter, and per parameter that is left."""
    unknown = sorted(set(known) - set(named))
    if unknown:
        raise ValueError(f"known_fisher names no trainable parameter of the module: {unknown}")
    uses: dict[int, int] = {}
    for layer in module.modules():
        for parameter in layer._parameters.values():
            if parameter is not None:
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    blocks: list[Block] = []
    taken: set[str] = set()
    for path, layer in module.named_modules():
        block = _layer_block(path, layer, named, uses, known)
        if block is not None:
            blocks.append(block)
            taken.update(block.names)
    for name, fisher in known.items():
        blocks.append(KnownBlock(name, fisher))
        taken.add(name)
    left = [name for name in named if name not in taken]
    if left:
        warnings.warn(
            f"no curvature block for {', '.join(left)}: plain gradient steps",
            UnsupportedParameterWarning,
            stacklevel=3,
        )
    return [*blocks, *(PlainBlock(name) for name in left)]


def _layer_block(
    path: str,
    layer: nn.Module,
    named: dict[str, nn.Parameter],
    uses: dict[int, int],
    known: Mapping[str, float],
) -> KroneckerBlock | None:
    """The block of a supported layer; None for others and for tied or frozen weights."""
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return None
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return None
    prefix = f"{path}." if path else ""
    weight = f"{prefix}weight"
    bias = f"{prefix}bias"
    if weight not in named or weight in known or uses[id(named[weight])] > 1:
        return None
    has_bias = bias in named and bias not in known and uses[id(named[bias])] == 1
    return KroneckerBlock(path, layer, weight, bias if has_bias else None)
