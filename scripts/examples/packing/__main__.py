"""Utilisation that players without learning reach: python -m scripts.examples.packing."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np

from scripts.common import ScriptError, complain, integer, parsed
from scripts.examples.packing.environments import HeightmapPacking, LeafPacking
from scripts.examples.packing.players import (
    Player,
    deepest_bottom_left,
    first_allowed,
    least_waste,
    play,
    random_allowed,
)

ENVIRONMENTS = {"heightmap": HeightmapPacking, "leaves": LeafPacking}


def main(argv: Sequence[str]) -> int:
    """Print a line for each environment and player."""
    parser = argparse.ArgumentParser(prog="scripts.examples.packing", description=__doc__)
    parser.add_argument("--episodes", type=integer(2), default=200)
    parser.add_argument("--seed", type=integer(0), default=0)
    try:
        given = parsed(parser, argv)
    except ScriptError as error:
        complain("packing", f"error: {error}")
        return 2
    players: dict[str, Player] = {
        "random allowed": random_allowed(given.seed),
        "first allowed": first_allowed,
        "deepest bottom left": deepest_bottom_left,
        "least waste": least_waste,
    }
    print("environment  player               utilisation      steps/s")
    for name, make in ENVIRONMENTS.items():
        for who, player in players.items():
            env = make()
            started = time.process_time()
            ratios, counters = play(env, player, given.episodes, given.seed)
            seconds = time.process_time() - started
            spread = np.std(ratios, ddof=1) / len(ratios) ** 0.5
            steps = round(sum(counters) / seconds)
            print(f"{name:12} {who:20} {np.mean(ratios):.3f} +- {spread:.3f}   {steps:7,}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
