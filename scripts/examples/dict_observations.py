"""Pictures and numbers together: python -m scripts.examples.dict_observations."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from acktr import ACKTR

Seen = dict[str, NDArray[Any]]


class Fetch(gymnasium.Env[Seen, Any]):
    """Two coloured fields on a map; the goal's colour is told as numbers beside the picture.

    The agent walks over a map of 5 x 5, and earns 1 on the field of the colour that was asked for
    and -1 on the other one, which both end the episode.
    """

    MOVES = np.array([(0, 1), (0, -1), (1, 0), (-1, 0)])

    def __init__(self, size: int = 5, length: int = 20) -> None:
        self.size, self.length = size, length
        self.observation_space: Any = gymnasium.spaces.Dict(
            map=gymnasium.spaces.Box(0, 255, (3, size, size), np.uint8),
            goal=gymnasium.spaces.Box(0, 1, (2,), np.float32),
        )
        self.action_space = gymnasium.spaces.Discrete(4)
        self.places = np.zeros((3, 2), np.int64)  # of the two fields and of the agent
        self.goal, self.time = 0, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Seen, dict[str, Any]]:
        """Draw a map."""
        super().reset(seed=seed)
        cells = self.np_random.choice(self.size**2, 3, replace=False)
        self.places = np.stack(np.divmod(cells, self.size), axis=-1)
        self.goal, self.time = int(self.np_random.integers(2)), 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Seen, float, bool, bool, dict[str, Any]]:
        """Walk one field."""
        self.places[2] = np.clip(self.places[2] + self.MOVES[action], 0, self.size - 1)
        self.time += 1
        on = [bool((self.places[2] == place).all()) for place in self.places[:2]]
        reward = float(on[self.goal]) - float(on[1 - self.goal])
        return self._observe(), reward, any(on), self.time == self.length, {}

    def _observe(self) -> Seen:
        picture = np.zeros((3, self.size, self.size), np.uint8)
        picture[np.arange(3), self.places[:, 0], self.places[:, 1]] = 255
        return {"map": picture, "goal": np.eye(2, dtype=np.float32)[self.goal]}


def main(argv: Sequence[str]) -> int:
    """Train, and print the mean return of 100 episodes."""
    parser = argparse.ArgumentParser(prog="scripts.examples.dict_observations")
    parser.add_argument("--steps", type=int, default=200_000)
    given = parser.parse_args(argv)
    with ACKTR(Fetch, num_envs=16, seed=0) as agent:
        print(f"mean return: {agent.learn(given.steps).evaluate(episodes=100).mean:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
