"""A process that steps some of the environments of a vector."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import select
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

from acktr.envs.chunk import Chunk
from acktr.envs.guard import one_line
from acktr.envs.settings import EnvError, EnvFault

STEP, RESET, _CLOSE = b"s", b"r", b"c"
_DONE, _FAILED = b"d", b"f"
_SIZE = 2
"""Bytes of a message: what, and the number of the command, so that late answers are told apart."""

_SPIN = 1e-3
"""Seconds for which a reader asks again and again before it sleeps; waking costs a step or more."""
_SLICE = 1.0
"""Seconds of each wait. Only waits that end count, so that a suspended process is not late."""
_GRACE = 5.0
"""Seconds that a process has to end by itself."""
_TEXT = 4096
"""Bytes of an error message."""
_IGNORED = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
"""Signals that are the main process's to handle, also where a whole process group gets them."""
_PR_SET_PDEATHSIG = 1


class Worker:
    """Steps a chunk in a forked process, which owns the chunk's environments from then on.

    Nothing is pickled: commands and answers are two bytes in pipes, and everything else is in
    memory that both share. The process ignores Ctrl-C and SIGTERM, and ends with its parent.
    Linux only.

    Args:
        chunk: What it steps.
        others: Workers of the same vector that exist already.

    Raises:
        EnvError: The process cannot be started.
    """

    def __init__(self, chunk: Chunk, others: Sequence[Worker]) -> None:
        self._label = chunk.label
        self._owner = os.getpid()
        self._number = 0
        self._text = mmap.mmap(-1, _TEXT)
        self._gone: str | None = None
        self._closed = False
        ends: list[int] = []
        try:
            ends += os.pipe()
            ends += os.pipe()
            theirs, self._commands, self._answers, answers = ends
            for end in ends:
                os.set_blocking(end, False)
            child = _Child(chunk, theirs, answers, self._text)
            mine = [end for worker in others for end in (worker._commands, worker._answers)]
            self._pid = _fork(child.run, [*mine, self._commands, self._answers])
        except OSError as error:
            for end in ends:
                os.close(end)
            raise EnvError(
                f"no process can be started for {self._label} ({one_line(error)}); "
                "set env_workers to 1"
            ) from error
        os.close(theirs)
        os.close(answers)
        self._poller = select.poll()
        self._poller.register(self._answers, select.POLLIN)

    @property
    def pid(self) -> int:
        """The process."""
        return self._pid

    def send(self, command: bytes) -> None:
        """Start a command; an answer to an earlier one that nobody waited for will be skipped."""
        self._number = (self._number + 1) % 256
        if self._gone is None:
            with suppress(BrokenPipeError, BlockingIOError):  # the answer will not come
                os.write(self._commands, command + bytes([self._number]))

    def receive(self, deadline: float) -> None:
        """Wait until the command is done.

        Args:
            deadline: Seconds after which the process is killed.

        Raises:
            EnvFault: An environment failed, or the process died or did not answer.
        """
        if self._gone is not None:
            raise EnvFault(self._gone)
        waited = 0.0
        while True:
            answer = _read(self._answers)
            if answer is None:
                if waited >= deadline:
                    raise self._lost(f"did not answer for {deadline:g} s")
                wait = min(_SLICE, deadline - waited)
                waited += 0.0 if self._poller.poll(wait * 1000) else wait
            elif len(answer) < _SIZE:
                raise self._lost("")
            elif answer[1] == self._number:
                break
        if answer[:1] == _FAILED:
            raise EnvFault(self._text[:].rstrip(b"\0").decode("utf-8", "replace"))

    def ask_to_end(self) -> None:
        """Let the process end by itself, without waiting for it."""
        if os.getpid() == self._owner:
            self.send(_CLOSE)

    def end(self) -> None:
        """End the process, by force if it does not by itself, and wait for that."""
        if os.getpid() != self._owner or self._closed:
            return
        self._closed = True
        if self._gone is None:
            self._kill(_GRACE)
            self._gone = f"the process that steps {self._label} is closed"
        os.close(self._commands)
        os.close(self._answers)

    def _lost(self, why: str) -> EnvFault:
        code = self._kill(0.0 if why else _GRACE)
        if not why:
            why = "is gone" if code is None else _how(code)
        self._gone = f"the process that steps {self._label} {why}"
        return EnvFault(self._gone)

    def _kill(self, grace: float) -> int | None:
        """Kill the process if it does not end by itself; its exit status, None if unknown."""
        with suppress(ChildProcessError, ProcessLookupError):
            found = _wait(self._pid, grace)
            if found is not None:
                return found
            os.kill(self._pid, signal.SIGKILL)
            return _wait(self._pid, _GRACE)
        return None


