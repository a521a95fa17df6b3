"""Live progress over all runs of a campaign: a panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_PANEL_INTERVAL = 0.25
_BAR_WIDTH = 40
_LEAST = 5.0
"""Seconds of measurement before a time left is shown."""


class Tracker:
    """Estimates the time that planned updates of several optimizers still take."""

    def __init__(self) -> None:
        self._planned: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._seconds: dict[str, float] = {}

    def plan(self, optimizer: str, updates: int) -> None:
        """Add updates to what is to be done."""
        self._planned[optimizer] = self._planned.get(optimizer, 0) + updates

    def add(self, optimizer: str, updates: int, seconds: float) -> None:
        """Record updates and the seconds they took, evaluations included."""
        self._done[optimizer] = self._done.get(optimizer, 0) + updates
        self._seconds[optimizer] = self._seconds.get(optimizer, 0.0) + seconds

    @property
    def share(self) -> float:
        """Part of the planned updates that is done, 0 to 1."""
        return min(1.0, sum(self._done.values()) / max(1, sum(self._planned.values())))

    def remaining(self) -> float | None:
        """Seconds left, optimizers without measurement at the mean speed; None while unknown."""
        done, seconds = sum(self._done.values()), sum(self._seconds.values())
        if seconds < _LEAST:
            return None
        mean = seconds / done
        left = 0.0
        for name, planned in self._planned.items():
            made = self._done.get(name, 0)
            each = self._seconds[name] / made if made else mean
            left += each * max(0, planned - made)
        return left


class Progress:
    """Shows the run in progress and the time left; a stream that fails is given up silently."""

    def __init__(
        self,
        tracker: Tracker,
        *,
        interval: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show nothing yet.

        Args:
            tracker: What is planned and done.
            interval: Seconds between plain lines.
            stream: Where to write; standard error by default.
            clock: Seconds.
        """
        self._tracker = tracker
        self._interval = interval
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._next = -math.inf
        self._broken = False
        self._live: Live | None = None
        console = Console(file=self._stream)
        if self._stream.isatty() and not console.is_dumb_terminal:
            self._live = Live(console=console, auto_refresh=False)

    def note(self, text: str) -> None:
        """Write a line (above the panel)."""
        live = self._live
        if live is None:
            self._guard(lambda: print(text, file=self._stream, flush=True))
        else:
            self._guard(lambda: live.console.print(Text(text)))

    def update(self, run: str, update: int, updates: int, train_loss: float) -> None:
        """Take in one update and show it when it is time to."""
        now = self._clock()
        if now < self._next:
            return
        live = self._live
        self._next = now + (self._interval if live is None else _PANEL_INTERVAL)
        left = self._tracker.remaining()
        fields = [
            ("run", run),
            ("update", f"{update:,}/{updates:,}"),
            ("training loss", f"{train_loss:.5g}"),
            ("all runs", f"{self._tracker.share:.1%}"),
            ("ETA", "-" if left is None else str(timedelta(seconds=round(left)))),
        ]
        if live is None:
            self.note("  ".join(f"{name} {value}" for name, value in fields))
        else:
            panel = self._panel(fields)
            self._guard(live.start)
            self._guard(lambda: live.update(panel, refresh=True))

    def close(self) -> None:
        """Leave the terminal as it was; further calls do nothing."""
        if self._live is not None:
            with contextlib.suppress(OSError, ValueError):
                self._live.stop()

    def _panel(self, fields: Sequence[tuple[str, str]]) -> Panel:
        grid = Table.grid(padding=(0, 2))
        grid.add_row("", ProgressBar(1.0, self._tracker.share, width=_BAR_WIDTH))
        for name, value in fields:
            grid.add_row(Text(name, style="dim"), Text(value))
        return Panel(grid, title="supervised", title_align="left", expand=False)

    def _guard(self, action: Callable[[], object]) -> None:
        """Do it unless the stream has failed (closed pipe, full disk); that must stop nothing."""
        if self._broken:
            return
        try:
            action()
        except (OSError, ValueError):
            self._broken = True
