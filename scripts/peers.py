"""Train the algorithms of stable-baselines3 and write run folders that ``acktr report`` reads.

Usage: python scripts/peers.py --peer sb3-a2c --env Hopper-v5 --seed 0 --run-dir runs
"""

from __future__ import annotations

import sys

from peers_lib.main import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
