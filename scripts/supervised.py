"""Compare K-FAC with SGD and Adam on an autoencoder or a convolutional network.

Usage: python scripts/supervised.py autoencoder --data mnist.npz --out results/autoencoder
"""

from __future__ import annotations

import sys

from supervised_lib.main import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
