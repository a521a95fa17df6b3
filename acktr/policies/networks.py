"""Actor-critic networks.

Every network maps a batch of observations, as the environment gives them, to the parameters of the
action distribution (B, P) and to values (B,). Those of a Dict or Tuple space are a dict by part.
:mod:`acktr.policies.contract` is for networks of one's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from acktr.config import Activation, NetworkConfig, Trunk
from acktr.envs import Channels, Picture, parts, picture, pictures
from acktr.policies.contract import (
    ActorCritic,
)
from acktr.policies.distributions import ActionHead
from acktr.policies.images import converted
from acktr.tree import Tree

_MANY = 8192
"""Numbers for which the additional calls are worth it."""

_MANY_STATES = 2048
"""Most states of a Discrete part that are one-hot; more have an embedding, whose K-FAC factor is a
diagonal."""
_EMBEDDING = 64
"""Numbers that an embedding gives."""
_PLACES = 64
"""Most places of a picture (height times width) that a dense layer sees."""


class Tanh(nn.Module):
    """tanh x, of many numbers on the CPU as 2 / (1 + exp(-2x)) - 1 where that is as exact.

    There torch computes the logistic function three to ten times as fast as its tanh (by
    the processor). In float32 the difference is at most 2e-7 (absolute); narrower types would lose
    small numbers.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """Element by element."""
        # A traced program must not ask for sizes.
        if torch.compiler.is_exporting() or hidden.numel() < _MANY:
            return hidden.tanh()
        if hidden.dtype in (torch.float32, torch.float64) and hidden.device.type == "cpu":
            return torch.rsub(torch.sigmoid(2 * hidden), -1, alpha=-2)  # 2 sigmoid - 1
        return hidden.tanh()


_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": Tanh, "relu": nn.ReLU, "elu": nn.ELU}


def orthogonal(layer: nn.Linear | nn.Conv2d, gain: float) -> nn.Linear | nn.Conv2d:
    """Orthogonal weight with the given gain and zero bias (Saxe et al. 2014)."""
    nn.init.orthogonal_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Features(nn.Module):
    """Observations without parts, or one part of them, as the first layer takes them.

    Pictures become (B, C, H, W), scaled, and stay as they are where that has been done to integers.
    Discrete becomes one-hot, or with many states its number (B,) for an embedding; MultiDiscrete
    becomes one-hot vectors side by side; other Boxes and MultiBinary are flattened to (B, D).
    """

    def __init__(self, space: gymnasium.Space[Any], channels: Channels = "auto") -> None:
        super().__init__()
        self.picture = picture(space, channels)
        self.pictures = {} if self.picture is None else {"": self.picture}
        self.classes = self.start = 0
        self.embedded = False
        self.offsets: Tensor | None
        offsets: Tensor | None = None
        if isinstance(space, gymnasium.spaces.Discrete):
            self.classes, self.start = int(space.n), int(space.start)
            self.embedded = self.classes > _MANY_STATES
            self.shape: tuple[int, ...] = (self.classes,)
        elif isinstance(space, gymnasium.spaces.MultiDiscrete):
            sizes = space.nvec.ravel()
            offsets = torch.as_tensor(np.cumsum(sizes) - sizes - space.start.ravel())
            self.shape = (int(sizes.sum()),)
        elif isinstance(space, gymnasium.spaces.Box | gymnasium.spaces.MultiBinary):
            self.shape = self.picture.shape if self.picture else (math.prod(space.shape),)
        else:
            raise ValueError(f"unsupported observation space {space}")
        self.register_buffer("offsets", offsets, persistent=False)

    def forward(self, observations: Tensor) -> Tensor:
        """Convert a batch."""
        if self.classes:
            index = observations.long() - self.start
            if self.embedded:
                return index
            return nn.functional.one_hot(index, self.classes).to(torch.get_default_dtype())
        if self.picture is None:
            # (N, 1) of numbers without an axis
            flat = observations.dim() == 2
            rows = observations if flat else observations.reshape(observations.shape[0], -1)
            if self.offsets is None:
                return rows.to(torch.get_default_dtype())
            ones = torch.zeros(rows.shape[0], *self.shape, device=rows.device)
            return ones.scatter_(1, rows.long() + self.offsets, 1.0)
        return converted(observations, self.picture)


