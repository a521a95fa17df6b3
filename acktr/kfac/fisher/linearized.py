"""A network as a linear function of its parameters, around a forward pass already made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


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
        found = torch.autograd.grad(
            self._outputs,
            list(parameters.values()),
            self._cotangents,
            create_graph=True,
            allow_unused=True,
        )
        pairs = zip(parameters, found, strict=True)
        self._pulled = {name: gradient for name, gradient in pairs if gradient is not None}

    @property
    def gradients(self) -> dict[str, Tensor]:
        """J^T u by parameter name, of the parameters that the outputs depend on."""
        return {name: gradient.detach() for name, gradient in self._pulled.items()}

    def tangents(self, vector: Mapping[str, Tensor]) -> list[Tensor]:
        """J v, one tensor for each output.

        Args:
            vector: v by parameter name; a name that is missing stands for zero.
        """
        chosen = [name for name in self._pulled if name in vector]
        found: Sequence[Tensor | None] = [None] * len(self._cotangents)
        if chosen:
            found = torch.autograd.grad(
                [self._pulled[name] for name in chosen],
                self._cotangents,
                [vector[name] for name in chosen],
                retain_graph=True,
                allow_unused=True,
            )
        pairs = zip(found, self._cotangents, strict=True)
        return [torch.zeros_like(u) if tangent is None else tangent for tangent, u in pairs]

    def pulled(self, cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
        """J^T w for other cotangents, by parameter name.

        Args:
            cotangents: w, one for each output and of its shape.
        """
        found = torch.autograd.grad(
            self._outputs,
            [self._parameters[name] for name in self._pulled],
            list(cotangents),
            retain_graph=True,
        )
        return dict(zip(self._pulled, found, strict=True))
