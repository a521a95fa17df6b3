"""Measure what action masks and Dict observations cost: seconds of the processor per step.

Usage: python -m scripts.mask_cost

Agents that differ in nothing else train in turn, in environments that compute nothing. A ratio is
the median over rounds of the time beside that of the plain agent in the same round.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from acktr import ACKTR, preset
from scripts.common import integer, on_files, parsed

VECTOR = spaces.Box(-1, 1, (4,), np.float32)
PICTURE = spaces.Box(0, 255, (3, 64, 64), np.uint8)
PARTS = {
    "vectors": spaces.Dict(a=spaces.Box(-1, 1, (2,), np.float32), b=spaces.Box(-1, 1, (2,))),
    "pictures": spaces.Dict(picture=PICTURE),
    "pictures and numbers": spaces.Dict(picture=PICTURE, numbers=VECTOR),
}


class Still(gymnasium.Env[Any, Any]):
    """Shows the same at every step, of 50."""

    action_space = spaces.Discrete(6)

    def __init__(self, space: spaces.Space[Any], masked: bool) -> None:
        self.observation_space = space
        self._shown, self._steps = space.sample(), 0
        if masked:
            self.action_masks = lambda: np.array([1, 1, 0, 1, 1, 0], np.bool_)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        self._steps = 0
        return self._shown, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Show the same again."""
        self._steps += 1
        return self._shown, 1.0, self._steps == 50, False, {}


def agent(space: spaces.Space[Any], masked: bool) -> ACKTR:
    """One with the preset of CartPole, or that of Breakout with batches of 256 for pictures."""
    if space in (VECTOR, PARTS["vectors"]):
        config = preset("CartPole-v1")[0]
    else:
        config = preset("BreakoutNoFrameskip-v4")[0]
        config = dataclasses.replace(config, num_envs=16, num_steps=16)
    config = dataclasses.replace(config, env="Still", env_workers=1)
    return ACKTR(Still, config, env_kwargs={"space": space, "masked": masked})


def work(argv: Sequence[str]) -> None:
    """Do what a command line says: a row of a table per kind of agent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=integer(1), default=9)
    parser.add_argument("--steps", type=integer(1), default=2048)
    options = parsed(parser, argv)
    print("| observations | microseconds per step | masks | Dict | both |\n|---|---|---|---|---|")
    for name, parts in PARTS.items():
        plain = VECTOR if name == "vectors" else PICTURE
        agents = [agent(space, masked) for space in (plain, parts) for masked in (False, True)]
        seconds = np.zeros((options.rounds + 1, 4))
        for row in seconds:
            for column, each in enumerate(agents):
                start, steps = time.process_time(), each.num_timesteps
                each.learn(options.steps)
                row[column] = (time.process_time() - start) / (each.num_timesteps - steps)
        warm = seconds[1:]
        _, masks, dicts, both = np.median(warm / warm[:, :1], axis=0)
        micro = 1e6 * np.median(warm[:, 0])
        print(f"| {name} | {micro:.0f} | {masks:.2f} | {dicts:.2f} | {both:.2f} |", flush=True)


if __name__ == "__main__":
    raise SystemExit(on_files("mask_cost", lambda: work(sys.argv[1:])))
