"""Actor-critic networks.

Every network maps a batch of observations, as the environment gives them, to the parameters of the
action distribution (B, P) and to values (B,).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import gymnasium
import torch
from torch import Tensor, nn

from acktr.config import Activation, NetworkConfig
from acktr.envs import is_image
from acktr.policies.distributions import ActionHead
from acktr.policies.images import channels_last, convert, image_shape

_MANY = 8192
"""Numbers for which the additional calls are worth it."""


class Tanh(nn.Module):
    """tanh x, of many numbers on the CPU as 2 / (1 + exp(-2x)) - 1 where that is as exact.

    There torch computes the logistic function three to ten times as fast as its tanh (by
    the processor). In float32 the difference is at most 2e-7 (absolute); narrower types would lose
    small numbers.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """Element by element."""
        wide = hidden.dtype in (torch.float32, torch.float64)
        if wide and hidden.device.type == "cpu" and hidden.numel() >= _MANY:
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
    """Observations as the first layer takes them.

    Images (B, C, H, W) or (B, H, W, C) uint8 become (B, C, H, W) in [0, 1], and stay as they are
    where that has been done; Discrete becomes one-hot; other Boxes are flattened to (B, D).
    """

    def __init__(self, space: gymnasium.Space[Any]) -> None:
        super().__init__()
        self.image = is_image(space)
        self.channels_last = self.image and channels_last(space)
        self.classes = self.start = 0
        if isinstance(space, gymnasium.spaces.Discrete):
            self.classes, self.start = int(space.n), int(space.start)
            self.shape: tuple[int, ...] = (self.classes,)
        elif isinstance(space, gymnasium.spaces.Box):
            self.shape = image_shape(space) if self.image else (math.prod(space.shape),)
        else:
            raise ValueError(f"unsupported observation space {space}")

    def forward(self, observations: Tensor) -> Tensor:
        """Convert a batch."""
        if self.classes:
            index = observations.long() - self.start
            return nn.functional.one_hot(index, self.classes).to(torch.get_default_dtype())
        if not self.image:
            rows = observations.reshape(len(observations), -1)  # (N, 1) of numbers without an axis
            return rows.to(torch.get_default_dtype())
        if observations.is_floating_point():
            return observations
        return convert(observations, self.channels_last)


def mlp(inputs: int, widths: Sequence[int], activation: Activation) -> nn.Sequential:
    """Hidden layers, each a Linear (orthogonal, gain sqrt 2) and an activation."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [orthogonal(nn.Linear(inputs, width), math.sqrt(2)), _ACTIVATIONS[activation]()]
        inputs = width
    return nn.Sequential(*layers)


def conv_trunk(shape: tuple[int, ...]) -> nn.Sequential:
    """The paper's 32-64-32-512 network for images of at least 36 x 36, a small one below that.

    Filters 8x8 stride 4, 4x4 stride 2, 3x3 stride 1 and a dense layer of 512, all ReLU, as in Wu
    et al. 2017 (appendix A); small images get two 3x3 layers of 16 and 32 filters and 256 units.
    """
    channels, height, width = shape
    plan, dense = [(32, 8, 4, 0), (64, 4, 2, 0), (32, 3, 1, 0)], 512
    if min(height, width) < 36:
        plan, dense = [(16, 3, 1, 1), (32, 3, 1, 1)], 256
    layers: list[nn.Module] = []
    for filters, kernel, stride, padding in plan:
        conv = nn.Conv2d(channels, filters, kernel, stride, padding)
        layers += [orthogonal(conv, math.sqrt(2)), nn.ReLU()]
        channels = filters
        height = (height + 2 * padding - kernel) // stride + 1
        width = (width + 2 * padding - kernel) // stride + 1
    layers += [nn.Flatten(), orthogonal(nn.Linear(channels * height * width, dense), math.sqrt(2))]
    trunk = nn.Sequential(*layers, nn.ReLU())
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


def _trunk(
    space: gymnasium.Space[Any], widths: Sequence[int], activation: Activation
) -> tuple[nn.Sequential, int]:
    """The layers below the heads, and how many numbers they give."""
    features = Features(space)
    inputs = features.shape[0]
    body = conv_trunk(features.shape) if features.image else mlp(inputs, widths, activation)
    outputs = [layer.out_features for layer in body if isinstance(layer, nn.Linear)]
    return nn.Sequential(features, *body), outputs[-1] if outputs else inputs


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
        self.trunk, width = _trunk(space, config.hidden, config.activation)
        self.head = PolicyHead(width, head, config.policy_gain, config.log_std_init)

    def forward(self, observations: Tensor) -> Tensor:
        """Distribution parameters (B, P)."""
        output: Tensor = self.head(self.trunk(observations))
        return output


class Critic(nn.Module):
    """Value network: observations to values (B,)."""

    def __init__(self, space: gymnasium.Space[Any], config: NetworkConfig) -> None:
        super().__init__()
        self.trunk, width = _trunk(space, config.critic_hidden, config.critic_activation)
        self.head = orthogonal(nn.Linear(width, 1), 1.0)

    def forward(self, observations: Tensor) -> Tensor:
        """Values (B,)."""
        return full_precision(self.head, self.trunk(observations))[:, 0]


class SharedActorCritic(nn.Module):
    """One trunk, a policy head and a value head."""

    def __init__(
        self, space: gymnasium.Space[Any], head: ActionHead, config: NetworkConfig
    ) -> None:
        super().__init__()
        self.trunk, width = _trunk(space, config.hidden, config.activation)
        self.policy = PolicyHead(width, head, config.policy_gain, config.log_std_init)
        self.value = orthogonal(nn.Linear(width, 1), 1.0)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Distribution parameters (B, P) and values (B,)."""
        hidden = self.trunk(observations)
        return self.policy(hidden), full_precision(self.value, hidden)[:, 0]


class SeparateActorCritic(nn.Module):
    """An actor and a critic that share nothing."""

    def __init__(
        self, space: gymnasium.Space[Any], head: ActionHead, config: NetworkConfig
    ) -> None:
        super().__init__()
        self.actor = Actor(space, head, config)
        self.critic = Critic(space, config)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Distribution parameters (B, P) and values (B,)."""
        return self.actor(observations), self.critic(observations)


ActorCritic = SharedActorCritic | SeparateActorCritic


def build_network(
    space: gymnasium.Space[Any], head: ActionHead, config: NetworkConfig
) -> ActorCritic:
    """The network that the configuration asks for."""
    if config.shared:
        return SharedActorCritic(space, head, config)
    return SeparateActorCritic(space, head, config)
