"""The program ``acktr``, also as ``python -m acktr``."""

import sys

from acktr.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
