"""A forked process that runs commands on memory which it shares with its parent; Linux only.

Nothing is pickled: commands and answers are two bytes in pipes, and everything else is in shared
memory. The process ignores Ctrl-C and SIGTERM, which are for its parent, and ends with it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import mmap
import os
import select
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from acktr.envs.errors import EnvError, EnvFault, EnvWarning, named, one_line
from acktr.envs.manners import SIGNALS
from acktr.envs.watch import too_late

CLOSE = b"c"
"""Command after which the process ends."""
_DONE, _FAILED, _REFUSED, _TOLD = b"d", b"f", b"r", b"t"
_SIZE = 2
"""Bytes of a message: what, and the number of the command, so that late answers are told apart."""

_FORGOTTEN = 64 * _SIZE
"""Bytes of answers that are forgotten at once; there are more of them if none was waited for."""
_SPIN = 1e-3
"""Seconds for which a reader asks again and again before it sleeps; waking costs a step or more."""
_SLICE = 1.0
"""Seconds of each wait. Only waits that end count, so that a suspended process is not late."""
_GRACE = 5.0
"""Seconds that a process has to end by itself."""
_TEXT = 16_384
"""Bytes of an error message, a line, and the traceback that belongs to it."""
_STACK = getattr(signal, "SIGURG", 0)
"""Signal upon which the process writes where it is."""
_STACK_PATIENCE = 0.5
"""Seconds for which its parent waits for that."""
_IGNORED = (*SIGNALS, *([signal.SIGUSR2] if hasattr(signal, "SIGUSR2") else []))
"""Signals that are the main process's to handle, also where a whole process group gets them."""
_PR_SET_PDEATHSIG = 1

Commands = Mapping[bytes, Callable[[], None]]
"""What to do for each command of one byte."""


class ForkedProcess:
    """Runs commands in a process of its own.

    Args:
        label: Name for messages of what the commands work on.
        commands: The commands, `CLOSE` among them; their objects belong to the process from now on.
        doing: What the process does just now, another value for each call of foreign code; None
            between commands.
        said: Such a value in words, as "environment 0 of X did not return from step 3".

    Raises:
        EnvError: The process cannot be started.
    """

    def __init__(
        self,
        label: str,
        commands: Commands,
        doing: Callable[[], Any],
        said: Callable[[Any], str],
    ) -> None:
        self._label = label
        self._doing, self._said = doing, said
        self.owner = os.getpid()
        self._number = 0
        self._text = mmap.mmap(-1, _TEXT)
        self._gone: str | None = None
        self._lost = False
        self._closed = False
        ends: list[int] = []
        try:
            ends += os.pipe()
            ends += os.pipe()
            requests, self._commands, self._answers, answers = ends
            for end in ends:
                os.set_blocking(end, False)
            self._stack = os.memfd_create("stack")
            ends.append(self._stack)
            self.pid = _fork(lambda: self._obey(commands, requests, answers))
        except OSError as error:
            for end in ends:
                os.close(end)
            raise EnvError(
                f"no process can be started for {label} ({one_line(error)}); set env_workers to 1"
            ) from error
        os.close(requests)
        os.close(answers)  # only the process has this end now: it is closed when the process dies
        self._poller = select.poll()
        self._poller.register(self._answers, select.POLLIN)

    def send(self, command: bytes) -> None:
        """Start a command; an answer to an earlier one that nobody waited for is forgotten.

        It would fill the pipe of answers otherwise, or is skipped if it comes later.
        """
        self._number = (self._number + 1) % 256
        if self._gone is None:
            with suppress(BlockingIOError):
                os.read(self._answers, _FORGOTTEN)
            with suppress(BrokenPipeError, BlockingIOError):  # the answer will not come
                os.write(self._commands, command + bytes([self._number]))

    def receive(self, timeout: float) -> None:
        """Wait until the command is done.

        Args:
            timeout: Seconds for each call of foreign code, after which the process is killed.

        Raises:
            EnvFault: The command failed, or the process died or did not answer.
            EnvError: Something that was asked for is not there.
        """
        if self._gone is not None:
            raise EnvFault(self._gone)
        waited, seen = 0.0, None
        while True:
            answer = _read(self._answers)
            if answer is None:
                doing = self._doing()
                waited, seen = (waited if doing == seen else 0.0), doing
                if waited >= timeout:
                    raise self._late(timeout)
                wait = min(_SLICE, timeout - waited)
                waited += 0.0 if self._poller.poll(wait * 1000) else wait
            elif not answer:
                raise self._dead()
            elif answer[1] == self._number:
                break
        if answer[:1] != _DONE:
            line, trace = self._told()
            if answer[:1] == _REFUSED:
                raise EnvError(line)
            if answer[:1] == _TOLD:
                warnings.warn(line, EnvWarning, stacklevel=2)
            else:
                raise _noted(EnvFault(line), trace)

    def end(self) -> None:
        """End the process, by force if it does not by itself, and wait for that."""
        if self._closed:
            return
        self._closed = True
        if self._gone is None:
            code, forced = self._kill(_GRACE)
            self._gone = f"the process of {self._label} is closed"
            if forced:
                said = f"{self._label} did not close within {_GRACE:g} s: the process was killed"
            else:
                said = self._last_words(code)
            if said:
                warnings.warn(said, EnvWarning, stacklevel=2)
        for end in (self._commands, self._answers, self._stack):
            os.close(end)

    @property
    def lost(self) -> bool:
        """Whether the process ended before it closed what it had."""
        return self._lost

    def _last_words(self, code: int | None) -> str:
        """What went wrong when the process was closed; nothing if nothing did."""
        while answer := _read(self._answers):
            if answer[1] == self._number:
                return "" if answer[:1] == _DONE else self._told()[0]
        gone = f"the process of {self._label} {_ended(code)} before it had closed"
        return gone if code else ""

    def _late(self, timeout: float) -> EnvFault:
        """End the process, and tell what it was doing for so long, and where."""
        doing, trace = self._doing(), ""
        with suppress(ProcessLookupError):
            os.kill(self.pid, _STACK)
            until = time.monotonic() + _STACK_PATIENCE
            while time.monotonic() < until and not trace.endswith("\n"):
                time.sleep(0.05)
                trace = self._trace()
        said = f"the process of {self._label} did not answer"
        self._gone = too_late(said if doing is None else self._said(doing), timeout)
        self._kill(0.0)
        self._lost = True
        return _noted(EnvFault(self._gone), trace)

    def _dead(self) -> EnvFault:
        code, _ = self._kill(_GRACE)
        self._lost = True
        doing = self._doing()
        self._gone = f"the process of {self._label} {_ended(code)}"
        if doing is not None:
            self._gone += f": {self._said(doing)}"
        return _noted(EnvFault(self._gone), self._trace())

    def _trace(self) -> str:
        """Where the process was when it was asked, or when it crashed; nothing if neither."""
        return os.pread(self._stack, _TEXT, 0).decode("utf-8", "replace")

    def _told(self) -> tuple[str, str]:
        """What the process has said: one line, and a traceback."""
        line, _, trace = self._text[:].rstrip(b"\0").decode("utf-8", "replace").partition("\n")
        return line, trace

    def _kill(self, grace: float) -> tuple[int | None, bool]:
        """Kill the process if it does not end by itself.

        Returns:
            Its exit status, None if unknown, and whether it had to be killed.
        """
        with suppress(ChildProcessError, ProcessLookupError):
            code = _wait(self.pid, grace)
            if code is not None:
                return code, False
            os.kill(self.pid, signal.SIGKILL)
            return _wait(self.pid, _GRACE), True
        return None, False

    def _obey(self, commands: Commands, requests: int, answers: int) -> None:
        """Run commands in the process, until `CLOSE` or the parent's end."""
        parent, told = os.getppid(), _kept_warnings()
        faulthandler.register(_STACK, file=self._stack)
        faulthandler.enable(file=self._stack)
        poller = select.poll()
        poller.register(requests, select.POLLIN)
        while True:
            command = _read(requests)
            if command is None:
                if os.getppid() != parent:
                    return
                poller.poll(_SLICE * 1000)
                continue
            answer, text = _DONE, ""
            try:
                commands[command[:1]]()
            except EnvError as error:
                answer, text = _REFUSED, str(error)
            except BaseException as error:
                said = (
                    str(error) if isinstance(error, EnvFault) else f"{self._label}: {named(error)}"
                )
                answer, text = _FAILED, f"{said}\n{''.join(traceback.format_exception(error))}"
            if told and answer == _DONE:
                answer, text = _TOLD, "; ".join(told)
                told.clear()
            if text:
                self._text[:] = text.encode("utf-8", "replace")[:_TEXT].ljust(_TEXT, b"\0")
            os.write(answers, answer + command[1:])
            if command[:1] == CLOSE:
                return


