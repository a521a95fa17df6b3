"""What the algorithms share: their interface, advantages, schedules and metrics."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from acktr.config import Config
from acktr.rollout import Batch


class Learner(Protocol):
    """An algorithm: turns batches into changes of the network's parameters."""

    @property
    def seconds(self) -> dict[str, float]:
        """Wall-clock time so far by part of the update; a part may hold others."""

    def update(self, batch: Batch, progress: float) -> dict[str, float]:
        """Learn from one batch.

        Args:
            batch: The samples.
            progress: Fraction of training done, in [0, 1], for schedules.

        Returns:
            Metrics by TensorBoard tag.
        """

    def state_dict(self) -> dict[str, Any]:
        """Everything but the network that a later session needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; raises ValueError or KeyError when it does not fit."""


def used_advantages(batch: Batch, config: Config) -> Tensor:
    """Advantages (B,); if so configured with mean 0 and population deviation 1 (+ 1e-8)."""
    if not config.normalize_advantage:
        return batch.advantages
    centred = batch.advantages - batch.advantages.mean()
    return centred / (centred.square().mean().sqrt() + 1e-8)


def scheduled_lr(lr: float, progress: float, schedule: str, horizon: float = 1.0) -> float:
    """Step size after a fraction of training; the linear one reaches 0 at ``horizon``."""
    return lr if schedule == "constant" else lr * max(0.0, 1 - progress / horizon)


def value_metrics(value_loss: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Mean squared value error, and the share of the returns' variance that V explained."""
    residual = (batch.returns - batch.values).var(correction=0)
    total = batch.returns.var(correction=0)
    return {
        "train/value_loss": value_loss,
        "train/explained_variance": 1 - residual / total.clamp(min=1e-12),
    }


def to_floats(tensors: dict[str, Tensor]) -> dict[str, float]:
    """All scalars in one transfer."""
    stacked = torch.stack([value.detach().float().reshape(()) for value in tensors.values()])
    return dict(zip(tensors, stacked.tolist(), strict=True))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The tensors that a torch optimizer keeps, by the parameter's position."""
    return {
        str(place): {name: value.clone() for name, value in values.items()}
        for place, values in optimizer.state_dict()["state"].items()
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Tensor]], module: nn.Module
) -> None:
    """Restore :func:`optimizer_state`, in the parameters' own memory formats.

    Fused optimizers walk through parameter and state as they lie in memory, so that both must have
    the same strides.

    Raises:
        ValueError: The tensors do not fit the module's parameters.
    """
    parameters = list(module.parameters())
    shapes = [parameter.shape for parameter in parameters]
    places = {int(place) for place in state}
    if places not in (set(), set(range(len(shapes)))):
        raise ValueError("optimizer state belongs to another network")
    for place, values in state.items():
        for name, value in values.items():
            if not isinstance(value, Tensor) or value.shape not in (shapes[int(place)], ()):
                raise ValueError(f"optimizer state {name} does not fit parameter {place}")
    wanted = {
        int(place): {name: _laid_out(value, parameters[int(place)]) for name, value in own.items()}
        for place, own in state.items()
    }
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": wanted, "param_groups": groups})


def _laid_out(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A copy with the strides of the parameter, unless it is a scalar."""
    if value.shape != parameter.shape:
        return value.clone()
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value).detach()
