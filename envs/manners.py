"""What an environment must leave to its process as it was: changes are set back and told once."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # a hundred times as fast as signal.getsignal
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import gymnasium
import numpy as np

from acktr.envs.errors import EnvWarning
from acktr.envs.vector import AnyEnv

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
"""Signals that stop a run in an orderly way."""
_SEEN = 8
"""Calls after which the generators are looked at only where the count is a power of two."""
_SET_BACK = "it is set back; an environment should leave it as it was"
_DRAWN = "runs cannot be repeated exactly; an environment should draw from self.np_random"
_leave = os._exit
_Before = tuple[tuple[Any, ...], dict[str, Any] | None]
"""The state of the process before a call, and where they are looked at the generators'."""


class Manners:
    """Looks after the process around the calls of one environment.

    The working directory, torch's default dtype and the handlers of the signals that stop a run are
    set back where a call changed them, and that is told once. Draws from the generators of the
    whole process (random, numpy, torch) are only told, once. `os._exit` raises SystemExit in there,
    as nothing could be said or saved afterwards.

    Args:
        label: Name of the environment for messages.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._told: set[str] = set()
        self._count = 0
        self._owner = os.getpid()

    @contextmanager
    def around(self, when: str) -> Iterator[None]:
        """Around a call."""
        before = self.begin()
        try:
            yield
        finally:
            self.end(before, when)

    def begin(self) -> _Before:
        """Before a call: how the process is."""
        self._count += 1
        looks = self._count <= _SEEN or not self._count & (self._count - 1)
        os._exit = self._refuse  # type: ignore[assignment]
        return _state(), _generators() if looks else None

    def end(self, before: _Before, when: str, number: int = 0) -> None:
        """After a call, such as step number 3: set back and tell what is other than before."""
        os._exit = _leave
        state, drawn = before
        if drawn is not None or _state() != state:
            when = f"{when} {number}" if number else when
            self._set_back(state, when)
            self._compare(drawn or {}, when)

    def _refuse(self, code: int) -> NoReturn:
        """Raise SystemExit in place of `os._exit`, where the environment calls it in its thread."""
        caller = str(sys._getframe(1).f_globals.get("__name__", "")).partition(".")[0]
        main = threading.current_thread() is threading.main_thread()
        if os.getpid() != self._owner or not main or caller in ("acktr", "multiprocessing"):
            _leave(code)
        raise SystemExit(f"os._exit({code}) was called")

    def _set_back(self, before: tuple[Any, ...], when: str) -> None:
        """Set back what a call changed."""
        cwd, dtype, *handlers = before
        now = _state()
        if now[0] != cwd:
            self._tell(f"changed the working directory to {now[0]}", when, _SET_BACK)
            with suppress(OSError):
                os.chdir(cwd)
        if now[1] != dtype:
            self._tell(f"changed torch's default dtype to {now[1]}", when, _SET_BACK)
            sys.modules["torch"].set_default_dtype(dtype)
        for number, handler, then in zip(SIGNALS, handlers, now[2:], strict=True):
            if handler is not then:
                self._tell(f"changed the handler of {number.name}", when, _SET_BACK)
                if handler is not None and threading.current_thread() is threading.main_thread():
                    signal.signal(number, handler)

    def _compare(self, drawn: dict[str, Any], when: str) -> None:
        """Tell of generators that a call used."""
        now = _generators() if drawn else {}
        for name, state in drawn.items():
            if now[name] != state:
                self._tell(f"used the global generator of {name}", when, _DRAWN)

    def _tell(self, what: str, when: str, so: str) -> None:
        kind = what.partition(" to ")[0]
        if kind not in self._told:
            self._told.add(kind)
            warnings.warn(f"{self._label} {what} at {when}: {so}", EnvWarning, stacklevel=4)


class ManneredEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment that somebody else wrote, and the process as it was around its calls."""

    def __init__(self, env: AnyEnv, label: str) -> None:
        super().__init__(env)
        self._manners = Manners(label)
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset; see `gymnasium.Env.reset`."""
        with self._manners.around("reset"):
            return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step; see `gymnasium.Env.step`."""
        self._steps += 1
        before = self._manners.begin()
        try:
            return self.env.step(action)
        finally:
            self._manners.end(before, "step", self._steps)

    def close(self) -> None:
        """Close; see `gymnasium.Env.close`."""
        with self._manners.around("close"):
            self.env.close()


def _state() -> tuple[Any, ...]:
    """The working directory, torch's default dtype and the handlers."""
    torch: Any = sys.modules.get("torch")
    dtype = None if torch is None else torch.get_default_dtype()
    try:
        cwd = os.getcwd()
    except OSError:  # it was deleted
        cwd = ""
    return cwd, dtype, *map(_signal.getsignal, SIGNALS)


def _generators() -> dict[str, Any]:
    """The states of the generators of the whole process."""
    numpys: Any = np.random.get_state(legacy=True)  # noqa: NPY002 - what others use
    states = {"random": random.getstate(), "numpy": (numpys[2:], numpys[1].tobytes())}
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        states["torch"] = torch.get_rng_state().numpy().tobytes()
    return states
