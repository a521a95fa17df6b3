"""Auxiliary losses: what a network predicts beside policy and value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from acktr.algorithms.learner import part_of
from acktr.config import ConfigError
from acktr.kfac import Likelihood, Metric
from acktr.policies import Outputs
from acktr.rollout import Batch
from acktr.tree import Sequences, tree_map


@dataclass(frozen=True)
class Auxiliary:
    """A further output of the network, learned beside policy and value.

    The network returns it under its name: ``{"policy": ..., "value": ..., "feasible": logits}``
    belongs to ``auxiliary={"feasible": Auxiliary(BernoulliLoss(), weight=5.0, target=...)}``. As a
    likelihood it is part of ACKTR's Fisher matrix too, with its weight.
    """

    loss: Likelihood
    """One of the losses of :mod:`acktr.kfac`: BernoulliLoss, CategoricalLoss, GaussianLoss, ..."""
    weight: float = field(default=1.0, kw_only=True)
    """What it counts in the network's loss."""
    target: Callable[[Batch], Tensor] = field(kw_only=True)
    """Targets (B, ...) of a batch, as the loss takes them; a mask counts as numbers.

    Its observations are rows (B, ...) of a recurrent network too.
    """

    def __post_init__(self) -> None:
        """Check the fields; raises ConfigError."""
        if not isinstance(self.loss, Likelihood):
            raise ConfigError(
                "Auxiliary: loss must be a loss of acktr.kfac such as BernoulliLoss(), got"
                f" {self.loss!r:.100}"
            )
        if self.loss.reduction != "mean":
            raise ConfigError(
                f"Auxiliary: the loss must have reduction='mean', got {self.loss.reduction!r}"
            )
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not number or not 0 < self.weight < float("inf"):
            raise ConfigError(f"Auxiliary: weight must be a number > 0, got {self.weight!r}")
        if not callable(self.target):
            raise ConfigError(
                f"Auxiliary: target must be a function of a batch, got {self.target!r:.100}"
            )


def checked_auxiliary(
    auxiliary: Mapping[str, Auxiliary] | None, micro_batch: int | None = None
) -> dict[str, Auxiliary]:
    """Auxiliary losses by name; raises ConfigError for others, and what parts would weigh wrong."""
    losses = dict(auxiliary or {})
    for name, loss in losses.items():
        if not isinstance(name, str) or not name.isidentifier() or name in ("policy", "value"):
            raise ConfigError(
                f"auxiliary: a name must be a word other than policy and value, got {name!r:.60}"
            )
        if not isinstance(loss, Auxiliary):
            raise ConfigError(
                f"auxiliary[{name!r}] must be Auxiliary(loss, weight=, target=), got {loss!r:.60}"
            )
        weighted = ("ignore_index", "class_weights")
        if micro_batch and any(getattr(loss.loss, each, None) is not None for each in weighted):
            raise ConfigError(
                f"auxiliary[{name!r}]: the targets of its loss decide on weights, of which a part"
                " of a batch has others than the whole: micro_batch must be null, or weigh terms by"
                " several outputs instead"
            )
    return losses


class AuxiliaryObjective:
    """An auxiliary loss on one batch.

    Args:
        name: Of the output.
        auxiliary: Loss, weight and targets.
        batch: The samples.

    Raises:
        ConfigError: The targets are none of this batch.
    """

    def __init__(self, name: str, auxiliary: Auxiliary, batch: Batch) -> None:
        self.name, self.weight = name, float(auxiliary.weight)
        self.likelihood = auxiliary.loss
        self._weights = batch.weights
        if isinstance(seen := batch.observations, Sequences):
            batch = replace(batch, observations=tree_map(seen.samples, seen.observations))
        target = auxiliary.target(batch)
        if not isinstance(target, Tensor) or target.shape[:1] != (len(batch),):
            got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise ConfigError(
                f"auxiliary {name!r}: target(batch) must be a tensor with a row for each of"
                f" {len(batch)} samples, got {got}"
            )
        if target.dtype == torch.bool:
            target = target.to(batch.returns.dtype)
        self._target = target.detach().to(batch.returns.device)

    def loss(self, outputs: Outputs, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a mean over the rows, which is a term of the metrics.

        Raises:
            ConfigError: The output and the targets do not fit one another.
        """
        weights = part_of(self._weights, rows)
        try:
            loss = self._bound(outputs[0], rows)(outputs[0], self.targets(rows))
        except ValueError as error:
            raise ConfigError(f"auxiliary {self.name!r}: {error}") from error
        loss = loss if weights is None else loss * weights.mean()
        return loss, {f"{self.name}_loss": loss}

    def metric(self, outputs: Outputs, rows: slice) -> Metric:
        """The weight times t^T H t of the distribution, of every sample's terms."""
        output, weights = outputs[0].detach(), part_of(self._weights, rows)
        loss = self._bound(output, rows)
        scale = self.weight * len(output) / (loss.normalizer(output) or 1.0)
        if weights is not None:
            scale = scale * float(weights.mean())
        return lambda t: scale * (t * loss.hessian_product(output, t)).flatten(1).sum(1)

    def targets(self, rows: slice) -> Tensor:
        """Targets of some samples."""
        return self._target[rows]

    def _bound(self, output: Tensor, rows: slice) -> Likelihood:
        """The loss with the weights of some samples, which targets may decide on too."""
        weights = part_of(self._weights, rows)
        return self.likelihood.weighted(output, weights, self.targets(rows))
