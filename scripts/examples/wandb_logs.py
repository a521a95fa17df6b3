"""All metrics and settings in Weights & Biases: python -m scripts.examples.wandb_logs.

Without a network or an account the run lies in wandb/ until `wandb sync` sends it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import wandb

from acktr import ACKTR, TrainStats
from acktr.callbacks import Evaluations
from acktr.config import preset, to_dict


def train(env: str, steps: int, folder: str, mode: str) -> str:
    """Train with all metrics and settings in a run, and return where the run lies.

    Args:
        env: Environment.
        steps: Steps to learn from.
        folder: Of the run.
        mode: online, offline or disabled.
    """
    config, _ = preset(env, "acktr")
    with (
        wandb.init(project="acktr", dir=folder, mode=mode, config=to_dict(config)) as run,
        ACKTR(env, config, seed=0) as agent,
    ):

        def log(stats: TrainStats) -> None:
            run.log(dict(stats.metrics), step=stats.timesteps)

        agent.learn(steps, [Evaluations(every=max(steps // 10, 1), episodes=5), log])
        run.summary["evaluation"] = agent.evaluate(episodes=20).mean
        return str(run.dir)


def main(argv: Sequence[str]) -> int:
    """Train, and print where the run lies."""
    parser = argparse.ArgumentParser(prog="scripts.examples.wandb_logs", description=__doc__)
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--folder", default=".")
    parser.add_argument("--mode", choices=("online", "offline", "disabled"), default="offline")
    given = parser.parse_args(argv)
    print(f"run: {train(given.env, given.steps, given.folder, given.mode)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
