"""SIGINT and SIGTERM as an orderly stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

STOPPED = {signal.SIGINT: 130, signal.SIGTERM: 75}
"""The signals that stop a program, and its exit codes then."""


class Stopped(KeyboardInterrupt):
    """The program was asked to stop.

    Args:
        signum: The signal.
        note: What the user should know, one line.
    """

    def __init__(self, signum: int, note: str = "stopped") -> None:
        super().__init__(note)
        self.signum = signum
        self.note = note


class Interrupts:
    """While entered, SIGINT and SIGTERM raise :class:`Stopped` in the main thread.

    Inside :meth:`deferred` the first one is only recorded in ``requested``; a second one raises.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._waits = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPED:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def deferred(self) -> AbstractContextManager[None]:
        """Record the first signal in ``requested`` instead of raising."""
        return self._waiting(True)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside :meth:`deferred`: raise after all, also for a signal recorded before."""
        with self._waiting(False):
            self.check()
            yield

    def check(self) -> None:
        """Raise Stopped if a signal was recorded."""
        if self.requested is not None:
            raise Stopped(self.requested)

    @contextmanager
    def _waiting(self, waits: bool) -> Iterator[None]:
        before, self._waits = self._waits, waits
        try:
            yield
        finally:
            self._waits = before

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        first, self.requested = self.requested is None, signum
        if not (first and self._waits):
            raise Stopped(signum)


@contextmanager
def hangup_terminates() -> Iterator[None]:
    """A closed terminal (SIGHUP) counts as SIGTERM, unless something handles or ignores it."""
    hangup = getattr(signal, "SIGHUP", None)
    in_main = threading.current_thread() is threading.main_thread()
    if hangup is None or not in_main or signal.getsignal(hangup) != signal.SIG_DFL:
        yield
        return
    signal.signal(hangup, lambda number, frame: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(hangup, signal.SIG_DFL)
