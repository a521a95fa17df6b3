"""An output with its Jacobian, from the graph of the pass that made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acktr.kfac.fisher.linearized import Linearized
from acktr.kfac.fisher.products import Curved, Vector
from acktr.kfac.linalg import fill_bound
from acktr.kfac.losses.base import OutputLoss
from acktr.kfac.statistics.inputs import Autocast


@dataclass
class Followed:
    """An output with its Jacobian, taken from the graph of the pass that made it."""

    parts: list[Tensor]
    """The output's tensors, detached."""
    tracked: list[int]
    """Places of those that depend on the parameters."""
    several: bool
    """Whether the output is a tuple."""
    linear: Linearized
    """Their Jacobian."""
    lower: float
    """:func:`lower_rounding` of the pass."""

    @classmethod
    def of(
        cls, output: Any, parameters: Mapping[str, Tensor], autocast: Autocast | None
    ) -> Followed | None:
        """The Jacobian of an output; None if it is no tensor or tuple of tensors with a graph."""
        several = isinstance(output, tuple)
        parts = list(output) if several else [output]
        if not all(isinstance(part, Tensor) for part in parts):
            return None
        tracked = [place for place, part in enumerate(parts) if part.requires_grad]
        if not tracked:
            return None
        outputs = [parts[place] for place in tracked]
        linear = Linearized(outputs, parameters, [_cotangent(part) for part in outputs])
        lower = lower_rounding(autocast)
        return cls([part.detach() for part in parts], tracked, several, linear, lower)

    def grams(self, loss: OutputLoss[Any], vectors: Sequence[Vector]) -> Tensor:
        """Quadratic forms of each part of the loss, as :meth:`Curved.grams`.

        Raises:
            RuntimeError: An operation has no second derivative, or none that is right.
        """
        tangents = []
        for vector in vectors:
            filled = [torch.zeros_like(part) for part in self.parts]
            moved = [tangent.detach() for tangent in self.linear.tangents(vector)]
            _check(self.linear.gradients, vector, moved, self.lower)
            for place, tangent in zip(self.tracked, moved, strict=True):
                filled[place] = tangent
            tangents.append(tuple(filled) if self.several else filled[0])
        output = tuple(self.parts) if self.several else self.parts[0]
        return Curved.of(loss, output, tangents).grams(loss)


def _cotangent(output: Tensor) -> Tensor:
    """Numbers u without a pattern, for :func:`_check`."""
    count = torch.arange(output.numel(), device=output.device, dtype=torch.float32)
    return (3 * count).cos().reshape(output.shape).to(output.dtype)


def _check(pulled: Vector, vector: Vector, tangents: Sequence[Tensor], lower: float) -> None:
    """Raise RuntimeError unless u . (J v) = (J^T u) . v up to rounding.

    A torch.autograd.Function whose backward pass is once_differentiable, or leaves the graph, has a
    part of J v missing without any error of torch's.
    """
    products = [(pulled[name] * vector[name]).double() for name in pulled if name in vector]
    if not products:
        return
    eps = torch.finfo(tangents[0].dtype).eps
    direct = torch.stack([product.sum() for product in products]).sum()
    slack = 16 * eps * torch.stack([product.abs().sum() for product in products]).sum()
    pairs = [_cotangent(t).double() * t.double() for t in tangents]
    through = torch.stack([pair.sum() for pair in pairs]).sum()
    if lower:  # rounding of each tangent, which has any sign
        slack += 4 * lower * torch.stack([pair.norm() for pair in pairs]).norm()
    if float((direct - through).abs() - slack - 1e-3 * direct.abs()) > 0:
        raise RuntimeError("the second derivative of the observed pass lacks a part")


def lower_rounding(autocast: Autocast | None) -> float:
    """Relative rounding of the precision that autocast gave a pass; 0 without it."""
    return 0.0 if autocast is None else float(torch.finfo(autocast.dtype).eps)


def same(first: Tensor, second: Tensor, lower: float) -> bool:
    """Whether two outputs are equal up to rounding.

    Args:
        first: Of the observed pass.
        second: Of the module called again.
        lower: Rounding of the lower precision of autocast; 0 without it.
    """
    rounding = max(100 * torch.finfo(first.dtype).eps, 4 * lower)
    return first.shape == second.shape and all(
        bool(off <= rounding * (1 + size)) for off, size in _apart(first, second)
    )


def near(first: Tensor, second: Tensor, lower: float) -> bool:
    """The same as :func:`same`, up to what a batch of another size may round."""
    rounding = max(torch.finfo(first.dtype).eps ** 0.5, 4 * lower)
    return first.shape == second.shape and all(
        bool(off <= rounding * size) for off, size in _apart(first, second)
    )


def _apart(first: Tensor, second: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Norms of the difference of two outputs and of the first, of fills and of the rest.

    Next to the -1e9 or -inf of actions that are not allowed no other number would count.
    """
    off = torch.where(first == second, 0.0, first - second).double()
    size = first.double().where(first.isfinite(), 0.0)
    filled = first < fill_bound(first)
    return [(off[part].norm(), size[part].norm()) for part in (filled, ~filled)]
