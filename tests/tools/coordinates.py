"""Other coordinates for the inputs and outputs of layers, for the tests of invariance."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.tools.kfac import randn


class Affine(nn.Module):
    """X -> M x + c over dimension 1, with fixed M and c."""

    matrix: Tensor
    shift: Tensor

    def __init__(self, matrix: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        moved = torch.tensordot(x, self.matrix, ([1], [1])).movedim(-1, 1)
        result: Tensor = moved + self.shift.reshape(-1, *[1] * (x.dim() - 2))
        return result


@dataclass(frozen=True)
class Coordinates:
    """The coordinates of one layer: abar' = (M a + c, 1), s = Phi s' + d."""

    m: Tensor
    c: Tensor
    phi: Tensor
    d: Tensor

    @classmethod
    def identity(cls, inputs: int, outputs: int) -> Coordinates:
        zero = torch.zeros(inputs + outputs, dtype=torch.float64)
        eye = torch.ones_like(zero)
        return cls(eye[:inputs].diag(), zero[:inputs], eye[:outputs].diag(), zero[:outputs])

    @classmethod
    def drawn(cls, inputs: int, outputs: int, seed: int) -> Coordinates:
        """Some matrices that are neither orthogonal nor badly conditioned, and shifts."""
        return cls(
            matrix(inputs, seed),
            randn(inputs, seed=seed + 1),
            matrix(outputs, seed + 2),
            randn(outputs, seed=seed + 3),
        )

    def omega(self, positions: int) -> Tensor:
        """Omega on a layer's inputs, those of a kernel of several positions channel by channel."""
        big = torch.kron(self.m, torch.eye(positions, dtype=self.m.dtype))
        shift = self.c.repeat_interleave(positions)
        last = torch.zeros(1, len(big) + 1, dtype=big.dtype)
        last[0, -1] = 1
        return torch.cat([torch.cat([big, shift[:, None]], 1), last])

    def weights(self, layer: nn.Module) -> Tensor:
        """W' of a layer's W."""
        w = joined(layer)
        w = torch.cat([w[:, :-1], w[:, -1:] - self.d[:, None]], 1)
        return self.step(w)

    def step(self, u: Tensor) -> Tensor:
        """Phi^-1 U Omega^-1."""
        positions = (u.shape[1] - 1) // len(self.c)
        left = torch.linalg.solve(self.phi, u)
        result: Tensor = torch.linalg.solve(self.omega(positions), left, left=False)
        return result


def matrix(size: int, seed: int) -> Tensor:
    """U diag(s) V^T with singular values from 1/2 to 2."""
    left = torch.linalg.qr(randn(size, size, seed=seed))[0]
    right = torch.linalg.qr(randn(size, size, seed=seed + 50))[0]
    values = 2 ** torch.linspace(-1, 1, size, dtype=torch.float64)
    result: Tensor = (left * values) @ right.mT
    return result


def layers(model: nn.Sequential) -> list[nn.Linear | nn.Conv2d]:
    return [layer for layer in model if isinstance(layer, nn.Linear | nn.Conv2d)]


def widths(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def joined(layer: nn.Module) -> Tensor:
    """The (out, in + 1) matrix of a layer."""
    weight, bias = tensors(layer)
    return torch.cat([weight.detach().flatten(1), bias.detach()[:, None]], 1)


def tensors(layer: nn.Module) -> tuple[Tensor, Tensor]:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    return weight, bias


def assign(layer: nn.Module, values: Tensor) -> None:
    weight, bias = tensors(layer)
    with torch.no_grad():
        weight.copy_(values[:, :-1].reshape(weight.shape))
        bias.copy_(values[:, -1])


def expressed(model: nn.Sequential, coordinates: list[Coordinates]) -> nn.Sequential:
    """The same function, with every layer between the two changes of coordinates."""
    parts: list[nn.Module] = []
    remaining = iter(coordinates)
    for part in copy.deepcopy(model):
        if isinstance(part, nn.Linear | nn.Conv2d):
            mine = next(remaining)
            assign(part, mine.weights(part))
            parts += [Affine(mine.m, mine.c), part, Affine(mine.phi, mine.d)]
        else:
            parts.append(part)
    return nn.Sequential(*parts)
