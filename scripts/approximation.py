"""Draw and measure what the K-FAC approximations of the Fisher matrix leave out.

Usage: python scripts/approximation.py --out results/approximation
"""

from __future__ import annotations

import sys

from approximation_lib.main import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
