"""Capture of layer inputs and output gradients inside an explicit context, for the blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from acktr.kfac.statistics.generators import RandomState
from acktr.kfac.statistics.inputs import Autocast, Inputs
from acktr.kfac.statistics.outputs import tensors
from acktr.kfac.statistics.owners import Rows, found, probes
from acktr.kfac.statistics.projections import Projection, reporting
from acktr.kfac.statistics.samples import Samples, check_batched, leading, placed
from acktr.kfac.statistics.uses import LinearMap, Moments, Observation, Use
from acktr.kfac.tensors import parts_of

InstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d
StatefulNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | InstanceNorm
"""Normalisations that may keep a running mean and variance."""
ROOT = "<module>"
"""Name of the record of the whole module."""
OutputGradients = dict[str, list[Tensor | None]]
"""By layer one gradient for each use; None where the scalar does not depend on it."""
Divisor = float | Literal["samples", "sum"]
"""Z of a part of a batch: a number, that of the samples, or none for a sum."""

_GRAPHS = {
    "a second time": "the graph of the output is gone: observe() before backward(), which frees it",
    "does not require grad": "the output has no graph: give observe() that of the pass"
    " inside capture(), not detached",
}
"""What torch's errors say here, by a part of theirs."""


@dataclass(frozen=True)
class Call:
    """One use of a layer in a recorded pass, or one tensor of those that it returned."""

    inputs: Inputs
    """Detached inputs."""
    shape: torch.Size
    """Shape of the output."""
    edge: GradientEdge
    """Where the gradient of the output appears in the autograd graph."""
    part: int | None
    """Place of the output in the tuple that the layer returned; None outside of a tuple."""
    moments: Moments | None
    """Running mean and variance that a normalisation used; None for those of its input."""
    turn: int
    """Number of the call among those of all layers."""
    valid: Tensor | None = None
    """Positions (N, ...) of the input that are not padding; None for all."""


@dataclass(frozen=True)
class LayerRecord:
    """What one layer saw."""

    module: nn.Module
    """The layer."""
    calls: list[Call] = field(default_factory=list)
    """Its uses in the forward pass."""


