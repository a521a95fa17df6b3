"""The block-tridiagonal curvature of a chain of linear layers, as state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from acktr.kfac.blocks.layouts import LayerFactors, LinearLayout
from acktr.kfac.blocks.tridiagonal import ChainInverse, chain_inverse
from acktr.kfac.config import KFACConfig
from acktr.kfac.linalg import FactorError, Parts, factored_tikhonov
from acktr.kfac.statistics.averages import History, RunningAverage
from acktr.kfac.statistics.capture import Observation


class TridiagonalBlock:
    """A chain of linear layers whose joint curvature has a block-tridiagonal inverse.

    Beside the layers' own factors it keeps E[a_i a_{i+1}^T] and E[g_i g_{i+1}^T] of neighbours
    (Martens & Grosse 2015, section 4.3).

    Args:
        layers: The linear layers in the order of registration, which must be that of the forward
            pass.
        config: Settings.

    Raises:
        ValueError: There are no layers, or some are not linear layers of their own.
    """

    name = "chain"
    method = None
    """A refresh decomposes all matrices together, see :meth:`decompose`."""

    def __init__(self, layers: Sequence[LayerFactors], config: KFACConfig) -> None:
        odd = [x.name for x in layers if not isinstance(x.module, nn.Linear) or len(x.paths) > 1]
        if odd or not layers:
            raise ValueError(
                "structure=tridiagonal needs a chain of linear layers without shared weights, not"
                f" {', '.join(odd) or 'a network without linear layers'}"
            )
        self.layers = list(layers)
        self.paths = tuple(layer.name for layer in layers)
        self.names = tuple(name for layer in layers for name in layer.names)
        a = [len(layer.a.value) for layer in layers]
        g = [len(layer.g.value) for layer in layers]
        first = layers[0]
        pairs = range(len(layers) - 1)
        self.a_cross = [RunningAverage(first.zeros((a[i], a[i + 1]))) for i in pairs]
        self.g_cross = [RunningAverage(first.zeros((g[i], g[i + 1]))) for i in pairs]
        self.inverse = ChainInverse.blank(list(zip(g, a, strict=True)), first.zeros(()))
        self.history = History("chain", config.max_failures, first.device)

    @property
    def factors(self) -> list[RunningAverage]:
        """What a refresh decomposes: own factors A and G, then the cross moments."""
        own = [layer.a for layer in self.layers], [layer.g for layer in self.layers]
        return [*own[0], *own[1], *self.a_cross, *self.g_cross]

    averages = factors
    """All that batches are folded into."""

    # --- statistics -------------------------------------------------------------------------------

    def observe(self, seen: Observation) -> None:
        """Join a part of a batch to all moments.

        Raises:
            ValueError: A layer was not used exactly once, or over several positions.
        """
        rows: list[list[tuple[Tensor, Tensor]]] = []
        for layer in self.layers:
            uses = [use for use in seen.uses if use.module is layer.module]
            if len(uses) != 1 or uses[0].input.dim() != 2:
                raise ValueError(
                    f"structure=tridiagonal needs every layer used once for (N, d) inputs:"
                    f" {layer.name!r} is not"
                )
            layer.observe(uses, seen.weights, seen.count)
            assert isinstance(layer.layout, LinearLayout)
            rows.append([layer.layout.rows(uses[0], i) for i in range(len(seen.weights))])
        for index in range(len(self.a_cross)):
            here, there = rows[index], rows[index + 1]
            inputs = here[0][0][:, 0], there[0][0][:, 0]
            self.a_cross[index].add(inputs[0].mT @ inputs[1], len(inputs[0]))
            pairs = zip(seen.weights, here, there, strict=True)
            parts = ((g[:, 0].mT @ after[:, 0]) * weight for weight, (_, g), (_, after) in pairs)
            self.g_cross[index].add(reduce(torch.add, parts), seen.count)

    def pass_over(self, count: float) -> None:
        """Count a part of a batch in which the layers were not used."""
        for average in (*(layer.g for layer in self.layers), *self.g_cross):
            average.pass_over(count)

    def fold(self, decay: float) -> None:
        """Take the joined batch into the running averages."""
        # Own and cross moments of other samples would not belong to one positive matrix.
        self.history.fold(self.factors, decay)

    # --- decomposition ----------------------------------------------------------------------------

    def requests(self, damping: float) -> list[Tensor]:
        """What the inverse is made of: damped own factors A and G, then the cross moments.

        Raises:
            FactorError: After ``max_failures`` batches of NaN or Inf in a row.
        """
        if not self.history.has_statistics():
            return []
        own = [factored_tikhonov(x.a.mean(), x.g.mean(), damping) for x in self.layers]
        cross = [average.mean() for average in (*self.a_cross, *self.g_cross)]
        return [*(a for a, _ in own), *(g for _, g in own), *cross]

    def decompose(self, matrices: Sequence[Tensor]) -> list[Parts | FactorError]:
        """The inverse of requested matrices, as one decomposition; it touches no state."""
        count, rest = len(self.layers), list(matrices)
        a, g, cross = rest[:count], rest[count : 2 * count], rest[2 * count :]
        try:
            inverse = chain_inverse(a, g, cross[: count - 1], cross[count - 1 :])
        except FactorError as error:
            return [error]
        return [tuple(inverse.tensors())]

    def install(self, results: Sequence[Parts]) -> None:
        """Take a new inverse."""
        self.inverse = ChainInverse.from_tensors(results[0], len(self.layers))

    # --- step -------------------------------------------------------------------------------------

    def precondition(self, gradients: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        """F^-1 g with the damping of the refresh, or the gradient before any."""
        if not self.history.ready:
            return {name: gradients[name] for name in self.names}
        matrices = [layer.matrix(gradients) for layer in self.layers]
        steps = self.inverse.apply([matrix.to(self.layers[0].dtype) for matrix in matrices])
        result: dict[str, Tensor] = {}
        for layer, step in zip(self.layers, steps, strict=True):
            result.update(layer.split(step.to(matrices[0].dtype)))
        return result

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All moments, the possibly stale inverse, and what happened so far."""
        return {
            "moments": [average.value for average in self.factors],
            "weights": [average.weight for average in self.factors],
            "inverse": self.inverse.tensors(),
            **self.history.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a checked state; parts of an unfinished batch are dropped."""
        device = self.layers[0].device
        stored = zip(self.factors, state["moments"], state["weights"], strict=True)
        for average, value, weight in stored:
            average.load(value.to(device), weight.to(device))
        inverse = [tensor.to(device) for tensor in state["inverse"]]
        self.inverse = ChainInverse.from_tensors(inverse, len(self.layers))
        self.history.load(state)
