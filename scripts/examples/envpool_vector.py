"""EnvPool's environments as a vector environment: python -m scripts.examples.envpool_vector."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import envpool
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from acktr import ACKTR


class EnvPool(VectorEnv[Any, Any, Any]):
    """A pool, which begins a new episode at the step after the last one of the former.

    Args:
        task: EnvPool's name.
        num_envs: Environments in it.
        settings: EnvPool's own, such as seed and num_threads.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, task: str, num_envs: int, **settings: Any) -> None:
        self.pool = envpool.make(task, env_type="gymnasium", num_envs=num_envs, **settings)
        self.num_envs = num_envs
        self.single_observation_space = self.pool.observation_space
        self.single_action_space = self.pool.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """First observations; the seed is the pool's."""
        return self.pool.reset()[0], {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """A step of all; what the pool tells besides is left out."""
        return (*self.pool.step(np.asarray(actions))[:4], {})


def main(argv: list[str]) -> int:
    """Train in a pool, evaluate in Gymnasium's environment."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--steps", type=int, default=100_000)
    options = parser.parse_args(argv)
    agent = ACKTR(EnvPool(options.env, 8, seed=0), seed=0)
    agent.learn(options.steps, progress_bar=True)
    print(f"mean return {agent.evaluate(options.env, episodes=20).mean:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
