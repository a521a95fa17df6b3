"""Capture of layer inputs and output gradients inside an explicit context."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from acktr.kfac.losses.likelihoods import OutputLoss
from acktr.kfac.statistics.averages import Moments, Observation, Use
from acktr.kfac.statistics.inputs import Inputs

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DIMENSIONS: dict[type[nn.Module], int] = {
    nn.Linear: 2,
    nn.Embedding: 2,
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
}
"""Least number of dimensions of an output over a batch."""


@dataclass
class LayerRecord:
    """What one layer saw: one entry per use of the layer in the forward pass."""

    module: nn.Module
    """The layer."""
    calls: list[Inputs] = field(default_factory=list)
    """Detached inputs."""
    shapes: list[torch.Size] = field(default_factory=list)
    """Shapes of the outputs."""
    edges: list[GradientEdge] = field(default_factory=list)
    """Where the gradient of each output appears in the autograd graph."""
    parts: list[int | None] = field(default_factory=list)
    """Place of each output in the tuple that the layer returned; None outside of a tuple."""
    moments: list[Moments | None] = field(default_factory=list)
    """Running mean and variance that a batch normalisation used; None for those of the batch."""

    @property
    def args(self) -> list[tuple[Tensor, ...]]:
        """The tensors among the inputs."""
        return [call.tensors() for call in self.calls]


@dataclass(frozen=True)
class Observed:
    """Inputs and loss of the last observation, for products with the exact Fisher."""

    call: Inputs | None
    loss: OutputLoss[Any]

    @property
    def inputs(self) -> Inputs:
        """The inputs of the whole module; raises ValueError if it was not called."""
        if self.call is None:
            raise ValueError(
                "the exact Fisher needs the inputs of the whole module, but only submodules were"
                " called inside capture(): call the module itself"
            )
        return self.call


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
        self.inputs: Inputs | None = None
        """Inputs of the whole module in the last forward pass, detached."""

    def _hook(
        self, name: str, module: nn.Module
    ) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
        record = self.layers.setdefault(name, LayerRecord(module))

        def hook(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Any:
            several = isinstance(output, tuple)
            if several:
                output = _separated(output)
            elif not isinstance(output, Tensor):
                raise ValueError(
                    "small_parameters needs a module that returns a tensor or a tuple of tensors,"
                    f' got {type(output).__name__} (or small_parameters="gradient")'
                )
            call = Inputs.of(args, kwargs)
            for place, part in enumerate(output if several else (output,)):
                if not isinstance(part, Tensor) or not part.requires_grad:
                    continue
                record.calls.append(call)
                record.moments.append(_moments(module))
                record.shapes.append(part.shape)
                record.edges.append(get_gradient_edge(part if several else _underneath(part)))
                record.parts.append(place if several else None)
            return output

        return hook

    def _keep_inputs(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.inputs = Inputs.of(args, kwargs)

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


def _separated(output: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same tuple, of clones: none of them leads to another, as hidden units and a head do.

    A gradient with respect to one of them is then that of its own direct use alone.
    """
    kind: Any = type(output)
    parts = [
        part.clone() if isinstance(part, Tensor) and part.requires_grad else part for part in output
    ]
    made: tuple[Any, ...] = kind(*parts) if hasattr(kind, "_fields") else kind(parts)
    return made


def _moments(module: nn.Module) -> Moments | None:
    """What a batch normalisation normalises with now: copies, as training moves them on."""
    if not isinstance(module, _BATCH_NORMS) or module.training:
        return None
    mean, variance = module.running_mean, module.running_var
    return None if mean is None or variance is None else (mean.clone(), variance.clone())


def _check_batched(path: str, module: nn.Module, gradient: Tensor) -> None:
    """Raise ValueError for a layer's output that has no leading dimension of samples."""
    least = _DIMENSIONS.get(type(module), 1)
    if isinstance(module, nn.LayerNorm):
        least = 1 + len(module.normalized_shape)
    if gradient.dim() < least:
        raise ValueError(
            f"K-FAC layer {path!r} ({type(module).__name__}) must be called with a batch (N, ...):"
            f" its output has the shape {tuple(gradient.shape)} without N"
        )


def _underneath(output: Tensor) -> Tensor:
    """The tensor that an output is a reshaped view of, or else the output itself.

    nn.Linear returns a view for (N, T, in); an in-place operation on a view cuts the view's own
    node out of the graph, but not that of the tensor underneath.
    """
    base = output._base if output._is_view() else None
    if base is None or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


@contextmanager
def capture(modules: Mapping[str, nn.Module], root: nn.Module | None = None) -> Iterator[Capture]:
    """Record the named modules during the forward passes inside the context only.

    Args:
        modules: Layers by name.
        root: The module whose inputs are kept as :attr:`Capture.inputs`.
    """
    record = Capture()
    handles = [
        module.register_forward_hook(record._hook(name, module), with_kwargs=True)
        for name, module in modules.items()
    ]
    if root is not None:
        handles.append(root.register_forward_pre_hook(record._keep_inputs, with_kwargs=True))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def sample_rows(count: int, fraction: float, turn: int) -> slice | None:
    """Rows of a batch that make up a fraction of it: every k-th one, k = round(1 / fraction).

    To run only these through :func:`capture` makes K-FAC's statistics cheaper.

    Args:
        count: Samples in the batch.
        fraction: Part of them that is wanted, in (0, 1].
        turn: Number of the batch; each one begins with another sample.

    Returns:
        The rows; None if they are all.
    """
    every = max(1, round(1 / fraction))
    return None if every == 1 else slice(turn % min(every, count), None, every)


@dataclass(frozen=True)
class Gradients:
    """Output gradients of the curvature scalars over one forward pass."""

    captured: Capture
    scalars: list[dict[str, list[Tensor | None]]]
    """Per scalar and layer, one gradient per use."""
    weights: list[float]
    """w_c of each scalar."""
    divisor: float | Literal["samples", "sum"]
    """Z of this part of the batch: a number, the number of samples, or none for a sum."""

    def observation(self, paths: Iterable[str]) -> Observation:
        """What a block of these layers sees; uses that no scalar depends on are left out."""
        uses, samples = [], 0
        for path in paths:
            record = self.captured.layers[path]
            for place, call in enumerate(record.calls):
                mine = [scalar[path][place] for scalar in self.scalars]
                some = next((gradient for gradient in mine if gradient is not None), None)
                if some is None or not len(some):
                    continue
                _check_batched(path, record.module, some)
                samples = len(some)
                filled = tuple(torch.zeros_like(some) if g is None else g for g in mine)
                part, moments = record.parts[place], record.moments[place]
                uses.append(Use(record.module, call, filled, part, moments))
        if self.divisor == "samples":
            return Observation(uses, self.weights, samples)
        # Samples that passed the block by are in Z all the same: their gradient is zero.
        return Observation(uses, self.weights, 0.0 if self.divisor == "sum" else self.divisor)
