"""Where the time goes: seconds by part, for the progress line and benchmarks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Clock:
    """Adds up the wall-clock seconds of named parts of the work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside the context; parts inside of others are counted in both."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def joined(*parts: Mapping[str, float]) -> dict[str, float]:
    """Sums by name."""
    total: dict[str, float] = {}
    for seconds in parts:
        for name, value in seconds.items():
            total[name] = total.get(name, 0.0) + value
    return total
