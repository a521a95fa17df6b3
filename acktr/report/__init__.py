"""Reports: finished run folders in; tables and figures with intervals out.

Reading of results, statistics, learning curves, and the page.
May import: acktr.runs, acktr.files.
"""

__all__ = [
    "archives",
    "curves",
    "figures",
    "page",
    "plot",
    "references",
    "results",
    "statistics",
    "tables",
]
