"""Seconds that the parts of an update take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from acktr.kfac.linalg import float32_products


class Stopwatch:
    """Adds up the wall-clock seconds of named parts of the work.

    Args:
        parts: Names of some that are there from the start.
    """

    def __init__(self, parts: tuple[str, ...] = ()) -> None:
        self.seconds = dict.fromkeys(parts, 0.0)

    def part(self, name: str) -> AbstractContextManager[None]:
        """Count the time inside the context; parts inside of others are counted in both."""
        return _Part(self.seconds, name)


class _Part:
    """A context that is entered hundreds of times in an update, for which a generator is slow."""

    __slots__ = ("_name", "_seconds", "_started")

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name, self._started = seconds, name, 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self._started
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + spent


class Clock(Stopwatch):
    """A stopwatch whose parts run at their own precision also inside autocast.

    Args:
        parts: Their names.
        device: Where they run.
        fast: Whether float32 products in them are those of the faster library.
    """

    def __init__(self, parts: tuple[str, ...], device: torch.device, *, fast: bool = False) -> None:
        super().__init__(parts)
        self._device, self._fast = device, fast

    def part(self, name: str) -> AbstractContextManager[None]:
        """Context of one part."""
        counted = super().part(name)
        if self._fast or torch.is_autocast_enabled(self._device.type):
            return self._precise(counted)
        return counted

    @contextmanager
    def _precise(self, counted: AbstractContextManager[None]) -> Iterator[None]:
        products = float32_products(self._device) if self._fast else nullcontext()
        with counted, torch.autocast(self._device.type, enabled=False), products:
            yield