class Joined(nn.Module):
    """The parts of a Dict or Tuple observation side by side (B, D).

    Each picture, and each number of many states, goes through layers of its own before.
    """

    def __init__(
        self, space: gymnasium.Space[Any], config: NetworkConfig, activation: Activation
    ) -> None:
        super().__init__()
        inside = {name: Features(part, config.channels) for name, part in parts(space).items()}
        made = [_own_layers(each, config.trunk, activation) for each in inside.values()]
        self.pictures = pictures(space, config.channels)
        self.names = list(inside)
        self.features = nn.ModuleList(inside.values())
        self.layers = nn.ModuleList(nn.Sequential(*layers) for layers, _ in made)
        self.width = sum(width for _, width in made)
        self.picture_alone = len(inside) == 1 and next(iter(inside.values())).picture is not None

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """Join a batch."""
        joined = [
            layers(features(observations[name]))
            for name, features, layers in zip(self.names, self.features, self.layers, strict=True)
        ]
        return torch.cat(joined, dim=-1)


def stored_pictures(network: nn.Module) -> dict[str, Picture]:
    """The pictures of integers that a network takes converted, by the name of their part.

    Modules that take observations say which: ``pictures``, of integers and floats.
    """
    for module in network.modules():
        found: Mapping[str, Picture] | None = getattr(module, "pictures", None)
        if found is not None:
            return {name: each for name, each in found.items() if not each.floats}
    return {}


