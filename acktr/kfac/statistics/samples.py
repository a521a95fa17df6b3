"""Where a layer's output holds the samples of a batch, and what its rows weigh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_ROWS = (
    *(nn.Linear, nn.Embedding, nn.MultiheadAttention),
    *(nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell),
)
"""Modules of linear maps, whose outputs have one vector for each position."""


@dataclass(frozen=True)
class Samples:
    """What is known of the samples of one batch."""

    sizes: frozenset[int] = frozenset()
    """Numbers of samples of the outputs, one as a rule; none if nothing is known."""
    weights: Sequence[Tensor] = ()
    """Weights (N, ...) of the loss's terms, for each of its parts that has some."""

    def dimension(self, module: nn.Module, shape: torch.Size) -> int | None:
        """Dimension of a layer's output that holds the samples; None if it cannot be seen.

        It is the first one if that has their number. Otherwise it is another one that alone has it,
        as in a layer that sees (T, N, D), unless the first is a multiple of it, as in windows
        (k N, T, D).
        """
        if not self.sizes or shape[0] in self.sizes:
            return 0
        if any(shape[0] % size == 0 for size in self.sizes):
            return None
        places = [d for d in range(1, _leading(module, shape)) if shape[d] in self.sizes]
        return places[0] if len(places) == 1 else None

    def row_weights(self, module: nn.Module, gradients: Sequence[Tensor]) -> Tensor | None:
        """Weights of a layer's inputs in its factor A, for the first of the leading dimensions.

        A row counts as its term does. One whose term has the weight zero counts with the mean
        weight if a gradient reaches it, as a token without a label that others attend to.

        Args:
            module: The layer.
            gradients: Gradient (N, ...) of every curvature scalar by the layer's output.

        Returns:
            None where no weights fit.
        """
        shape = gradients[0].shape[: _leading(module, gradients[0].shape)]
        depths = [_common(weights.shape, shape) for weights in self.weights]
        deepest = max(depths, default=0)
        if deepest == 0:
            return None
        weights = _reduced(self.weights[depths.index(deepest)], deepest)
        reached = torch.stack([(g != 0).flatten(deepest).any(-1) for g in gradients]).any(0)
        return weights.where(weights > 0, reached * weights[weights > 0].mean())


def _leading(module: nn.Module, shape: torch.Size) -> int:
    """Number of dimensions of a layer's output before those of one position."""
    if isinstance(module, _ROWS):
        return len(shape) - 1
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return len(shape) - len(module.normalized_shape)
    return 1


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of first dimensions that are the same."""
    pairs = list(zip(first, second, strict=False))
    return next((d for d, (a, b) in enumerate(pairs) if a != b), len(pairs))


def _reduced(weights: Tensor, depth: int) -> Tensor:
    """Mean of the positive weights over all dimensions from the given one on."""
    flat = weights.reshape(*weights.shape[:depth], -1)
    return flat.sum(-1) / (flat > 0).sum(-1).clamp(min=1)
