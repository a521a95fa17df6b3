"""The block of a layer with the diagonal of its Fisher, from the gradient of every sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from acktr.kfac.blocks.layouts import LayerFactors
from acktr.kfac.config import KFACConfig
from acktr.kfac.linalg import Inverse, Parts
from acktr.kfac.statistics.averages import History, RunningAverage
from acktr.kfac.statistics.uses import Observation, by_sample


class EntriesBlock:
    """Weight and bias of a layer whose curvature is the diagonal of its Fisher.

    The entry of weight (i, j) is f_ij = 1/Z sum_n E[(sum_t g_i a_j)^2], squared sample by sample:
    what noisy Adam divides by (Zhang et al. 2018). The step is g / (f + lambda). It needs no
    decomposition and takes the present average at every step, once the first refresh was there.

    Args:
        layer: The layer; its factors are not used.
        config: Settings.
    """

    method: Inverse = "eigen"
    needs_samples = True
    """Whether rows are added up sample by sample."""

    def __init__(self, layer: LayerFactors, config: KFACConfig) -> None:
        self.layer = layer
        self.name, self.paths, self.names = layer.name, layer.paths, layer.names
        self._float64 = config.float64
        a, g = layer.layout.shapes
        self._shape = (*g[:-1], a[-1])
        self.moment = RunningAverage(layer.zeros(self._shape).flatten())
        self.history = History(f"layer {layer.name!r}", config.max_failures, layer.device)

    @property
    def factors(self) -> list[RunningAverage]:
        """What a refresh looks at."""
        return [self.moment]

    averages = factors
    """All that batches are folded into."""

    def observe(self, seen: Observation) -> None:
        """Join a part of a batch to the statistics."""
        seen = seen.double() if self._float64 else seen
        by_sample(seen.uses, self.name)
        pairs = enumerate(seen.weights)
        squares = (w * self.layer.squares(seen.uses, i, None, None) for i, w in pairs)
        self.moment.add(reduce(torch.add, squares).flatten().to(self.layer.dtype), seen.count)

    def pass_over(self, count: float) -> None:
        """Count a part of a batch in which the layer was not used."""
        self.moment.pass_over(count)

    def fold(self, decay: float) -> None:
        """Take the joined batch into the running average."""
        self.history.fold(self.factors, decay)

    def requests(self, damping: float) -> list[Tensor]:
        """The diagonal, for a look at its numbers; empty before any statistics.

        Raises:
            FactorError: After ``max_failures`` batches of NaN or Inf in a row.
        """
        return [self.moment.mean()] if self.history.has_statistics() else []

    def install(self, results: Sequence[Parts]) -> None:
        """Nothing is decomposed."""

    def damped(self, damping: float) -> Tensor:
        """The entries f + lambda, ([k,] out, in [+ 1])."""
        return self.moment.mean().reshape(self._shape) + damping

    def turned(self, inner: Tensor, *, squared: bool = False) -> dict[str, Tensor]:
        """A matrix ([k,] out, in [+ 1]) as weight and bias."""
        return self.layer.split(inner)

    def precondition(self, gradients: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        """Return g / (f + lambda), or the gradient before any refresh."""
        if not self.history.ready:
            return {name: gradients[name] for name in self.names}
        gradient = self.layer.matrix(gradients)
        step = gradient.to(self.layer.dtype) / self.damped(damping)
        return self.layer.split(step.to(gradient.dtype))

    def state_dict(self) -> dict[str, Any]:
        """The average, and what happened so far."""
        return {
            "entries": self.moment.value,
            "entries_weight": self.moment.weight,
            **self.history.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a checked state; parts of an unfinished batch are dropped."""
        device = self.layer.device
        self.moment.load(state["entries"].to(device), state["entries_weight"].to(device))
        self.history.load(state)
