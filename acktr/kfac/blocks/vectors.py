"""Blocks that hold the second moment of small gradient vectors as a full matrix or a diagonal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from acktr.kfac.blocks.moment import MomentBlock
from acktr.kfac.blocks.projections import ProjectionBiasRows
from acktr.kfac.blocks.replicas import Replicas
from acktr.kfac.config import KFACConfig
from acktr.kfac.linalg import Parts, Spectrum
from acktr.kfac.statistics.capture import InstanceNorm, StatefulNorm
from acktr.kfac.statistics.elementary import elementary_operations
from acktr.kfac.statistics.uses import Observation, Use, by_sample
from acktr.kfac.tensors import accumulation_type

Norm = nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | StatefulNorm
"""A normalisation with a scale and a shift, or a scale alone."""


def _normalized(use: Use, module: Norm) -> Tensor:
    """The module's output before its scale and shift."""
    inputs = use.input
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return functional.rms_norm(inputs, list(module.normalized_shape), eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(inputs, module.num_groups, eps=module.eps)
    if use.moments is None and isinstance(module, InstanceNorm):
        return functional.instance_norm(inputs, eps=module.eps)
    if use.moments is None:
        return functional.batch_norm(inputs, None, None, training=True, eps=module.eps)
    return functional.batch_norm(inputs, *use.moments, eps=module.eps)


class NormRows:
    """Per-sample gradients of a normalisation's scale and shift, (sum_t xhat g, sum_t g).

    In a training forward pass of BatchNorm the samples share their statistics; the gradients taken
    here are those with the statistics held fixed.
    """

    def __init__(self, weight: bool, bias: bool) -> None:
        self.weight = weight
        self.bias = bias

    def rows(self, use: Use, index: int) -> Tensor:
        """Gradients (N, C), (N, 2 C) with both scale and shift."""
        module = use.module
        assert isinstance(module, Norm)
        gradient = use.gradients[index]
        parts = []
        if self.weight:
            parts.append(self._sum(_normalized(use, module) * gradient, module))
        if self.bias:
            parts.append(self._sum(gradient, module))
        return torch.cat(parts, dim=1)

    def _sum(self, product: Tensor, module: Norm) -> Tensor:
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            kept = len(module.normalized_shape)
            product = product.reshape(len(product), -1, *product.shape[product.dim() - kept :])
            return product.sum(1, dtype=accumulation_type(product)).flatten(1)
        if product.dim() <= 2:
            return product
        return product.flatten(2).sum(2, dtype=accumulation_type(product))


class SlopeRows:
    """Per-sample gradients of the slopes of PReLU, sum_t min(x, 0) g over a channel or over all."""

    def rows(self, use: Use, index: int) -> Tensor:
        """Gradients (N, C), (N, 1) with one slope."""
        module, gradient = use.module, use.gradients[index]
        assert isinstance(module, nn.PReLU)
        product = use.input.clamp(max=0) * gradient
        kind = accumulation_type(product)
        if module.num_parameters == 1:
            return product.reshape(len(product), -1).sum(1, keepdim=True, dtype=kind)
        return product if product.dim() == 2 else product.flatten(2).sum(2, dtype=kind)


class BiasRows:
    """Per-sample gradients of a layer's bias, sum_t g."""

    def rows(self, use: Use, index: int) -> Tensor:
        """Gradients (N, out)."""
        gradient = use.gradients[index]
        if isinstance(use.module, Replicas):
            return gradient.flatten(1)
        if isinstance(use.module, nn.Linear):
            rows = gradient.reshape(len(gradient), -1, gradient.shape[-1])
            return rows.sum(1, dtype=accumulation_type(rows))
        return gradient.flatten(2).sum(2, dtype=accumulation_type(gradient))


class ExampleRows:
    """Per-sample gradients of any parameters, by vectorised backward passes of the whole module.

    A module that torch cannot vectorise (nn.LSTM, nn.GRU and nn.RNN) is called for one sample after
    the other.

    The module must treat samples independently (no BatchNorm in training mode, no dropout). Input
    tensors with the batch's leading dimension, also in lists and dicts, are taken sample by sample;
    all others are shared.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self.module = module
        self.names = tuple(names)

    def rows(self, use: Use, index: int) -> Tensor:
        """Gradients (N, P), in the order of the names.

        Raises:
            ValueError: The module, or its output, cannot be taken sample by sample.
        """
        if any(isinstance(m, _BatchNorm) and _of_batch(m) for m in self.module.modules()):
            raise _apart("BatchNorm must be in eval mode")
        tensors = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        chosen = {name: tensors.pop(name) for name in self.names}

        use.call.check_unchanged("the module")
        whole, rebuilt = use.call.by_sample(len(use.gradients[index]))

        def one(cotangent: Tensor, *samples: Tensor) -> Tensor:
            call = rebuilt(sample[None] for sample in samples)

            def forward(values: dict[str, Tensor]) -> Tensor:
                everything = {**tensors, **values}
                output = functional_call(self.module, everything, call.args, dict(call.kwargs))
                found: Tensor = output if use.part is None else output[use.part]
                return found

            output, pull = vjp(forward, chosen)[:2]
            if output.shape != cotangent[None].shape:
                raise _apart("inputs and outputs must have the samples as leading dimension")
            (found,) = pull(cotangent[None].to(output.dtype))
            return torch.cat([found[name].flatten() for name in self.names])

        rows = use.gradients[index], *whole
        with elementary_operations():
            try:
                return vmap(one)(*rows)
            except (_ApartError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                if "randomness" in str(error):
                    raise _apart("dropout must be in eval mode") from error
            try:  # as nn.LSTM needs
                return torch.stack([one(*row) for row in zip(*rows, strict=True)])
            except (_ApartError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise _apart(f"called for one sample alone it raises {reason:.200}") from error


class _ApartError(ValueError):
    """A module does not take every sample by itself."""


def _of_batch(module: _BatchNorm) -> bool:
    return module.training or module.running_mean is None


def _apart(what: str) -> _ApartError:
    return _ApartError(
        f"small_parameters needs a module that takes every sample by itself: {what}"
        ' (or small_parameters="diagonal")'
    )


RowSource = NormRows | SlopeRows | BiasRows | ProjectionBiasRows | ExampleRows
"""What gives the per-sample gradients (N, P) of a block's parameters, for each scalar."""


class VectorBlock(MomentBlock):
    """Parameters whose curvature is the second moment of their per-sample gradient.

    Exact for any number of uses and positions, as the gradient is summed over them first. The full
    matrix inverts as U = Q [(Q^T g) / (s + lambda)], the diagonal as g / (d + lambda).

    Args:
        name: Name for messages and states.
        names: The parameters, in the order of a row.
        parameters: Their tensors.
        source: Where rows come from.
        paths: Records that the rows are made of; each use is a row, uses of one sample are summed.
        config: Settings; above ``dense_limit`` the diagonal alone is kept.
    """

    def __init__(
        self,
        name: str,
        names: Sequence[str],
        parameters: Sequence[Tensor],
        source: RowSource,
        paths: Sequence[str],
        config: KFACConfig,
    ) -> None:
        self.name = name
        self.names = tuple(names)
        self.paths = tuple(paths)
        self._shapes = [parameter.shape for parameter in parameters]
        self._sizes = [shape.numel() for shape in self._shapes]
        self._source = source
        size = sum(self._sizes)
        self.diagonal = size > config.dense_limit
        place = parameters[0]
        self.dtype = accumulation_type(place)
        shape = (size,) if self.diagonal else (size, size)
        zero = torch.zeros(shape, dtype=self.dtype, device=place.device)
        super().__init__(f"block {name!r}", zero, config.max_failures)
        self.spectrum = Spectrum.blank(zero)

    def observe(self, seen: Observation) -> None:
        """Join a part of a batch to the statistics; all uses must have one batch size."""
        apart = by_sample(seen.uses, self.name)
        parts = []
        for index, weight in enumerate(seen.weights):
            parts_of = [use.by_owner(self._source.rows(use, index)) for use in seen.uses]
            rows = torch.stack(parts_of).sum(0)
            rows = rows.to(self.dtype)
            rows = rows if apart else rows.sum(0, keepdim=True)
            parts.append(weight * (rows.square().sum(0) if self.diagonal else rows.mT @ rows))
        self.moment.add(reduce(torch.add, parts), seen.count)

    def install(self, results: Sequence[Parts]) -> None:
        """Take a new decomposition."""
        self.spectrum = Spectrum(*results[0])

    def precondition(self, gradients: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        """(F + lambda)^-1 g, or the gradient before any refresh; nothing is factored here."""
        mine = [gradients[name] for name in self.names]
        if not self.history.ready:
            return dict(zip(self.names, mine, strict=True))
        flat = torch.cat([gradient.flatten() for gradient in mine])
        return self._split(self._solve(flat.to(self.dtype), damping).to(flat.dtype))

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
        parts = zip(self.names, torch.split(flat, self._sizes), self._shapes, strict=True)
        return {name: part.reshape(shape) for name, part, shape in parts}

    def damped(self, damping: float) -> Tensor:
        """Eigenvalues of F + lambda in the basis of :meth:`turned`, after the first refresh."""
        return self.spectrum.values + damping

    def turned(self, inner: Tensor, *, squared: bool = False) -> dict[str, Tensor]:
        """Coefficients in the eigenbasis as parameters; variances with ``squared``."""
        vectors = self.spectrum.vectors
        if vectors is None:
            return self._split(inner)
        return self._split((vectors.square() if squared else vectors) @ inner)

    def _solve(self, flat: Tensor, damping: float) -> Tensor:
        values, vectors = self.spectrum
        if vectors is None:
            return flat / (values + damping)
        return vectors @ ((vectors.mT @ flat) / (values + damping))

    def state_dict(self) -> dict[str, Any]:
        """Second moment, the possibly stale decomposition, and what happened so far."""
        basis = [part for part in self.spectrum if part is not None]
        return super().state_dict() | {"basis": basis}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a checked state; parts of an unfinished batch are dropped."""
        super().load(state)
        device = self.moment.value.device
        self.spectrum = Spectrum(*(part.to(device) for part in state["basis"]))
