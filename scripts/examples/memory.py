"""Two tasks that need a memory: python -m scripts.examples.memory recall --memory lstm."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from acktr import ACKTR
from acktr.config import preset

Array = NDArray[np.float32]


class Recall(gymnasium.Env[Array, Any]):
    """A cue is shown at the first step, and must be named ``delay`` steps later for a reward of 1.

    Observations are the cue (one-hot, at the first step alone) and whether to answer now.
    """

    def __init__(self, delay: int = 8, cues: int = 4) -> None:
        self.observation_space = gymnasium.spaces.Box(0, 1, (cues + 1,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(cues)
        self.delay, self.cues = delay, cues
        self._cue, self._time = 0, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Show a cue."""
        super().reset(seed=seed)
        self._cue, self._time = int(self.np_random.integers(self.cues)), 0
        return np.eye(self.cues + 1, dtype=np.float32)[self._cue], {}

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Wait, or take the answer."""
        ended = self._time == self.delay
        self._time += 1
        shown = np.zeros(self.cues + 1, np.float32)
        shown[-1] = self._time == self.delay
        return shown, float(ended and action == self._cue), ended, False, {}


def positions() -> gymnasium.Env[Array, Any]:
    """CartPole without its two velocities."""
    cart = gymnasium.make("CartPole-v1")
    space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    return gymnasium.wrappers.TransformObservation(cart, lambda shown: shown[[0, 2]], space)


gymnasium.register("Recall-v0", f"{__name__}:Recall")
gymnasium.register("CartPolePositions-v0", f"{__name__}:positions")
TASKS = {"recall": ("Recall-v0", 50_000, 32), "cartpole": ("CartPolePositions-v0", 200_000, 128)}
"""Environment, steps, and those of each environment per update, which gradients reach back."""


def main(argv: Sequence[str]) -> int:
    """Train on a task and print the mean return of 100 episodes."""
    parser = argparse.ArgumentParser(prog="scripts.examples.memory", description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--memory", choices=("none", "lstm", "gru", "attention"), default="lstm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    given = parser.parse_args(argv)
    name, steps, num_steps = TASKS[given.task]
    config = replace(preset(name, "acktr")[0], num_steps=num_steps)
    config = replace(config, network=replace(config.network, memory=given.memory))
    with ACKTR(name, config, seed=given.seed) as agent:
        mean = agent.learn(given.steps or steps).evaluate(episodes=100).mean
    print(f"{given.task}, {given.memory}, seed {given.seed}: {mean:.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
