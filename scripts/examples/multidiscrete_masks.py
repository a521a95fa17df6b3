"""Several choices a step, some not allowed: python -m scripts.examples.multidiscrete_masks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from acktr import ACKTR

Array = NDArray[Any]


class Workshop(gymnasium.Env[Array, Array]):
    """A job and a machine are chosen at every step; the reward is the job's worth times its speed.

    A job that was done is gone until another comes in its place, and a machine is busy for two
    steps: both may not be chosen then. Without the mask such a choice earns nothing.
    """

    def __init__(self, jobs: int = 6, machines: int = 4, length: int = 20) -> None:
        self.jobs, self.machines, self.length = jobs, machines, length
        self.observation_space = gymnasium.spaces.Box(0, 1, (jobs + 2 * machines,), np.float32)
        self.action_space = gymnasium.spaces.MultiDiscrete([jobs, machines])
        self.worth, self.speed = np.zeros(jobs), np.zeros(machines)
        self.busy, self.time = np.zeros(machines, np.int64), 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Fill the workshop with jobs."""
        super().reset(seed=seed)
        self.worth = self.np_random.random(self.jobs)
        self.speed = self.np_random.random(self.machines)
        self.busy[:], self.time = 0, 0
        return self._observe(), {}

    def action_masks(self) -> Array:
        """Whether each job, and behind them each machine, may be chosen."""
        return np.concatenate([self.worth > 0, self.busy == 0])

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Give a job to a machine."""
        job, machine = action
        reward = float(self.worth[job] * self.speed[machine] * (self.busy[machine] == 0))
        self.worth[job] = 0.0
        self.busy = np.maximum(self.busy - 1, 0)
        self.busy[machine] = 2
        if self.np_random.random() < 0.8 or not self.worth.any():
            self.worth[np.argmin(self.worth)] = self.np_random.random()
        self.time += 1
        return self._observe(), reward, False, self.time == self.length, {}

    def _observe(self) -> Array:
        return np.concatenate([self.worth, self.speed, self.busy / 2]).astype(np.float32)


def main(argv: Sequence[str]) -> int:
    """Train, and print the mean return of 100 episodes."""
    parser = argparse.ArgumentParser(prog="scripts.examples.multidiscrete_masks")
    parser.add_argument("--steps", type=int, default=100_000)
    given = parser.parse_args(argv)
    with ACKTR(Workshop, num_envs=8, seed=0) as agent:
        print(f"mean return: {agent.learn(given.steps).evaluate(episodes=100).mean:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
