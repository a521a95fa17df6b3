"""A network of one's own on Atari: python -m scripts.examples.own_network --env ALE/Pong-v5."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import gymnasium
import torch
from torch import Tensor, nn

from acktr import ACKTR


class Residual(nn.Module):
    """Two convolutions, whose result is added to the picture that they see."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        """A picture of the same size."""
        change: Tensor = self.second(self.first(picture.relu()).relu())
        return picture + change


class Net(nn.Module):
    """A small residual network (Espeholt et al. 2018) over frames, with two heads."""

    def __init__(
        self,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        channels: Sequence[int] = (16, 32, 32),
    ) -> None:
        super().__init__()
        assert isinstance(observation_space, gymnasium.spaces.Box)
        assert isinstance(action_space, gymnasium.spaces.Discrete)
        layers: list[nn.Module] = []
        inputs, size, _ = observation_space.shape
        for width in channels:
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.MaxPool2d(3, 2, 1)]
            layers += [Residual(width)]
            inputs, size = width, (size + 1) // 2
        layers += [nn.ReLU(), nn.Flatten(), nn.Linear(inputs * size * size, 256), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.policy = nn.Linear(256, int(action_space.n))
        self.value = nn.Linear(256, 1)
        nn.init.orthogonal_(self.policy.weight, 0.01)

    def forward(self, observations: Tensor) -> dict[str, Tensor]:
        """Logits (B, actions) and values (B,) of frames (B, 4, 84, 84), bytes or in [0, 1]."""
        if observations.dtype == torch.uint8:
            observations = observations.float() / 255
        hidden = self.trunk(observations)
        return {"policy": self.policy(hidden), "value": self.value(hidden)[:, 0]}


def main(argv: Sequence[str]) -> int:
    """Train with the network above in place of the built-in one."""
    parser = argparse.ArgumentParser(prog="scripts.examples.own_network", description=__doc__)
    parser.add_argument("--env", default="PongNoFrameskip-v4")
    parser.add_argument("--steps", type=int, default=10_000_000)
    given = parser.parse_args(argv)
    with ACKTR(given.env, network=Net, seed=0, verbose=1) as agent:
        agent.learn(given.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
