"""Signals as an orderly stop, and the end of the process that one was started by."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from _thread import start_new_thread
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import Any

_CODES = {"SIGINT": 130, "SIGTERM": 75, "SIGHUP": 75, "SIGUSR1": 75}
STOPPED = {getattr(signal, name): code for name, code in _CODES.items() if hasattr(signal, name)}
"""The signals that stop a program, and its exit codes then."""

_ALWAYS = (signal.SIGINT, signal.SIGTERM)
"""Those that stop it also if they were ignored: a shell ignores SIGINT for its background jobs."""

BURST = 1.0
"""Seconds in which further signals count as the same request: schedulers and terminals send two."""
PATIENCE = 8.0
"""Seconds for which a first signal waits for what may be broken off."""
_LOOK = 0.5
"""Seconds between two attempts at that."""
_ATTEMPTS = 8
"""How many of them are made before the process is ended from another thread."""
PARENT = "ACKTR_PARENT"
"""Variable with the descriptor of a pipe whose other end the parent has as long as it lives."""
_ORPHAN = 20.0
"""Seconds that a process has to end by itself after its parent."""


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


def _never() -> bool:
    return False


def _silent(signum: int) -> str:
    return "stopped"


class Interrupts:
    """While entered, the signals of ``STOPPED`` raise :class:`Stopped` in the main thread.

    Inside :meth:`deferred` the first one is only recorded in ``requested``; a second one raises.
    Signals less than ``BURST`` seconds after one that counted do not count. A third one ends the
    process at once, with the signal's exit code: what the second one raised in may hang as well.
    An ignored SIGHUP stays ignored (``nohup``), and so does an ignored SIGUSR1.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.requested: int | None = None
        self._clock = clock
        self._counted, self._last = 0, -math.inf
        self._waits = False
        self._breakable: Callable[[], bool] = _never
        self._leaving: Callable[[int], str] = _silent
        self._nudged = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPED:
                if number in _ALWAYS or signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def deferred(
        self,
        breakable: Callable[[], bool] = _never,
        leaving: Callable[[int], str] = _silent,
    ) -> AbstractContextManager[None]:
        """Record the first signal in ``requested`` instead of raising.

        ``breakable`` says whether what is done just now may be broken off. If it may ``PATIENCE``
        seconds after the first signal, or whenever later, :class:`Stopped` is raised after all.
        Where that does not help for some seconds, because C code does not return, ``leaving`` is
        called in another thread with the signal, and the process ends with the line it returns.
        """
        return self._waiting(True, breakable, leaving)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside :meth:`deferred`: raise after all, also for a signal recorded before."""
        with self._waiting(False, _never, _silent):
            self.check()
            yield

    def check(self) -> None:
        """Raise Stopped if a signal was recorded."""
        if self.requested is not None:
            raise Stopped(self.requested)

    @contextmanager
    def _waiting(
        self, waits: bool, breakable: Callable[[], bool], leaving: Callable[[int], str]
    ) -> Iterator[None]:
        before = self._waits, self._breakable, self._leaving
        self._waits, self._breakable, self._leaving = waits, breakable, leaving
        try:
            yield
        finally:
            self._waits, self._breakable, self._leaving = before

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._nudged:
            self._nudged = False
            if self._breakable():
                raise Stopped(signum if self.requested is None else self.requested)
            return
        now = self._clock()
        if now - self._last < BURST:
            return
        self._counted, self._last = self._counted + 1, now
        if self._counted > 2:
            os.write(2, b"\nacktr: killed by a third signal\n")
            os._exit(STOPPED[signal.Signals(signum)])
        self.requested = signum
        if self._counted > 1 or not self._waits:
            raise Stopped(signum)
        if hasattr(signal, "pthread_kill"):
            start_new_thread(self._nudge, (signum,))  # threading's lock may be held just now

    def _nudge(self, signum: int) -> None:
        """Let the handler look again from time to time, also out of a system call that waits."""
        time.sleep(PATIENCE)
        main, attempts = threading.main_thread().ident, 0
        while main is not None and self._previous and self._counted == 1:
            if self._breakable():
                attempts += 1
                if attempts > _ATTEMPTS:
                    os.write(2, f"\nacktr: {self._leaving(signum)}\n".encode())
                    os._exit(STOPPED[signal.Signals(signum)])
                self._nudged = True
                signal.pthread_kill(main, signum)
            time.sleep(_LOOK)


def end_with_parent() -> None:
    """Take the end of the parent, which ``PARENT`` tells about, as a SIGTERM.

    The process ends ``_ORPHAN`` seconds later if it has not ended by itself. Nothing happens
    without the variable, which processes of this one do not get.
    """
    given = os.environ.pop(PARENT, "")
    if not given.isdigit():
        return

    def watch() -> None:
        with suppress(OSError):
            while os.read(int(given), 1):
                pass
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(_ORPHAN)
            os._exit(STOPPED[signal.SIGTERM])

    threading.Thread(target=watch, name="parent", daemon=True).start()
