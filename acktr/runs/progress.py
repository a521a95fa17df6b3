"""Live progress: a panel on a terminal, one plain line per interval elsewhere."""

from __future__ import annotations

import contextlib
import math
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, RenderableType
from rich.constrain import Constrain
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

_BAR_WIDTH = 40
_ECHO = len("^C")
"""Columns right of a panel for what the terminal writes at its end when Ctrl-C is pressed: on a
line more, rich would not find the panel's first line again."""

_BLOCKS = "▁▂▃▄▅▆▇█"


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

    def speed(self) -> float:
        """Environment steps per second, from the oldest sample to the newest; NaN while unknown."""
        elapsed = self._elapsed()
        return (self._samples[-1][1] - self._samples[0][1]) / elapsed if elapsed > 0 else math.nan

    def shares(self) -> dict[str, float]:
        """Share of the wall time, 0 to 1, by part; only those that were reported."""
        sums: dict[str, float] = {}
        for _, _, seconds in islice(self._samples, 1, None):
            for part, value in seconds.items():
                sums[part] = sums.get(part, 0.0) + value
        elapsed = self._elapsed()
        return {part: sums[part] / elapsed for part in PARTS if part in sums and elapsed > 0}

    def _elapsed(self) -> float:
        return self._samples[-1][0] - self._samples[0][0]