def end_all(processes: Sequence[ForkedProcess]) -> None:
    """End those of the processes that this one started, all at once."""
    own = [process for process in processes if process.owner == os.getpid()]
    for process in own:
        process.send(CLOSE)
    for process in own:
        process.end()


def _kept_warnings() -> list[str]:
    """Keep the texts of warnings about environments, which are for the parent to tell."""
    told: list[str] = []
    before = warnings.showwarning

    def show(message: Any, category: type[Warning], *place: Any) -> None:
        if issubclass(category, EnvWarning):
            told.append(one_line(message))
        else:
            before(message, category, *place)

    warnings.showwarning = show  # type: ignore[assignment]
    return told


def _noted(fault: EnvFault, trace: str) -> EnvFault:
    """A fault with the traceback of the process in which it happened."""
    if trace:
        fault.add_note(f"In that process:\n{trace}")
    return fault


def _fork(run: Callable[[], None]) -> int:
    """Run something in a new process; returns its id."""
    parent, libc = os.getpid(), ctypes.CDLL(None)
    # The kernel sends the signal when the forking thread ends, so only the main one may ask for it.
    dies_with = threading.current_thread() is threading.main_thread()
    _flush()  # or the child would write the rest once more
    # The signals that the child is to ignore are held back until it does.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of threads; torch's only wait
            pid = os.fork()
        if pid == 0:
            if dies_with:
                libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
            _serve(run, parent)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def _serve(run: Callable[[], None], parent: int) -> NoReturn:
    """The whole life of a process; nothing of its parent's stack or exit handlers runs in it."""
    code = 1
    try:
        _use_one_thread()
        gc.freeze()  # what the parent made is not for this process to collect
        signal.set_wakeup_fd(-1)
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
        if os.getppid() == parent:  # else it died before it could be watched
            run()
        code = 0
    finally:
        _flush()
        os._exit(code)


def _use_one_thread() -> None:
    """Let numerical libraries compute without the threads of the parent, which this process lacks.

    torch would wait for them forever; what is loaded later reads the variable.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()


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
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.001)


def _ended(code: int | None) -> str:
    """An exit status in words."""
    if code is None:
        return "is gone"
    if code >= 0:
        return f"ended with exit code {code}"
    names: dict[int, str] = {number: number.name for number in signal.Signals}
    return f"was killed by {names.get(-code, f'signal {-code}')}"
