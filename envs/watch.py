"""A limit to the time that one call into an environment may take in this process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

TIMEOUT = 300.0
"""Seconds that making, resetting, stepping or closing an environment may take by default.

Simulators that start a game or a server need one to three minutes for a reset.
"""

_SIGNAL = getattr(signal, "SIGURG", None)
"""Signal that wakes the main thread up: nobody is harmed by it, as it is ignored by default."""
_TICK = 1.0
"""Most seconds between two looks at what is under way."""

_watches: list[Watch] = []
"""Those that may raise."""


class Late(BaseException):
    """A call into an environment took too long; no `except Exception` in there may swallow it."""


class Watch:
    """Raises `Late` in the main thread, out of a call that takes too long.

    A thread looks from time to time at what is under way, so that a call costs no more than to
    say so. Only what returns to Python now and then can be ended: C code that keeps the lock of
    the interpreter is out of reach, and so are calls in other threads than the main one.

    Args:
        doing: What is under way, another value for each call; None between calls.
        said: Such a value in words, as "environment 0 of X did not return from step 3".
        seconds: Seconds that a call may take. Time in which the process was suspended does not
            count.
    """

    def __init__(
        self, doing: Callable[[], Any], said: Callable[[Any], str], seconds: float
    ) -> None:
        self._doing, self._said, self._seconds = doing, said, seconds
        self._late: Any = None
        self._ended = threading.Event()
        if _prepare():
            _watches.append(self)
            self._thread = threading.Thread(target=self._look, name="environments", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._ended.set()
        if self in _watches:
            _watches.remove(self)
            if self._thread is not threading.current_thread():
                self._thread.join()
            if not _watches and _in_main() and signal.getsignal(_signal()) is _handle:
                signal.signal(_signal(), signal.SIG_DFL)

    def check(self) -> None:
        """Raise Late if what is under way is late."""
        if self._late is not None and self._doing() == self._late:
            raise Late(too_late(self._said(self._late), self._seconds))

    def _look(self) -> None:
        """Look whether it is still the same that is under way, until the end."""
        main = threading.main_thread().ident
        tick = min(_TICK, self._seconds / 4)
        seen, lasted = None, 0.0
        while not self._ended.wait(tick):
            doing = self._doing()
            lasted = lasted + tick if doing == seen else 0.0
            seen = doing
            self._late = seen if lasted >= self._seconds else None
            if self._late is not None and main is not None:
                signal.pthread_kill(main, _signal())


@contextmanager
def limited(what: str, seconds: float) -> Iterator[None]:
    """Raise Late out of a single call that takes too long.

    Args:
        what: The beginning of the message, as "environment 0 of X did not return from reset".
        seconds: How long it may take.
    """
    watch = Watch(lambda: what, str, seconds)
    try:
        yield
    finally:
        watch.stop()


def too_late(said: str, seconds: float) -> str:
    """The message about a call that takes too long, one line."""
    return f"{said} within {seconds:g} s; env_timeout sets the limit"


def _prepare() -> bool:
    """Handle the signal; whether that is possible."""
    if _SIGNAL is None or not _in_main():
        return False
    if signal.getsignal(_SIGNAL) == signal.SIG_DFL:
        signal.signal(_SIGNAL, _handle)
    return signal.getsignal(_SIGNAL) is _handle


def _handle(signum: int, frame: FrameType | None) -> None:
    for watch in tuple(_watches):
        watch.check()


def _in_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _signal() -> signal.Signals:
    assert _SIGNAL is not None
    return _SIGNAL  # type: ignore[no-any-return]
