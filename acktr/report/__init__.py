"""Reports: finished run folders in; tables and figures with intervals out.

Reading of results, statistics, learning curves, and the page.
May import: acktr.runs, acktr.config, acktr.files.
"""

import importlib
import os
import sys
from contextlib import suppress

__all__ = [
    "archives",
    "curves",
    "figures",
    "listing",
    "page",
    "plot",
    "references",
    "results",
    "statistics",
    "tables",
]


def _import_matplotlib() -> None:
    """Import it also where MPLBACKEND names a back end that it does not know; none is used here."""
    chosen = os.environ.pop("MPLBACKEND", None)
    matplotlib = importlib.import_module("matplotlib")
    if chosen is not None:
        os.environ["MPLBACKEND"] = chosen
        with suppress(ValueError):  # for what else this process draws
            matplotlib.rcParams["backend"] = chosen


if "matplotlib" not in sys.modules:
    _import_matplotlib()
