"""Layers of one's own: how their inputs and output gradients are rows of a linear map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from acktr.kfac.blocks.linear import LinearLayout, Shapes, as_matrix, as_parts
from acktr.kfac.config import Sharing
from acktr.kfac.statistics.uses import Use

View = Callable[[Any, Tensor], Tensor]
"""A layer and one of its tensors, seen in another shape."""


def _as_it_is(_layer: nn.Module, tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, kw_only=True)
class LayerRule:
    """A layer of one's own as a linear map g = W a + b of rows, for the ``layers`` of K-FAC.

    The defaults are those of nn.Linear: features are the last dimension, samples the first, and the
    weight is (out, in). A layer whose weight is (in, out) has::

        KFAC(model, layers={Conv1D: LayerRule(matrix=lambda layer, weight: weight.mT,
                                              tensor=lambda layer, matrix: matrix.mT)})

    The first batch is tried out: rows that do not give the gradient of the weight are an error.
    """

    inputs: View = _as_it_is
    """Rows a, (N, ..., in), of the layer's first input tensor."""
    outputs: View = _as_it_is
    """Rows g, (N, ..., out), of the gradient of its output, in the order of the rows a."""
    matrix: View = _as_it_is
    """The weight as a matrix (out, in)."""
    tensor: View = _as_it_is
    """The inverse of ``matrix``."""
    weight: str = "weight"
    """Attribute of the layer that is its weight."""
    bias: str | None = "bias"
    """Attribute that is its bias (out), if there is one."""


Rules = Mapping[type[nn.Module], LayerRule]
"""Rules by the type of the layer."""


def check_rules(rules: Rules, module: nn.Module) -> None:
    """Raise ValueError for a rule that is none, or that no layer of the module is for."""
    for kind, rule in rules.items():
        if not isinstance(kind, type) or not isinstance(rule, LayerRule):
            raise ValueError(f"layers must map types of layers to LayerRule, got {kind}: {rule}")
        layers = [layer for layer in module.modules() if isinstance(layer, kind)]
        if not layers:
            raise ValueError(f"layers names {kind.__name__}, which the module has not")
        if any(layer._parameters.get(rule.weight) is None for layer in layers):
            raise ValueError(f"layers: {kind.__name__} has no parameter {rule.weight!r}")


class RuleLayout:
    """A layer that a :class:`LayerRule` describes.

    Args:
        module: The layer.
        rule: Its rule.
        bias: Whether the bias is in the block.
        sharing: How positions share the weight.

    Raises:
        ValueError: The rule does not give a matrix, or not the weight back.
    """

    def __init__(self, module: nn.Module, rule: LayerRule, bias: bool, sharing: Sharing) -> None:
        self.module = module
        self.rule = rule
        weight = module._parameters[rule.weight]
        assert weight is not None
        self._tried = False
        with torch.no_grad():
            matrix = rule.matrix(module, weight)
            right = matrix.dim() == 2 and torch.equal(rule.tensor(module, matrix), weight)
        if not right:
            raise self._wrong("its matrix must be (out, in), and its tensor the inverse of that")
        self._linear = LinearLayout((len(matrix), matrix.shape[1]), bias, sharing)
        shift = module._parameters.get(rule.bias or "")
        if bias and shift is not None and shift.shape != (len(matrix),):
            raise self._wrong(f"the matrix is {tuple(matrix.shape)}, the bias {tuple(shift.shape)}")

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"the LayerRule of {type(self.module).__name__} does not fit: {what}")

    @property
    def sharing(self) -> Sharing:
        """How positions share the weight."""
        return self._linear.sharing

    @property
    def shapes(self) -> Shapes:
        """(in [+ 1]) and (out) square."""
        return self._linear.shapes

    def _seen(self, use: Use) -> Use:
        """The use as that of a linear map."""
        gradients = (self.rule.outputs(use.module, gradient) for gradient in use.gradients)
        return use.seen_as(self.rule.inputs(use.module, use.input), gradients, use.weights)

    def input_factor(self, uses: Sequence[Use], diagonal: bool) -> tuple[Tensor, float]:
        """Factor A, or its diagonal, as (sum, divisor)."""
        if not self._tried:
            self._try(uses[0])
        return self._linear.input_factor([self._seen(use) for use in uses], diagonal)

    def output_factor(self, uses: Sequence[Use], index: int, diagonal: bool) -> Tensor:
        """Sum over samples for factor G, or for its diagonal."""
        return self._linear.output_factor([self._seen(use) for use in uses], index, diagonal)

    def rows(self, use: Use, index: int) -> tuple[Tensor, Tensor]:
        """Rows a (N, T, in [+ 1]) and g (N, T, out)."""
        if not self._tried:
            self._try(use)
        return self._linear.rows(self._seen(use), index)

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(out, in [+ 1])."""
        return as_matrix(self.rule.matrix(self.module, weight), bias)

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight in its own shape, and the bias (out)."""
        weight, bias = as_parts(matrix, self._linear.bias)
        return self.rule.tensor(self.module, weight).contiguous(), bias

    def _try(self, use: Use) -> None:
        """Compare sum g a^T with the gradient that the layer itself gives, once.

        Raises:
            ValueError: They differ.
        """
        a, g = self._linear.rows(self._seen(use), 0)
        (width, _), (out, _) = self._linear.shapes
        if a.shape[:2] != g.shape[:2] or (g.shape[2], a.shape[2]) != (out, width):
            raise self._wrong(
                f"rows a {tuple(a.shape)} and g {tuple(g.shape)} of a matrix {(out, width)}"
            )
        found = g.flatten(0, 1).mT @ a.flatten(0, 1)
        right = self._gradient(use)
        wanted = right.to(found.dtype)
        error, size = float((found - wanted).norm()), float(wanted.norm())
        narrow = min(torch.finfo(x.dtype).bits for x in (use.gradients[0], a, right))
        if not error <= (1e-6 if narrow == 64 else 0.01 if narrow == 32 else 0.2) * size:
            raise self._wrong(
                "sum g a^T of its rows is not the gradient of the weight"
                f" (relative difference {error / max(size, 1e-300):.2g})"
            )
        self._tried = size > 0

    def _gradient(self, use: Use) -> Tensor:
        """Gradient of the layer's parameters in a forward pass made again, (out, in [+ 1])."""
        names = [
            self.rule.weight,
            *([self.rule.bias] if self._linear.bias and self.rule.bias else []),
        ]
        parameters = [use.module.get_parameter(name) for name in names]
        place = parameters[0]

        def like(leaf: Any) -> Any:  # autocast may have made it narrower
            wide = isinstance(leaf, Tensor) and leaf.is_floating_point()
            return leaf.to(place.dtype) if wide else leaf

        args, kwargs = tree_map(like, (use.call.args, dict(use.call.kwargs)))
        devices = [] if place.device.type == "cpu" else [place.device]
        with torch.random.fork_rng(devices), torch.enable_grad():
            output = use.module(*args, **kwargs)
            output = output if use.part is None else output[use.part]
            cotangent = use.gradients[0].to(output.dtype)
            parts = torch.autograd.grad(output, parameters, cotangent, materialize_grads=True)
        return self.matrix(parts[0], parts[1] if self._linear.bias else None)
