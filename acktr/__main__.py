"""The program ``acktr``, also as ``python -m acktr``."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from acktr.interrupts import STOPPED


def main() -> int:
    """Run the command line; a signal while everything is still being imported stops it quietly."""
    for number in STOPPED:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    from acktr.cli.main import main as run  # takes seconds

    return run()


def _stop(signum: int, frame: FrameType | None) -> None:
    """Leave at once: nothing has been written yet, and modules are half imported."""
    os.write(2, b"acktr: stopped\n")
    os._exit(STOPPED[signal.Signals(signum)])


if __name__ == "__main__":
    sys.exit(main())
