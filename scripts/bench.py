"""Measure training throughput of our algorithms and of their peers, and write a report.

Usage: python scripts/bench.py --suite atari mujoco kfac
"""

from __future__ import annotations

import sys

from bench_lib.main import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
