"""Seconds that the parts of an update take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from acktr.kfac.linalg import float32_products


class Clock:
    """Sums up the time of each part, which runs at its own precision also inside autocast.

    Args:
        parts: Their names.
        device: Where they run.
        fast: Whether float32 products in them are those of the faster library.
    """

    def __init__(self, parts: tuple[str, ...], device: torch.device, *, fast: bool = False) -> None:
        self.seconds = dict.fromkeys(parts, 0.0)
        self._device, self._fast = device, fast

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Context of one part."""
        started, kind = time.perf_counter(), self._device.type
        products = float32_products(self._device) if self._fast else nullcontext()
        autocast = torch.is_autocast_enabled(kind)
        try:
            with torch.autocast(kind, enabled=False) if autocast else nullcontext(), products:
                yield
        finally:
            self.seconds[name] += time.perf_counter() - started
