"""Measure the returns of a policy that draws actions uniformly: the lower references of scores.

Usage: python -m scripts.random_returns ENV [ENV ...] --episodes 1000 > FILE.csv
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence

import numpy as np

from acktr.envs import env_seeds, make_single
from scripts.common import integer, on_files, parsed


def random_returns(env_id: str, episodes: int, seed: int) -> list[float]:
    """Returns of whole episodes; episodes and actions are seeded."""
    returns = []
    env = make_single(env_id, render_mode=None)
    try:
        env.action_space.seed(seed)
        for episode_seed in env_seeds(seed, episodes):
            env.reset(seed=episode_seed)
            total, done = 0.0, False
            while not done:
                _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
                total, done = total + float(reward), terminated or truncated
            returns.append(total)
    finally:
        env.close()
    return returns


def work(argv: Sequence[str]) -> None:
    """Do what a command line says: a row per environment on standard output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("envs", nargs="+", metavar="ENV")
    parser.add_argument("--episodes", type=integer(2), default=1000)
    parser.add_argument("--seed", type=integer(0, 2**31 - 1), default=0)
    options = parsed(parser, argv)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["env", "episodes", "mean", "std", "standard_error"])
    for env_id in options.envs:
        returns = random_returns(env_id, options.episodes, options.seed)
        mean, std = np.mean(returns), np.std(returns, ddof=1)
        error_of_mean = std / np.sqrt(len(returns))
        row = [env_id, len(returns), f"{mean:.6g}", f"{std:.6g}", f"{error_of_mean:.3g}"]
        writer.writerow(row)
        sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(on_files("random_returns", lambda: work(sys.argv[1:])))