def mlp(inputs: int, widths: Sequence[int], activation: Activation) -> nn.Sequential:
    """Hidden layers, each a Linear (orthogonal, gain sqrt 2) and an activation."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [orthogonal(nn.Linear(inputs, width), math.sqrt(2)), _ACTIVATIONS[activation]()]
        inputs = width
    return nn.Sequential(*layers)


def strided_trunk(shape: tuple[int, ...], activation: Activation) -> nn.Sequential:
    """Two layers of 32 filters 3x3 with stride 2 and 256 units, as ACKTR's authors had for MuJoCo.

    A side of n places becomes ceil(n / 2), as with their padding, which put one place less before
    the picture where n is even.

    Args:
        shape: (C, H, W).
        activation: After each layer.
    """
    channels, *sides = shape
    layers: list[nn.Module] = []
    for _ in range(2):
        conv = nn.Conv2d(channels, 32, 3, stride=2, padding=1)
        layers += [orthogonal(conv, math.sqrt(2)), _ACTIVATIONS[activation]()]
        channels, sides = 32, [-(-side // 2) for side in sides]
    dense = orthogonal(nn.Linear(channels * math.prod(sides), 256), math.sqrt(2))
    return _channels_last(nn.Sequential(*layers, nn.Flatten(), dense, _ACTIVATIONS[activation]()))


def conv_trunk(shape: tuple[int, ...]) -> nn.Sequential:
    """The paper's 32-64-32-512 network for images of at least 36 x 36, a small one below that.

    Filters 8x8 stride 4, 4x4 stride 2, 3x3 stride 1 and a dense layer of 512, all ReLU, as in Wu
    et al. 2017 (appendix A); small images get two 3x3 layers of 16 and 32 filters and 256 units.
    Layers of 32 filters 3x3 with stride 2 follow until at most 64 places are left: the dense layer
    has no more than 2048 inputs, and its factor in K-FAC as many rows.

    Args:
        shape: (C, H, W).
    """
    channels, height, width = shape
    plan, dense = [(32, 8, 4, 0), (64, 4, 2, 0), (32, 3, 1, 0)], 512
    if min(height, width) < 36:
        plan, dense = [(16, 3, 1, 1), (32, 3, 1, 1)], 256
    layers: list[nn.Module] = []
    while plan or height * width > _PLACES:
        filters, kernel, stride, padding = plan.pop(0) if plan else (32, 3, 2, 1)
        conv = nn.Conv2d(channels, filters, kernel, stride, padding)
        layers += [orthogonal(conv, math.sqrt(2)), nn.ReLU()]
        channels = filters
        height = (height + 2 * padding - kernel) // stride + 1
        width = (width + 2 * padding - kernel) // stride + 1
    layers += [nn.Flatten(), orthogonal(nn.Linear(channels * height * width, dense), math.sqrt(2))]
    return _channels_last(nn.Sequential(*layers, nn.ReLU()))


def _channels_last(trunk: nn.Sequential) -> nn.Sequential:
    for parameter in trunk.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    return trunk


def full_precision(layer: nn.Linear | nn.Conv2d, hidden: Tensor) -> Tensor:
    """Apply a layer outside autocast: logits and values keep the precision of the weights."""
    output: Tensor
    if torch.is_autocast_enabled(hidden.device.type):
        with torch.autocast(hidden.device.type, enabled=False):
            output = layer(hidden.to(layer.weight.dtype))
    else:
        output = layer(hidden.to(layer.weight.dtype))
    return output


def _own_layers(
    features: Features, trunk: Trunk, activation: Activation
) -> tuple[list[nn.Module], int]:
    """The layers that a part has to itself, and how many numbers they give."""
    if features.picture is not None:
        if trunk == "strided":
            layers = strided_trunk(features.shape, activation)
        else:
            layers = conv_trunk(features.shape)
        return [*layers], next(each.out_features for each in layers if isinstance(each, nn.Linear))
    if features.embedded:
        table = nn.Embedding(features.classes, _EMBEDDING)
        nn.init.normal_(table.weight, std=math.sqrt(2 / _EMBEDDING))  # rows as long as orthogonal
        return [table], _EMBEDDING
    return [], features.shape[0]


def trunk_of(
    space: gymnasium.Space[Any], config: NetworkConfig, critic: bool = False
) -> tuple[nn.Sequential, int]:
    """The layers below the heads, and how many numbers they give.

    Args:
        space: Observation space.
        config: Settings.
        critic: Whether they are a separate critic's.
    """
    widths = config.critic_hidden if critic else config.hidden
    activation = config.critic_activation if critic else config.activation
    below: Features | Joined
    layers: list[nn.Module] = []
    if isinstance(space, gymnasium.spaces.Dict | gymnasium.spaces.Tuple):
        below = Joined(space, config, activation)
        width, picture_alone = below.width, below.picture_alone
    else:
        below = Features(space, config.channels)
        layers, width = _own_layers(below, config.trunk, activation)
        picture_alone = below.picture is not None
    if not picture_alone:  # whose layers end with a dense one
        layers += mlp(width, widths, activation)
        width = widths[-1] if widths else width
    return nn.Sequential(below, *layers), width


class PolicyHead(nn.Module):
    """Linear layer to the distribution's parameters, with a free log-std for Gaussians."""

    def __init__(self, inputs: int, head: ActionHead, gain: float, log_std_init: float) -> None:
        super().__init__()
        self.linear = orthogonal(nn.Linear(inputs, head.outputs), gain)
        self.log_std: nn.Parameter | None = None
        if head.gaussian:
            self.log_std = nn.Parameter(torch.full((head.outputs,), log_std_init))

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits, or [mean, log std]."""
        output = full_precision(self.linear, hidden)
        if self.log_std is None:
            return output
        return torch.cat([output, self.log_std.expand_as(output)], dim=-1)


class Actor(nn.Module):
    """Policy network: observations to distribution parameters (B, P)."""

    def __init__(
        self, space: gymnasium.Space[Any], head: ActionHead, config: NetworkConfig
    ) -> None:
        super().__init__()
        self.trunk, width = trunk_of(space, config)
        self.head = PolicyHead(width, head, config.policy_gain, config.log_std_init)

    def forward(self, observations: Tree) -> Tensor:
        """Distribution parameters (B, P)."""
        output: Tensor = self.head(self.trunk(observations))
        return output


class Critic(nn.Module):
    """Value network: observations to values (B,)."""

    def __init__(self, space: gymnasium.Space[Any], config: NetworkConfig) -> None:
        super().__init__()
        self.trunk, width = trunk_of(space, config, critic=True)
        self.head = orthogonal(nn.Linear(width, 1), 1.0)

    def forward(self, observations: Tree) -> Tensor:
        """Values (B,)."""
        return full_precision(self.head, self.trunk(observations))[:, 0]


class SharedActorCritic(ActorCritic):
    """One trunk, a policy head and a value head."""

    shared = True

    def __init__(
        self, space: gymnasium.Space[Any], head: ActionHead, config: NetworkConfig
    ) -> None:
        super().__init__()
        self.trunk, width = trunk_of(space, config)
        self.policy = PolicyHead(width, head, config.policy_gain, config.log_std_init)
        self.value = orthogonal(nn.Linear(width, 1), 1.0)

    def forward(self, observations: Tree) -> tuple[Tensor, Tensor]:
        """Distribution parameters (B, P) and values (B,)."""
        hidden = self.trunk(observations)
        return self.policy(hidden), full_precision(self.value, hidden)[:, 0]
