"""Run the command line as ``python -m acktr``."""

import sys

from acktr.cli import main

sys.exit(main())
