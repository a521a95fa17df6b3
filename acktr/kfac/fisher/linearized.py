"""A network as a linear function of its parameters, around a forward pass already made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Metric = Callable[..., Tensor]
"""The output distribution's t^T H t (B,), a function of tangents t, one for each output."""


class Linearized:
    """Products with the Jacobian J = dz / dtheta of some outputs z, without another forward pass.

    One backward pass gives the gradient J^T u for a cotangent u, and keeps how it depends on u.
    That dependence is linear, so that its own derivative gives tangents too (Townsend 2017):

        J v = d/du (v . J^T u)

    With u = dL/dz the gradient is that of a loss L, bit for bit as ``backward`` computes it, and
    the tangents for the trust region cost one more pass. The parameters must not change between.

    Args:
        outputs: z, with their graph, which is kept.
        parameters: By name.
        cotangents: u, one for each output and of its shape.
    """

    def __init__(
        self,
        outputs: Sequence[Tensor],
        parameters: Mapping[str, Tensor],
        cotangents: Sequence[Tensor],
    ) -> None:
        self._outputs, self._parameters = list(outputs), dict(parameters)
        self._cotangents = [cotangent.detach().requires_grad_() for cotangent in cotangents]
        gradients = torch.autograd.grad(
            self._outputs,
            list(parameters.values()),
            self._cotangents,
            create_graph=True,
            allow_unused=True,
        )
        pairs = zip(parameters, gradients, strict=True)
        self._pulled = {name: gradient for name, gradient in pairs if gradient is not None}
        self.gradients = {name: gradient.detach() for name, gradient in self._pulled.items()}
        """J^T u by parameter name, of the parameters that the outputs depend on."""

    def tangents(self, vector: Mapping[str, Tensor]) -> list[Tensor]:
        """J v, one tensor for each output.

        Args:
            vector: v by parameter name; a name that is missing stands for zero.
        """
        named = [name for name in self._pulled if name in vector]
        tangents: Sequence[Tensor | None] = [None] * len(self._cotangents)
        if named:
            tangents = torch.autograd.grad(
                [self._pulled[name] for name in named],
                self._cotangents,
                [vector[name] for name in named],
                retain_graph=True,
                allow_unused=True,
            )
        pairs = zip(tangents, self._cotangents, strict=True)
        return [torch.zeros_like(u) if tangent is None else tangent for tangent, u in pairs]

    def quadratic(self, metric: Metric, vector: Mapping[str, Tensor]) -> Tensor:
        """Quadratic form v^T F v with the exact Fisher F = 1/B sum_b J_b^T H_b J_b of a batch.

        Args:
            metric: Gives H at the outputs.
            vector: v by parameter name.
        """
        return metric(*self.tangents(vector)).mean()

    def product(self, metric: Metric, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """F v by parameter name, as :meth:`quadratic`; H t is the gradient of half t^T H t."""
        tangents = [tangent.detach().requires_grad_() for tangent in self.tangents(vector)]
        curved = torch.autograd.grad(0.5 * metric(*tangents).mean(), tangents)
        names = list(self._pulled)
        parameters = [self._parameters[name] for name in names]
        products = torch.autograd.grad(self._outputs, parameters, curved, retain_graph=True)
        return dict(zip(names, products, strict=True))
