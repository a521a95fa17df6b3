"""Capture of layer inputs and output gradients inside an explicit context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge


@dataclass
class LayerRecord:
    """What one layer saw: one entry per use of the layer in the forward pass."""

    inputs: list[Tensor] = field(default_factory=list)
    """Detached inputs."""
    shapes: list[torch.Size] = field(default_factory=list)
    """Shapes of the outputs."""
    edges: list[GradientEdge] = field(default_factory=list)
    """Where the gradient of each output appears in the autograd graph."""


class Capture:
    """Records of one forward pass.

    A forward hook keeps each layer's input and the *gradient edge* of its output, the place in the
    autograd graph at which the gradient of that output appears. An edge is fixed when the layer
    returns, so that a later in-place activation does not disturb it, a layer used twice has two,
    and any number of backward passes may follow. The pass of :meth:`output_gradients` asks autograd
    for those edges alone: no weight gradient is computed in it and no ``.grad`` is touched.
    """

    def __init__(self) -> None:
        self.layers: dict[str, LayerRecord] = {}

    def _hook(
        self, name: str
    ) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
        record = self.layers.setdefault(name, LayerRecord())

        def hook(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            if output.requires_grad:
                record.inputs.append((args[0] if args else kwargs["input"]).detach())
                record.shapes.append(output.shape)
                # nn.Linear returns a view for (N, T, in); an in-place operation on a view cuts the
                # view's own node out of the graph, but not that of the tensor underneath.
                base = output._base if output._is_view() else None
                record.edges.append(get_gradient_edge(output if base is None else base))

        return hook

    def output_gradients(self, loss: Tensor) -> dict[str, list[Tensor | None]]:
        """Gradients of a scalar with respect to every recorded output, the graph kept.

        Args:
            loss: A scalar computed from the recorded forward pass.

        Returns:
            Per layer name one gradient per use, None where the loss does not depend on it.
        """
        edges = [edge for record in self.layers.values() for edge in record.edges]
        if not edges:
            return {}
        found = iter(torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True))
        return {
            name: [None if (g := next(found)) is None else g.reshape(shape) for shape in rec.shapes]
            for name, rec in self.layers.items()
        }


@contextmanager
def capture(modules: Mapping[str, nn.Module]) -> Iterator[Capture]:
    """Record the named modules during the forward passes inside the context only."""
    record = Capture()
    handles = [
        module.register_forward_hook(record._hook(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
