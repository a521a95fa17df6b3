"""Networks for packing, of plain torch modules: they take observations and know no masks."""

from __future__ import annotations

import math

import gymnasium
import torch
from torch import Tensor, nn

from acktr.envs import EnvError


class HeightmapActor(nn.Module):
    """Two convolutions over the heightmap, and a logit for each cell and orientation.

    The first sees the cells that an item with its corner at a cell would cover, and the second one
    row around them; outside of the bin everything is as high as the ceiling.

    Args:
        observation_space: Pictures (4, L, W) of :class:`HeightmapPacking`.
        action_space: Its actions, o L W + x W + y.
        filters: Channels of the convolutions.
        longest: Longest side of an item.
    """

    def __init__(
        self,
        observation_space: gymnasium.spaces.Box,
        action_space: gymnasium.spaces.Discrete,
        filters: int = 16,
        longest: int = 5,
    ) -> None:
        super().__init__()
        channels, length, width = observation_space.shape
        self.trunk = nn.Sequential(
            nn.ConstantPad2d((0, longest - 1, 0, longest - 1), 1.0),
            nn.Conv2d(channels, filters, longest),
            nn.ReLU(),
            nn.Conv2d(filters, filters, 3, padding=1),
            nn.ReLU(),
        )
        self.policy = nn.Conv2d(filters, int(action_space.n) // (length * width), 1)
        nn.init.orthogonal_(self.policy.weight, 0.01)

    def forward(self, observations: Tensor) -> Tensor:
        """Logits (B, actions) of pictures (B, 4, L, W)."""
        logits: Tensor = self.policy(self.trunk(observations)).flatten(1)
        return logits


class HeightmapCritic(nn.Module):
    """Dense layers over the heights and the item's sides.

    Args:
        observation_space: Pictures (4, L, W) of :class:`HeightmapPacking`.
        action_space: Its actions.
        width: Numbers of a hidden layer.
    """

    def __init__(
        self,
        observation_space: gymnasium.spaces.Box,
        action_space: gymnasium.spaces.Discrete,
        width: int = 64,
    ) -> None:
        super().__init__()
        channels, length, across = observation_space.shape
        self.layers = nn.Sequential(
            nn.Linear(length * across + channels - 1, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, 1),
        )

    def forward(self, observations: Tensor) -> Tensor:
        """Values (B, 1) of pictures (B, 4, L, W), whose last three are even."""
        seen = torch.cat([observations[:, 0].flatten(1), observations[:, 1:, 0, 0]], 1)
        values: Tensor = self.layers(seen)
        return values


class Attention(nn.Module):
    """Attention of every node to all nodes that exist, with several heads.

    Args:
        width: Numbers of a node.
        heads: Heads, which divide the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, nodes: Tensor, exists: Tensor) -> Tensor:
        """Messages (B, M, width) for nodes (B, M, width) of which some exist (B, M)."""
        query, key, value = (
            layer(nodes).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~exists[:, None, None], -torch.inf).softmax(-1)
        message: Tensor = self.out((weights @ value).transpose(1, 2).flatten(2))
        return message


def perceptron(inputs: int, width: int) -> nn.Sequential:
    """Two linear layers with a ReLU between them."""
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width))


class LeafNetwork(nn.Module):
    """Graph attention over boxes, candidates and the next item, with a pointer to a candidate.

    Each kind of node has its own embedding. The value comes from the mean over the nodes, and the
    logit of a candidate from its scalar product with a query that is made of this mean.

    Args:
        observation_space: The dictionary of :class:`LeafPacking`.
        action_space: The candidates.
        width: Numbers of a node.
        heads: Heads of the attention.
        layers: Rounds of attention.
    """

    def __init__(
        self,
        observation_space: gymnasium.spaces.Dict,
        action_space: gymnasium.spaces.Discrete,
        width: int = 64,
        heads: int = 4,
        layers: int = 1,
    ) -> None:
        super().__init__()
        missing = {"boxes", "candidates", "item"} - set(observation_space.keys())
        if missing:
            raise EnvError(f"LeafNetwork needs the observations of LeafPacking, not {missing}")
        self.boxes, self.candidates = perceptron(6, width), perceptron(6, width)
        self.item = perceptron(3, width)
        self.attention = nn.ModuleList([Attention(width, heads) for _ in range(layers)])
        self.node = nn.ModuleList([perceptron(width, width) for _ in range(layers)])
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        nn.init.orthogonal_(self.query.weight, 0.01)

    def forward(self, observations: dict[str, Tensor]) -> dict[str, Tensor]:
        """Logits (B, candidates) and values (B,) of a dictionary of observations (B, ...)."""
        boxes, candidates = observations["boxes"], observations["candidates"]
        item = observations["item"][:, None]
        nodes = torch.cat([self.candidates(candidates), self.boxes(boxes), self.item(item)], 1)
        here = torch.ones_like(item[..., 0], dtype=torch.bool)
        # A box that exists has a length above zero.
        exists = torch.cat([candidates[..., 3] > 0, boxes[..., 3] > 0, here], 1)
        for attention, node in zip(self.attention, self.node, strict=True):
            nodes = nodes + attention(nodes, exists)
            nodes = nodes + node(nodes)
        weights = exists.to(nodes.dtype)
        graph = (weights[:, None] @ nodes)[:, 0] / weights.sum(1, keepdim=True)
        keys = self.key(nodes[:, : candidates.shape[1]])
        logits = (keys @ self.query(graph)[..., None])[..., 0] / math.sqrt(keys.shape[-1])
        return {"policy": logits, "value": self.value(graph)[:, 0]}
