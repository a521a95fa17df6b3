"""What the algorithms share: their interface, advantages, schedules and metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from acktr.config import Config, ConfigError, LearningRate
from acktr.policies import ActionHead
from acktr.rollout import Batch


class Learner(Protocol):
    """An algorithm: turns batches into changes of the network's parameters."""

    learning_rate: LearningRate | None
    """Step size in place of the configuration's; TRPO has none and does not ask."""

    @property
    def network(self) -> nn.Module:
        """What learns."""

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


def part_of(column: Tensor | None, rows: slice | Tensor) -> Tensor | None:
    """The weights or masks of some samples; None where there are none."""
    return None if column is None else column[rows]


def mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of w x over samples (B,), of a batch whose weights have the mean 1."""
    return values.mean() if weights is None else (weights * values).mean()


def average(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of x over any samples (B,), with their weights."""
    return values.mean() if weights is None else (weights * values).sum() / weights.sum()


def require_allowed(batch: Batch, head: ActionHead) -> None:
    """Refuse a batch whose masks do not fit, or forbid the actions that were taken.

    Such an action has the log-probability -inf, from which nothing can be learned.

    Raises:
        ConfigError: One line.
    """
    masks = batch.masks
    if masks is None:
        return
    shape = (len(batch), head.outputs)
    if masks.shape != shape or masks.dtype != torch.bool:
        raise ConfigError(
            f"masks must be torch.bool of shape {shape}, got {masks.dtype} of shape"
            f" {tuple(masks.shape)}"
        )
    log_prob = head.make(torch.zeros(shape, device=masks.device), masks).log_prob(batch.actions)
    allowed = log_prob.isfinite()
    if not bool(allowed.all()):
        row = int((~allowed).int().argmax())
        raise ConfigError(
            f"the mask of sample {row} forbids the action {batch.actions[row].tolist()} that was"
            " taken there"
        )


def drawn(batch: Batch, draw: Callable[[int], Tensor]) -> Tensor:
    """Noise of a batch's samples, which is drawn for those of all ranks.

    Thus the numbers of a sample do not depend on the ranks, and all generators stay alike.
    """
    share = batch.share
    return draw(len(batch)) if share is None else draw(share.total)[share.index]


def over_ranks(
    batch: Batch, means: dict[str, Tensor], rows: int | None = None
) -> dict[str, Tensor]:
    """Means over the samples of all ranks, from those over a batch, or over so many rows of it."""
    if batch.share is None:
        return means
    return batch.share.means(means, len(batch) if rows is None else rows)


def used_advantages(batch: Batch, config: Config) -> Tensor:
    """Advantages (B,); if so configured with mean 0 and population deviation 1 (+ 1e-8)."""
    if not config.normalize_advantage:
        return batch.advantages
    if batch.share is not None:
        all_of_them = batch.share.advantages
        return (batch.advantages - all_of_them.mean) / (all_of_them.deviation + 1e-8)
    centred = batch.advantages - mean(batch.advantages, batch.weights)
    return centred / (mean(centred.square(), batch.weights).sqrt() + 1e-8)


def scheduled_lr(lr: float, progress: float, schedule: str, horizon: float = 1.0) -> float:
    """Step size after a fraction of training; the linear one reaches 0 at ``horizon``."""
    return lr if schedule == "constant" else lr * max(0.0, 1 - progress / horizon)


def value_metrics(value_loss: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Mean squared value error, and :func:`explained_variance`."""
    return {"train/value_loss": value_loss, **explained_variance(batch)}


def explained_variance(batch: Batch) -> dict[str, Tensor]:
    """The share of the returns' variance that V explained; nothing where V is not known."""
    if batch.values is None:
        return {}
    if batch.share is not None:
        explained = batch.returns.new_tensor(batch.share.explained_variance)
        return {"train/explained_variance": explained}
    residual = _variance(batch.returns - batch.values, batch.weights)
    total = _variance(batch.returns, batch.weights)
    return {"train/explained_variance": 1 - residual / total.clamp(min=1e-12)}


def _variance(values: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return values.var(correction=0)
    return mean((values - mean(values, weights)).square(), weights)


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
    trained = {place for place, parameter in enumerate(parameters) if parameter.requires_grad}
    if places not in (set(), set(range(len(shapes))), trained):
        raise ValueError("optimizer state belongs to another network")
    adam = isinstance(optimizer, torch.optim.Adam)
    names = {"step", "exp_avg", "exp_avg_sq"} if adam else {"momentum_buffer"}
    for place, values in state.items():
        if set(values) not in (names, set()):
            raise ValueError(f"optimizer state of parameter {place} must have {sorted(names)}")
        parameter = parameters[int(place)]
        for name, value in values.items():
            shape = () if name == "step" else parameter.shape
            kind = torch.float32 if name == "step" else parameter.dtype
            if not isinstance(value, Tensor) or value.shape != shape or value.dtype != kind:
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