@dataclass
class Capture:
    """Records of one forward pass.

    A forward hook keeps each layer's input and the *gradient edge* of its output, the place in the
    autograd graph at which the gradient of that output appears. An edge is fixed when the layer
    returns, so that a later in-place activation does not disturb it, a layer used twice has two,
    and any number of backward passes may follow. The pass of :meth:`output_gradients` asks autograd
    for those edges, and for parameters without a layer's block: no gradient of another weight is
    computed in it and no ``.grad`` is touched.
    """

    layers: dict[str, LayerRecord] = field(default_factory=dict)
    inputs: Inputs | None = None
    """Inputs of the whole module in the last forward pass, detached."""
    random: RandomState | None = None
    """State of the random generators at the beginning."""
    autocast: Autocast | None = None
    """What autocast was in the last forward pass; None without it."""
    turns: int = 0
    """Calls recorded so far."""
    outputs: list[int] | None = None
    """Identities of the output that a whole batch was observed with."""
    returned: list[Any] = field(default_factory=list)
    """What the whole module returned, one entry for every call."""

    def _record(self, name: str, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        several = isinstance(output, tuple)
        if several:
            output = _separated(output)
        elif not isinstance(output, Tensor):
            got = f"a tensor or a tuple of tensors, got {type(output).__name__}"
            if name != ROOT:
                raise ValueError(f"the LayerRule layer {name!r} must return {got}")
            raise ValueError(
                f'small_parameters="dense" needs a module that returns {got}'
                ' (or small_parameters="diagonal")'
            )
        record, inputs = self.layers[name], Inputs.of(args, kwargs)
        for place, part in enumerate(output if several else (output,)):
            if isinstance(part, Tensor) and part.requires_grad:
                where, root = (place, part) if several else (None, _underneath(part))
                self._keep(record, inputs, part, where, root)
        return output

    def _report(self, records: Mapping[str, LayerRecord], seen: LinearMap) -> None:
        """Keep uses of a projection."""
        record = records.get(seen.key)
        if record is None:
            return
        inputs = Inputs.of((seen.given,))
        for part, output in enumerate(seen.outputs, seen.first):
            if output.requires_grad:
                self._keep(record, inputs, output, part, _underneath(output), seen.valid)

    def _keep(
        self,
        record: LayerRecord,
        inputs: Inputs,
        output: Tensor,
        part: int | None,
        root: Tensor,
        valid: Tensor | None = None,
    ) -> None:
        if computed_again():
            return
        edge, moments = get_gradient_edge(root), _moments(record.module)
        self.turns += 1
        record.calls.append(Call(inputs, output.shape, edge, part, moments, self.turns, valid))

    def _keep_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not computed_again():
            self.inputs, self.autocast = Inputs.of(args, kwargs), Autocast.now(module)

    def _keep_output(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if not computed_again():
            self.returned.append(output)

    def sizes(self) -> frozenset[int]:
        """First dimensions of the tensors that the whole module returned."""
        parts = (tensor for _, tensor in tensors(self.returned))
        return frozenset(len(part) for part in parts if part.dim())

    def output_gradients(
        self, loss: Tensor, parameters: Mapping[str, Tensor] | None = None
    ) -> OutputGradients:
        """Gradients of a scalar with respect to every recorded output, the graph kept.

        Args:
            loss: A scalar computed from the recorded forward pass.
            parameters: Trainable tensors by name whose own gradients the same pass gives.

        Returns:
            Per layer name one gradient per use, and one per parameter name; None where the loss
            does not depend on it.
        """
        wanted = parameters or {}
        asked: list[GradientEdge | Tensor] = [
            *(call.edge for record in self.layers.values() for call in record.calls),
            *wanted.values(),
        ]
        if not asked:
            return {name: [] for name in self.layers}
        given: Any = asked  # autograd takes both kinds together, though its stubs say otherwise
        try:
            found = iter(torch.autograd.grad(loss, given, retain_graph=True, allow_unused=True))
        except RuntimeError as error:
            reasons = [reason for part, reason in _GRAPHS.items() if part in str(error)]
            if not reasons:
                raise
            raise ValueError(reasons[0]) from error
        outputs: OutputGradients = {
            name: [_shaped(next(found), call.shape) for call in record.calls]
            for name, record in self.layers.items()
        }
        return outputs | {name: [next(found)] for name in wanted}

    def owners(self, output: Any, batch: Samples) -> Samples:
        """What is known of the samples, with the sample of every row of the layers' outputs.

        Args:
            output: The loss's output, a tensor or a tuple of tensors of one length.
            batch: What is known so far.
        """
        parts = parts_of(output)
        count = len(parts[0])
        plain, coded = (self.output_gradients(probe) for probe in probes(parts))
        given = [g for uses in plain.values() for g in uses if g is not None]
        if any(count * 64 * torch.finfo(g.dtype).eps > 1 for g in given):
            return batch  # codes that rounding would blur
        owners: dict[str, list[Rows]] = {}
        for path, record in self.layers.items():
            pairs = zip(plain[path], coded[path], strict=True)
            owners[path] = [
                None
                if g is None or h is None
                else found(g, h, leading(record.module, g.shape), count)
                for g, h in pairs
            ]
        return replace(batch, owners=owners, count=count)

    def observation(
        self,
        paths: Iterable[str],
        scalars: Sequence[tuple[OutputGradients, float]],
        divisor: Divisor,
        batch: Samples,
    ) -> Observation:
        """What a block sees; uses that no scalar depends on are left out.

        Args:
            paths: The layers of the block.
            scalars: Output gradients of each scalar, and its weight w_c.
            divisor: Z of this part of the batch.
            batch: What is known of the samples.
        """
        uses, samples = [], 0
        for path in paths:
            record = self.layers[path]
            for place, call in enumerate(record.calls):
                mine = [gradients[path][place] for gradients, _ in scalars]
                some = next((gradient for gradient in mine if gradient is not None), None)
                if some is None or not len(some):
                    continue
                check_batched(path, record.module, some)
                filled = tuple(torch.zeros_like(some) if g is None else g for g in mine)
                own = call.part, call.moments, call.turn, path
                owners = batch.owners.get(path)
                rows = None if owners is None else owners[place]
                use = Use(record.module, call.inputs, filled, *own, weights=call.valid)
                use = placed(use, batch.of_use(path, place), rows, owners is not None)
                samples = len(use.gradients[0])
                uses.append(use)
        weights = [weight for _, weight in scalars]
        if divisor == "samples":
            return Observation(uses, weights, samples)
        # Samples that passed the block by are in Z all the same: their gradient is zero.
        return Observation(uses, weights, 0.0 if divisor == "sum" else divisor)


def part_size(scalars: Sequence[tuple[OutputGradients, float]], divisor: Divisor) -> float:
    """What a part of a batch adds to Z; 0 for a sum over the batch.

    Raises:
        ValueError: It is the number of samples, in which the outputs of the layers do not agree.
    """
    if divisor != "samples":
        return 0.0 if divisor == "sum" else divisor
    uses = (use for gradients, _ in scalars for use in gradients.values())
    sizes = {len(gradient) for use in uses for gradient in use if gradient is not None}
    if len(sizes) != 1:
        raise ValueError(
            "parameters outside of layers need the number of samples, which the layers' outputs do"
            f" not tell (they have the lengths {sorted(sizes)}): give update_curvature samples=N"
        )
    return float(sizes.pop())


def _shaped(gradient: Tensor | None, shape: torch.Size) -> Tensor | None:
    """A gradient in the shape of its output; itself where it has that, as uses may share it."""
    return gradient if gradient is None or gradient.shape == shape else gradient.reshape(shape)


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
    """Running moments that a module normalises with now: copies, as training moves them on."""
    if not isinstance(module, StatefulNorm) or module.training:
        return None
    mean, variance = module.running_mean, module.running_var
    return None if mean is None or variance is None else (mean.clone(), variance.clone())


def computed_again() -> bool:
    """Whether a backward pass runs, for which a checkpoint computes its part again."""
    return torch._C._current_graph_task_id() != -1


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
def capture(
    modules: Mapping[str, nn.Module | Projection], root: nn.Module | None = None
) -> Iterator[Capture]:
    """Record the named modules during the forward passes inside the context only.

    Of modules with hooks of their own the inputs are those after them, the outputs those before.

    Args:
        modules: Layers, and projections inside of modules, by name.
        root: The module whose inputs are kept as :attr:`Capture.inputs`.
    """
    record = Capture()
    fused: dict[nn.Module, dict[str, LayerRecord]] = {}
    with ExitStack() as stack:
        for name, part in modules.items():
            if isinstance(part, Projection):
                layer = LayerRecord(part.module)
                fused.setdefault(part.module, {})[part.key] = layer
            else:
                layer = LayerRecord(part)
                keep = partial(record._record, name)
                stack.callback(
                    part.register_forward_hook(keep, prepend=True, with_kwargs=True).remove
                )
            record.layers[name] = layer
        for module, layers in fused.items():
            stack.enter_context(reporting(module, partial(record._report, layers)))
        if root is not None:
            whole = root.register_forward_pre_hook(
                record._keep_inputs, prepend=True, with_kwargs=True
            )
            stack.callback(whole.remove)
            keep_output = root.register_forward_hook(record._keep_output)
            stack.callback(keep_output.remove)
        yield record


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
