"""Networks as a user writes them, with nothing of the library in them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def _layer(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class _Tanh(nn.Module):
    """As the library's, to the bit."""

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.numel() < 8192:
            return hidden.tanh()
        return torch.rsub(torch.sigmoid(2 * hidden), -1, alpha=-2)


def _trunk(inputs: int) -> nn.Sequential:
    root = math.sqrt(2)
    return nn.Sequential(_layer(inputs, 64, root), _Tanh(), _layer(64, 64, root), _Tanh())


class _Head(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.mean = _layer(64, outputs, 0.01)
        self.log_std = nn.Parameter(torch.full((outputs,), -1.0))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(hidden), self.log_std


class Actor(nn.Module):
    """The default actor for vectors and Box actions, with the MuJoCo preset's deviation."""

    def __init__(self, observation_space: Any, action_space: Any) -> None:
        super().__init__()
        self.trunk = _trunk(observation_space.shape[0])
        self.head = _Head(action_space.shape[0])

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.head(self.trunk(observations))
        return found


class Critic(nn.Module):
    """The default critic for vectors."""

    def __init__(self, observation_space: Any, action_space: Any) -> None:
        super().__init__()
        self.trunk = _trunk(observation_space.shape[0])
        self.value = _layer(64, 1, 1.0)

    def forward(self, observations: Tensor) -> Tensor:
        found: Tensor = self.value(self.trunk(observations))
        return found


class Small(nn.Module):
    """A shared network for vectors and Discrete actions."""

    def __init__(self, observation_space: Any, action_space: Any) -> None:
        super().__init__()
        self.trunk = _trunk(observation_space.shape[0])
        self.score = _layer(64, int(action_space.n), 0.01)
        self.value = _layer(64, 1, 1.0)

    def forward(self, observations: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(observations)
        return {"policy": self.score(hidden), "value": self.value(hidden), "sum": hidden[:, :3]}
