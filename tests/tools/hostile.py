"""Environments that misbehave: the deeds, and what is to be said about each.

`tests.tools.hostile:Hostile-v0` is a small environment that does a deed of `FAULTS` at step `AT` of
environment 1, or when that is made, reset or closed. The deed is the argument `deed`, or what the
variable HOSTILE of the process says, so that a run may be trained in peace and then played.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

ENV_ID = "tests.tools.hostile:Hostile-v0"
AT, INDEX = 5, 1


@dataclass(frozen=True)
class Fault:
    """One way to misbehave."""

    said: str
    """A part of the line about it, as a regular expression."""
    where: str = "step"
    """The call that does it: init, reset, step or close."""
    deed: Callable[[], Any] | None = None
    """What that call does besides."""
    gives: Any = None
    """What it gives instead: (observation, reward, terminated, info); None as usual."""
    goes_on: bool = False
    """Whether training goes on, and the line is a warning."""
    hangs: bool = False
    """Whether it takes as long as it is allowed to."""


def _raise() -> None:
    raise ZeroDivisionError("the simulator\nbroke")


def _hang() -> None:
    time.sleep(3600)


def _spin() -> None:
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            continue


def _crash() -> None:
    ctypes.string_at(0)


def _bad(said: str, **gives: Any) -> Fault:
    """A step that gives something unfit."""
    return Fault(rf"{_HERE} gave something unfit at step {AT}: .*{said}", gives=gives)


def _worse(said: str, **gives: Any) -> Fault:
    """A step whose numbers are unfit."""
    return Fault(rf"{_HERE} returned a {said}", gives=gives)


def _rude(said: str, deed: Callable[[], Any]) -> Fault:
    """A step that changes what belongs to the whole process."""
    return Fault(rf"{_HERE} {said}.* at step {AT}", deed=deed, goes_on=True)


_HERE = rf"environment {INDEX} of Hostile-v0"

FAULTS: dict[str, Fault] = {
    "raise": Fault(
        rf"{_HERE} raised ZeroDivisionError at step {AT}: the simulator broke", deed=_raise
    ),
    "sys.exit": Fault(rf"{_HERE} raised SystemExit at step {AT}: 0", deed=lambda: sys.exit(0)),
    "os._exit": Fault(rf"{_HERE} .*step {AT}", deed=lambda: os._exit(0)),
    "crash": Fault(rf"SIGSEGV.*{_HERE}.* step {AT}", deed=_crash),
    "kill": Fault(
        rf"SIGKILL.*{_HERE}.* step {AT}", deed=lambda: os.kill(os.getpid(), signal.SIGKILL)
    ),
    "hang": Fault(rf"{_HERE} did not return from step {AT} within", deed=_hang, hangs=True),
    "spin": Fault(rf"{_HERE} did not return from step {AT} within", deed=_spin, hangs=True),
    "text": _bad("<U5, its space has float32", obs=["three", "four"]),
    "nan": _worse(f"non-finite observation at step {AT}: nan", obs=[0, np.nan]),
    "shape": _bad(r"shape \(3,\), its space has \(2,\)", obs=np.zeros(3)),
    "dtype": _bad("of complex128, its space has float32", obs=[1j, 0]),
    "huge observation": _bad("too large for the float32", obs=[1e300, 0]),
    "outside": Fault(
        rf"{_HERE} returned the observation 7.0 .* at step {AT}, outside of the bounds",
        gives={"obs": [7.0, 0]},
        goes_on=True,
    ),
    "no observation": _bad(r"of shape \(\), its space", obs=None),
    "text reward": _bad("the reward '1.0', not a number", reward="1.0"),
    "no reward": _bad("the reward None, not a number", reward=None),
    "nan reward": _worse(f"non-finite reward at step {AT}: nan", reward=np.nan),
    "huge reward": _worse(rf"too large reward at step {AT}: 1e\+20", reward=1e20),
    "rewards": _bad(r"reward of shape \(2,\)", reward=np.zeros(2)),
    "text flag": _bad("terminated = 'no', not True", terminated="no"),
    "no flag": _bad("terminated = None, not True", terminated=None),
    "number flag": _bad("terminated = 0.3, not True", terminated=0.3),
    "no info": _bad("the info None, not a dict", info=None),
    "raise in reset": Fault(rf"{_HERE} raised ZeroDivisionError at reset", "reset", _raise),
    "exit in reset": Fault(rf"{_HERE} raised SystemExit at reset", "reset", lambda: sys.exit(0)),
    "hang in reset": Fault(
        rf"{_HERE} did not return from reset within", "reset", _hang, hangs=True
    ),
    "raise in init": Fault("Hostile-v0 could not be made: ZeroDivisionError", "init", _raise),
    "exit in init": Fault("Hostile-v0 could not be made: SystemExit", "init", lambda: sys.exit(0)),
    "hang in init": Fault(rf"{_HERE} was not made within", "init", _hang, hangs=True),
    "raise in close": Fault(
        rf"{_HERE} raised ZeroDivisionError.*when it was closed", "close", _raise, goes_on=True
    ),
    "exit in close": Fault(
        rf"{_HERE} raised SystemExit.*when it was closed",
        "close",
        lambda: sys.exit(0),
        goes_on=True,
    ),
    "os._exit in init": Fault(
        r"Hostile-v0 could not be made: SystemExit: os._exit\(0\)", "init", lambda: os._exit(0)
    ),
    "working directory": _rude("changed the working directory to /", lambda: os.chdir("/")),
    "default dtype": _rude(
        "changed torch's default dtype", lambda: torch.set_default_dtype(torch.float64)
    ),
    "handler": _rude(
        "changed the handler of SIGTERM", lambda: signal.signal(signal.SIGTERM, lambda *_: None)
    ),
    "numpy's generator": _rude("used the global generator of numpy", lambda: np.random.random()),  # noqa: NPY002
    "Python's generator": _rude("used the global generator of random", random.random),
    "torch's generator": _rude("used the global generator of torch", lambda: torch.rand(1)),
    "hang in close": Fault(
        rf"({_HERE} did not return from close|did not close) within",
        "close",
        _hang,
        goes_on=True,
        hangs=True,
    ),
}


class HostileEnv(gymnasium.Env[Any, Any]):
    """Moves a point in two dimensions at random; episodes have 20 steps."""

    made = 0
    """How many there were in this process."""

    def __init__(self, deed: str = "", index: int = INDEX) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = spaces.Discrete(2)
        deed = deed or os.environ.get("HOSTILE", "")
        self._fault = FAULTS[deed] if deed and HostileEnv.made == index else None
        HostileEnv.made += 1
        self._steps = self._length = 0
        self._given("init")

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._length = 0
        self._given("reset")
        return self._observation(), {}

    def step(self, action: Any) -> Any:
        self._steps += 1
        self._length += 1
        usual = {"obs": self._observation(), "reward": 1.0, "terminated": False, "info": {}}
        usual["truncated"] = self._length == 20
        usual |= self._given("step") if self._steps == AT else {}
        return tuple(usual[name] for name in ("obs", "reward", "terminated", "truncated", "info"))

    def close(self) -> None:
        self._given("close")

    def _given(self, where: str) -> dict[str, Any]:
        """Do the deed if it is time to."""
        fault = self._fault
        if fault is None or fault.where != where:
            return {}
        if fault.deed is not None:
            fault.deed()
        return fault.gives or {}

    def _observation(self) -> Any:
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)


if ENV_ID.rpartition(":")[2] not in gymnasium.registry:
    gymnasium.register("Hostile-v0", entry_point=f"{__name__}:HostileEnv")