class _Child:
    """What the process does.

    Args:
        chunk: What it steps.
        commands: Pipe to read from.
        answers: Pipe to write to.
        text: Memory for error messages.
    """

    def __init__(self, chunk: Chunk, commands: int, answers: int, text: mmap.mmap) -> None:
        self._chunk = chunk
        self._commands, self._answers = commands, answers
        self._text = text
        self._parent = os.getpid()

    def run(self) -> None:
        """Obey until the other side is closed or gone."""
        poller = select.poll()
        poller.register(self._commands, select.POLLIN)
        while True:
            command = _read(self._commands)
            if command is None:
                if os.getppid() != self._parent:
                    return
                poller.poll(_SLICE * 1000)
            elif len(command) < _SIZE or command[:1] == _CLOSE:
                self._chunk.close()
                return
            else:
                answer = self._obey(command[:1])
                os.write(self._answers, answer + command[1:])

    def _obey(self, command: bytes) -> bytes:
        try:
            if command == STEP:
                self._chunk.step()
            else:
                self._chunk.reset()
        except BaseException as error:
            known = isinstance(error, EnvFault)
            text = str(error) if known else f"{type(error).__name__}: {one_line(error)}"
            data = (text if known else f"{self._chunk.label}: {text}").encode()[:_TEXT]
            self._text[:] = data.ljust(_TEXT, b"\0")
            return _FAILED
        return _DONE


def end_all(workers: Sequence[Worker]) -> None:
    """End processes, all at once."""
    for worker in workers:
        worker.ask_to_end()
    for worker in workers:
        worker.end()


def end_with(owner: object, workers: Sequence[Worker]) -> None:
    """End processes when their owner is collected, or the interpreter ends."""
    weakref.finalize(owner, end_all, workers)


def _fork(run: Callable[[], None], foreign: Sequence[int]) -> int:
    """Run something in a new process, without the descriptors in `foreign`; returns its id."""
    parent, libc = os.getpid(), ctypes.CDLL(None)
    # The signal would come when the thread ends that forks, so that only the main one may ask.
    dies_with = threading.current_thread() is threading.main_thread()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    with _blocked(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 and others warn of threads, which only wait
        pid = os.fork()
        if pid == 0:
            if dies_with:
                libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
            _serve(run, foreign, parent)
    return pid


def _serve(run: Callable[[], None], foreign: Sequence[int], parent: int) -> NoReturn:
    """The whole life of a process; nothing of its parent's stack or exit handlers runs in it."""
    code = 1
    try:
        gc.freeze()  # what the parent made is not for this process to collect
        signal.set_wakeup_fd(-1)
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
        for end in foreign:
            os.close(end)
        if os.getppid() == parent:
            run()
        code = 0
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code)


@contextmanager
def _blocked() -> Iterator[None]:
    """Hold back the signals that the new process ignores, until it does."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _read(end: int) -> bytes | None:
    """The next message: None if it takes long, nothing if the other side is gone.

    A system call in each turn lets the other process run if they share a core, and orders memory.
    """
    until = time.perf_counter() + _SPIN
    while True:
        try:
            return os.read(end, _SIZE)
        except BlockingIOError:
            pass
        if time.perf_counter() > until:
            return None
        os.sched_yield()


def _wait(pid: int, seconds: float) -> int | None:
    """Exit status of a child, None if it still runs after so many seconds."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.001)


def _how(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