class Display:
    """Lines on a text stream and, on a terminal, a panel below them.

    Elsewhere a line takes the panel's place, once per interval. A stream that fails (a closed pipe,
    a full disk) is given up silently, as that must stop nothing.

    Args:
        title: Title of the panel.
        interval: Seconds between two lines; panels come every quarter of a second.
        stream: Where to write; standard error if None.
        clock: Seconds.
    """

    def __init__(
        self,
        title: str,
        interval: float,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title = title
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._broken = False
        self._live: Live | None = None
        console = Console(file=self._stream)
        if self._stream.isatty() and not console.is_dumb_terminal:
            self._live = Live(console=console, auto_refresh=False)
        self._interval = PANEL_INTERVAL if self.live else interval
        self._next = -math.inf

    @property
    def draws(self) -> bool:
        """Whether there is a panel in which block characters can be seen."""
        try:
            _BLOCKS.encode(getattr(self._stream, "encoding", None) or "ascii")
        except (UnicodeError, LookupError):
            return False
        return self.live

    @property
    def live(self) -> bool:
        """Whether there is a panel rather than lines."""
        return self._live is not None

    def note(self, text: str) -> None:
        """Write a line (above the panel), without control characters."""
        if self._live is not None:
            self._guard(self._live.console.print, Text(printable(text)))
        else:
            self._guard(self._stream.write, printable(text) + "\n")
            self._guard(self._stream.flush)

    def due(self) -> bool:
        """Whether it is time to show something; if so, the next interval begins."""
        now = self._clock()
        if now < self._next:
            return False
        self._next = now + self._interval
        return True

    def show(self, line: str, done: int, total: int, *rows: RenderableType) -> None:
        """Draw the panel anew, a bar and rows below it, or write the line where there is none."""
        if self._live is None:
            self.note(line)
            return
        grid = Table.grid()
        for row in (ProgressBar(max(total, 1), min(done, total), width=_BAR_WIDTH), *rows):
            grid.add_row(row)
        panel = Panel(grid, title=self._title, title_align="left", expand=False)
        narrower = Constrain(panel, self._live.console.width - _ECHO)
        self._guard(self._live.start)
        self._guard(self._live.update, narrower, refresh=True)

    def hide(self) -> None:
        """Take the panel away, so that others may write; what is shown next brings it back."""
        if self._live is not None:
            self._live.transient = True
            self.close()
            self._live = Live(console=self._live.console, auto_refresh=False)

    def close(self) -> None:
        """Leave the panel as it is; further calls do nothing."""
        if self._live is not None:
            with contextlib.suppress(OSError, ValueError):
                self._live.stop()

    def _guard(self, action: Callable[..., object], *args: object, **options: object) -> None:
        if not self._broken:
            try:
                action(*args, **options)
            except (OSError, ValueError):
                self._broken = True


class Sparkline:
    """A line of block characters from the values so far, which need little room however many.

    Each character is the mean of as many values in a row; when there are too many of them for the
    width, two become one.
    """

    def __init__(self, width: int = _BAR_WIDTH) -> None:
        self._width = width
        self._sums: list[float] = []
        self._apart, self._count = 1, 0
        """Values of a character, and those of the last one."""

    def add(self, value: float) -> None:
        """Take in a value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        if not self._sums or self._count == self._apart:
            if len(self._sums) == self._width:
                pairs = zip(self._sums[::2], self._sums[1::2], strict=True)
                self._sums, self._apart = [a + b for a, b in pairs], 2 * self._apart
            self._sums.append(0.0)
            self._count = 0
        self._sums[-1] += value
        self._count += 1

    def __str__(self) -> str:
        """The characters, from the lowest mean to the highest."""
        if not self._sums:
            return ""
        means = [each / self._apart for each in self._sums[:-1]]
        means.append(self._sums[-1] / self._count)
        low, high = min(means), max(means)
        scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
        return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


class Progress:
    """Shows how the training of a run goes, which begins now, on a :class:`Display`.

    A resumed run has done ``start_timesteps`` of its ``total_timesteps`` already.
    """

    def __init__(
        self,
        total_timesteps: int,
        *,
        start_timesteps: int = 0,
        interval: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_timesteps
        self._display = Display("acktr", interval, stream, clock)
        self._clock = clock
        self._meter = Meter(clock(), start_timesteps)
        self._unseen: tuple[TrainStats, float | None] | None = None
        self._newest: tuple[TrainStats, float | None] | None = None
        self._curve = Sparkline()
        self._last: tuple[float, int] | None = None
        self._best: tuple[float, int] | None = None

    def evaluated(self, mean: float, timesteps: int) -> None:
        """Take in the mean return of an evaluation, for the panel."""
        self._last = (mean, timesteps)
        if self._best is None or mean > self._best[0]:
            self._best = self._last
        if self._display.live:  # the panel of the last update knows no evaluation after it
            self._unseen = self._newest

    def note(self, text: str) -> None:
        """Write a line (above the panel)."""
        self._display.note(text)

    def update(self, stats: TrainStats, ep_rew_mean: float | None) -> None:
        """Take in one update and show it when it is time to."""
        times = {part: stats.metrics.get(f"time/{part}") for part in PARTS}
        seconds = {part: value for part, value in times.items() if value is not None}
        self._meter.add(self._clock(), stats.timesteps, seconds)
        if ep_rew_mean is not None:
            self._curve.add(ep_rew_mean)
        self._unseen = self._newest = stats, ep_rew_mean
        if self._display.due():
            self._show()

    def close(self) -> None:
        """Show the last update if it was not shown; further calls do nothing."""
        self._show()
        self._display.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self) -> None:
        if self._unseen is None:
            return
        stats, mean_return = self._unseen
        self._unseen = None
        kl = stats.metrics.get("train/approx_kl")
        speed, eta = pace(stats.timesteps, self._total, self._meter.speed())
        fields = {
            "steps": share(stats.timesteps, self._total),
            "steps/s": speed,
            "ETA": eta,
            "return": score(mean_return),
            "KL": "-" if kl is None else f"{kl:.2g}",
        }
        shares = self._meter.shares()
        if shares:
            fields["time"] = ", ".join(f"{part} {value:.0%}" for part, value in shares.items())
        line = "  ".join(f"{name} {value}" for name, value in fields.items())
        grid = Table.grid(padding=(0, 2))
        for name, value in (fields | self._more(stats)).items():
            grid.add_row(Text(name, style="dim"), Text(value))
        self._display.show(line, stats.timesteps, self._total, grid)

    def _more(self, stats: TrainStats) -> dict[str, str]:
        """What a panel has room for besides the fields of a line."""
        more = {}
        if self._display.draws and str(self._curve):
            more["curve"] = str(self._curve)
        if self._last is not None and self._best is not None:
            more["evaluation"] = f"{score(self._last[0])} at step {self._last[1]:,}"
            more["best"] = f"{score(self._best[0])} at step {self._best[1]:,}"
        entropy = stats.metrics.get("train/entropy_loss")
        explained = stats.metrics.get("train/explained_variance")
        if entropy is not None:
            more["entropy"] = f"{-entropy:.3g}"
        if explained is not None:
            more["explained"] = f"{explained:.2f} of the returns' variance"
        if failures := stats.metrics.get("kfac/failures"):
            more["failures"] = f"{failures:.0f} decompositions, whose former ones were kept"
        return more


class Quiet(Progress):
    """Shows nothing; warnings among the lines are Python's."""

    def note(self, text: str) -> None:
        """Warn if the line is a warning."""
        kind, _, what = text.partition(": ")
        if kind == "warning":
            warnings.warn(what, UserWarning, stacklevel=2)

    def update(self, stats: TrainStats, ep_rew_mean: float | None) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Nothing to do."""


def counting(
    display: Display, doing: str, clock: Callable[[], float] = time.monotonic
) -> Callable[[int, int], None]:
    """A function that shows how many of all are done and how long the rest will take."""
    started = clock()
    display.due()  # nothing is shown before the first interval is over

    def show(count: int, total: int) -> None:
        if display.due():
            _, eta = pace(count, total, count / max(clock() - started, 1e-9))
            line = f"{doing} {share(count, total)}  ETA {eta}"
            display.show(line, count, total, line)

    return show


def share(done: int, total: int) -> str:
    """The count and the total, and the share in percent, at most 100: updates are whole."""
    return f"{done:,}/{total:,} ({min(done / max(total, 1), 1):.1%})"


def pace(done: int, total: int, speed: float) -> tuple[str, str]:
    """Speed and time to the end; a dash while unknown."""
    if not speed > 0:
        return "-", "-"
    return f"{speed:,.0f}", duration(max(total - done, 0) / speed)


def score(value: float | None) -> str:
    """A return for people: one decimal, or three digits of a small one such as 0.56."""
    if value is None:
        return "-"
    return f"{value:,.1f}" if not abs(value) < 10 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """H:MM:SS, days before it if there are any."""
    days, rest = divmod(round(seconds), 86_400)
    clock = f"{rest // 3600}:{rest % 3600 // 60:02}:{rest % 60:02}"
    return f"{days}d {clock}" if days else clock


def printable(text: str) -> str:
    """The text without control characters, which could drive the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
