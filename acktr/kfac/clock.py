"""Seconds that the parts of an update take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


class Clock:
    """Sums up the time of each part, which runs at its own precision also inside autocast.

    Args:
        parts: Their names.
        device: Where they run.
    """

    def __init__(self, parts: tuple[str, ...], device: torch.device) -> None:
        self.seconds = dict.fromkeys(parts, 0.0)
        self._kind = device.type

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Context of one part."""
        started = time.perf_counter()
        autocast = torch.is_autocast_enabled(self._kind)
        try:
            with torch.autocast(self._kind, enabled=False) if autocast else nullcontext():
                yield
        finally:
            self.seconds[name] += time.perf_counter() - started
