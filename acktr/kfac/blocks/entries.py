"""The block of a layer with the diagonal of its Fisher, from the gradient of every sample."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

from acktr.kfac.blocks.layouts import LayerFactors
from acktr.kfac.blocks.moment import MomentBlock
from acktr.kfac.config import KFACConfig
from acktr.kfac.statistics.uses import Observation, by_sample


class EntriesBlock(MomentBlock):
    """Weight and bias of a layer whose curvature is the diagonal of its Fisher.

    The entry of weight (i, j) is f_ij = 1/Z sum_n E[(sum_t g_i a_j)^2], squared sample by sample:
    what noisy Adam divides by (Zhang et al. 2018). The step is g / (f + lambda). It needs no
    decomposition and takes the present average at every step, once the first refresh was there.

    Args:
        layer: The layer; its factors are not used.
        config: Settings.
    """

    key = "entries"

    def __init__(self, layer: LayerFactors, config: KFACConfig) -> None:
        self.layer = layer
        self.name, self.paths, self.names = layer.name, layer.paths, layer.names
        self._float64 = config.float64
        a, g = layer.layout.shapes
        self._shape = (*g[:-1], a[-1])
        zero = layer.zeros(self._shape).flatten()
        super().__init__(f"layer {layer.name!r}", zero, config.max_failures)

    def observe(self, seen: Observation) -> None:
        """Join a part of a batch to the statistics."""
        seen = seen.double() if self._float64 else seen
        by_sample(seen.uses, self.name)
        pairs = enumerate(seen.weights)
        squares = (w * self.layer.squares(seen.uses, i, None, None) for i, w in pairs)
        self.moment.add(reduce(torch.add, squares).flatten().to(self.layer.dtype), seen.count)

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
