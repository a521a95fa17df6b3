"""Live progress: a panel on a terminal, one plain line per interval elsewhere."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from acktr.train import TrainStats

WINDOW = 60.0
"""Seconds over which speed and shares of time are taken."""

PARTS = ("env", "forward", "update", "refresh")
"""Parts of the time; the refresh of eigenbases and inverses is included in the update."""

PANEL_INTERVAL = 0.25
"""Seconds between two panels."""

BAR_WIDTH = 40
"""Characters of a panel's bar."""


@dataclass(frozen=True)
class Rates:
    """Speed over the window."""

    steps_per_second: float
    """Environment steps per second; NaN while unknown."""
    shares: dict[str, float]
    """Share of the wall time, 0 to 1, by part; only those that were reported."""


class Meter:
    """Speed and shares of time over a sliding window, so that estimates are stable."""

    def __init__(self, now: float, timesteps: int, window: float = WINDOW) -> None:
        """Start at ``timesteps`` at time ``now`` (seconds)."""
        self._window = window
        self._samples: deque[tuple[float, int, dict[str, float]]] = deque([(now, timesteps, {})])

    def add(self, now: float, timesteps: int, seconds: dict[str, float]) -> None:
        """Record the end of an update and the seconds that its parts took."""
        self._samples.append((now, timesteps, seconds))
        while len(self._samples) > 2 and self._samples[1][0] <= now - self._window:
            self._samples.popleft()

    def rates(self) -> Rates:
        """Averages from the oldest sample in the window to the newest."""
        first, last = self._samples[0], self._samples[-1]
        elapsed = last[0] - first[0]
        if elapsed <= 0:
            return Rates(math.nan, {})
        sums: dict[str, float] = {}
        for _, _, seconds in list(self._samples)[1:]:
            for part, value in seconds.items():
                sums[part] = sums.get(part, 0.0) + value
        shares = {part: sums[part] / elapsed for part in PARTS if part in sums}
        return Rates((last[1] - first[1]) / elapsed, shares)


class Screen:
    """A text stream with lines and, on a terminal, one live panel below them.

    A stream that fails (closed pipe, full disk) is given up silently: that must stop nothing.

    Args:
        stream: Where to write; standard error if None.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._broken = False
        self._live: Live | None = None
        console = Console(file=self._stream)
        if self._stream.isatty() and not console.is_dumb_terminal:
            self._live = Live(console=console, auto_refresh=False)

    @property
    def live(self) -> bool:
        """Whether there can be a panel."""
        return self._live is not None

    def note(self, text: str) -> None:
        """Write a line (above the panel), without control characters."""
        line = printable(text)

        def write() -> None:
            if self._live is None:
                self._stream.write(line + "\n")
                self._stream.flush()
            else:
                self._live.console.print(Text(line))

        self._guard(write)

    def show(self, panel: Panel) -> None:
        """Replace the panel; nothing where there can be none."""
        live = self._live
        if live is not None:
            self._guard(live.start)
            self._guard(lambda: live.update(panel, refresh=True))

    def close(self) -> None:
        """Leave the panel as it is; further calls do nothing."""
        if self._live is not None:
            with contextlib.suppress(OSError, ValueError):
                self._live.stop()

    def _guard(self, action: Callable[[], object]) -> None:
        if self._broken:
            return
        try:
            action()
        except (OSError, ValueError):
            self._broken = True


class Progress:
    """Shows how training goes on a text stream; a stream that fails is given up silently."""

    def __init__(
        self,
        total_timesteps: int,
        *,
        start_timesteps: int = 0,
        interval: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show nothing yet; the clock of speed and ETA starts now.

        Args:
            total_timesteps: Environment steps at the end of training.
            start_timesteps: Steps already done (when resuming).
            interval: Seconds between plain lines.
            stream: Where to write; standard error by default.
            clock: Seconds.
        """
        self._total = total_timesteps
        self._interval = interval
        self._screen = Screen(stream)
        self._clock = clock
        self._meter = Meter(clock(), start_timesteps)
        self._stats: TrainStats | None = None
        self._return: float | None = None
        self._next = -math.inf
        self._shown = True

    def header(self, lines: Sequence[str]) -> None:
        """Write the first lines: preset, protocol and so on."""
        for line in lines:
            self.note(line)

    def note(self, text: str) -> None:
        """Write a line (above the panel)."""
        self._screen.note(text)

    def update(self, stats: TrainStats, ep_rew_mean: float | None) -> None:
        """Take in one update and show it when it is time to."""
        now = self._clock()
        seconds = {
            part: stats.metrics[f"time/{part}"] for part in PARTS if f"time/{part}" in stats.metrics
        }
        self._meter.add(now, stats.timesteps, seconds)
        self._stats, self._return, self._shown = stats, ep_rew_mean, False
        if now >= self._next:
            self._next = now + (PANEL_INTERVAL if self._screen.live else self._interval)
            self._show()

    def close(self) -> None:
        """Show the last update if it was not shown; further calls do nothing."""
        if not self._shown:
            self._show()
        self._screen.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _show(self) -> None:
        if self._stats is None:
            return
        self._shown = True
        fields = self._fields(self._stats)
        if self._screen.live:
            self._screen.show(self._panel(fields, self._stats.timesteps))
        else:
            self._screen.note("  ".join(f"{name} {value}".strip() for name, value in fields))

    def _fields(self, stats: TrainStats) -> list[tuple[str, str]]:
        """Name and value of what is shown."""
        rates = self._meter.rates()
        speed = rates.steps_per_second
        share = stats.timesteps / max(self._total, 1)
        left = max(self._total - stats.timesteps, 0)
        kl = stats.metrics.get("train/approx_kl")
        fields = [
            ("steps", f"{stats.timesteps:,}/{self._total:,} ({share:.1%})"),
            ("steps/s", "-" if math.isnan(speed) else f"{speed:,.0f}"),
            ("ETA", duration(left / speed) if speed > 0 else "-"),
            ("return", "-" if self._return is None else f"{self._return:,.1f}"),
            ("KL", "-" if kl is None else f"{kl:.2g}"),
        ]
        if rates.shares:
            parts = [f"{part} {value:.0%}" for part, value in rates.shares.items()]
            fields.append(("time", ", ".join(parts)))
        return fields

    def _panel(self, fields: Sequence[tuple[str, str]], timesteps: int) -> Panel:
        grid = Table.grid(padding=(0, 2))
        grid.add_row("", ProgressBar(self._total, min(timesteps, self._total), width=BAR_WIDTH))
        for name, value in fields:
            grid.add_row(Text(name, style="dim"), Text(value))
        return Panel(grid, title="acktr", title_align="left", expand=False)


def duration(seconds: float) -> str:
    """H:MM:SS, days before it if there are any."""
    days, rest = divmod(round(seconds), 86_400)
    clock = f"{rest // 3600}:{rest % 3600 // 60:02}:{rest % 60:02}"
    return f"{days}d {clock}" if days else clock


def printable(text: str) -> str:
    """The text without control characters, which could drive the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
