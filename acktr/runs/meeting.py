"""Where the processes of one run meet: who they are, whether they agree, who waits for whom."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from acktr.config import ConfigError
from acktr.interrupts import Interrupts, Stopped
from acktr.kfac import RankError, Ranks
from acktr.world import World, part_of_envs

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

MEETING_FILE = "ACKTR_MEETING"
"""Variable with the path of a file in which the processes of one machine meet."""
RANK_TIMEOUT = 300.0
"""Seconds that a process waits for the others, unless told otherwise."""
UNKNOWN = object()
"""Of a fact that this process cannot tell, which agrees with what the others say."""

_ALIVE, _SIGNAL = "alive", "signal"
"""Keys: of the first process's signs of life; of the signal that the one that decomposes got."""
_LOOK = 0.05
_GRACE = 5.0
"""Seconds that a process that got a signal still waits for the first one."""
_PR_SET_PDEATHSIG = 1


class Meeting:
    """The processes that torch's elastic agent started for one run, and this one among them.

    Args:
        interrupts: Tell of signals while this process waits.
        timeout: Seconds to wait for the others.
        curvature: Number of processes, the last ones, that decompose for the others: 0 or 1.
    """

    def __init__(
        self, interrupts: Interrupts, timeout: float = RANK_TIMEOUT, curvature: int = 0
    ) -> None:
        self.rank, self.size, self.local_rank, self.restarts = (
            int(os.environ.get(name, "0"))
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")
        )
        self._interrupts, self.timeout, self.curvature = interrupts, timeout, curvature
        self._store: Store | None = None
        self._pauses = 0
        self._pulse: _Pulse | None = None
        self.ranks: Ranks | None = None

    @classmethod
    def given(
        cls, interrupts: Interrupts, timeout: float = RANK_TIMEOUT, curvature: int = 0
    ) -> Meeting | None:
        """The meeting that the environment tells of; None for a process alone."""
        several = os.environ.get("WORLD_SIZE", "1") != "1"
        if not several or "TORCHELASTIC_RUN_ID" not in os.environ:
            return None
        return cls(interrupts, timeout, curvature)

    @property
    def leads(self) -> bool:
        """Whether this process writes: logs, checkpoints, what people read."""
        return self.rank == 0

    @property
    def serves(self) -> bool:
        """Whether this process decomposes for the others in place of training."""
        return self.rank >= self.size - self.curvature

    @property
    def _limit(self) -> timedelta:
        return timedelta(seconds=self.timeout)

    def part(self, num_envs: int) -> tuple[int, int]:
        """How many of all environments are this process's, and the number of the first.

        Raises:
            ConfigError: They cannot be shared out evenly.
        """
        return part_of_envs(num_envs, self.rank, self.size - self.curvature)

    @contextmanager
    def joined(self, device: torch.device, facts: Mapping[str, object]) -> Iterator[World]:
        """While entered, the processes exchange messages.

        Environments are made before: those with processes of their own would keep connections open.

        Args:
            device: Of the network.
            facts: What must be the same in all processes, by its name; UNKNOWN is the same as all.

        Raises:
            RankError: Some did not come.
            ConfigError: They do not agree.
            Stopped: A signal came.
        """
        from torch import distributed

        _end_with_launcher()
        self._store = store = self._made()
        self._appear("here")
        self._until(lambda: all(store.check([f"here/{r}"]) for r in range(self.size)), "here")
        distributed.init_process_group(
            "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
            store=store,
            rank=self.rank,
            world_size=self.size,
            timeout=self._limit,
        )
        try:
            self.ranks = Ranks()
            self._agree(facts)
            with self._helped() if self.curvature else nullcontext():
                yield World(self.ranks, self.local_rank)
        finally:
            with suppress(Exception):
                distributed.destroy_process_group()

    @contextmanager
    def _helped(self) -> Iterator[None]:
        """While entered, the last process decomposes; it is told how training ended."""
        self.ranks = ranks = Ranks(curvature=True, timeout=self._limit)
        with self._alive(_ALIVE) if self.leads else nullcontext():
            try:
                yield
            except RankError:  # there may be nobody to tell, and whoever there is loses this one
                raise
            except BaseException as error:
                with suppress(RankError):
                    ranks.close(error.signum if isinstance(error, Stopped) else 0)
                raise
            try:
                ranks.close()
            except RankError as error:
                raise RankError(self.explained(error)) from error

    def attend(self) -> None:
        """In the process that decomposes, while it waits: tell of its signal, look after the first.

        Raises:
            RankError: The first process gave no sign of life for the time limit.
        """
        if self._interrupts.requested is not None and not self._checked(_SIGNAL):
            self._store_there.set(_SIGNAL, str(self._interrupts.requested))
        self._pulse = self._pulse or _Pulse(self, _ALIVE)
        self._pulse.check()

    def asked(self) -> int | None:
        """The signal that this process got, or the one that decomposes; None without one."""
        if self._interrupts.requested is None and self.curvature and self._checked(_SIGNAL):
            return int(self._store_there.get(_SIGNAL))
        return self._interrupts.requested

    def tell(self, value: int) -> int:
        """The first process's value; all wait for it."""
        assert self.ranks is not None
        mine = float(value) if self.leads else 0.0
        return int(self.ranks.gather([mine], torch.device("cpu"))[0][0])

    def pause(self) -> None:
        """Wait while the first process is :meth:`busy`, however long that takes.

        Raises:
            RankError: It gave no sign of life for the time limit.
            Stopped: A signal came, and it did not go on in some seconds.
        """
        self._pauses += 1
        key, deadline = f"on/{self._pauses}", float("inf")
        pulse = _Pulse(self, f"busy/{self._pauses}")
        while not self._checked(key):
            now = time.monotonic()
            pulse.check()
            if self._interrupts.requested is not None:
                deadline = min(deadline, now + _GRACE)
            if now > deadline:
                self._interrupts.check()
            time.sleep(_LOOK)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While entered, the others :meth:`pause`; a thread gives signs of life meanwhile."""
        self._pauses += 1
        name = self._pauses
        with self._alive(f"busy/{name}"):
            yield
            self._store_there.set(f"on/{name}", "1")

    @contextmanager
    def _alive(self, key: str) -> Iterator[None]:
        """While entered, a thread gives signs of life: it counts under a key."""
        store, done = self._store_there, threading.Event()

        def beat() -> None:
            while not done.wait(min(1.0, self.timeout / 4)):
                with suppress(Exception):
                    store.add(key, 1)

        thread = threading.Thread(target=beat, name="sign of life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def beats(self, key: str) -> str:
        """How many signs of life there were under a key."""
        return self._store_there.get(key).decode() if self._checked(key) else ""

    def explained(self, error: RankError) -> str:
        """The error with the processes that are missing, which are those that do not say so too."""
        with suppress(Exception):
            self._appear("lost")
            time.sleep(1)
            missing = [r for r in range(self.size) if not self._checked(f"lost/{r}")]
            if missing and "did not answer" in str(error):
                names = ", ".join(map(str, missing))
                return (
                    f"process {names} of {self.size} did not answer within {self.timeout:g} s, or"
                    " is gone"
                )
        return str(error)

    def _made(self) -> Store:
        from torch._C._distributed_c10d import FileStore

        file = os.environ.get(MEETING_FILE)
        if file is not None:
            path = Path(f"{file}.{self.restarts}")  # a file serves once
            return FileStore(str(path), self.size)
        from torch.distributed.rendezvous import rendezvous

        found: Store = next(iter(rendezvous("env://", timeout=self._limit)))[0]
        return found

    @property
    def _store_there(self) -> Store:
        assert self._store is not None
        return self._store

    def _appear(self, what: str) -> None:
        self._store_there.set(f"{what}/{self.rank}", "1")

    def _checked(self, key: str) -> bool:
        return bool(self._store_there.check([key]))

    def _until(self, done: Callable[[], bool], what: str) -> None:
        """Wait in a way that signals can end."""
        deadline = time.monotonic() + self.timeout
        while not done():
            if time.monotonic() > deadline:
                missing = [r for r in range(self.size) if not self._checked(f"{what}/{r}")]
                raise RankError(
                    f"process {', '.join(map(str, missing))} of {self.size} did not come within"
                    f" {self.timeout:g} s"
                )
            if self._interrupts.requested is not None:
                raise Stopped(self._interrupts.requested)
            time.sleep(_LOOK)

    def _agree(self, facts: Mapping[str, object]) -> None:
        """Raise ConfigError, in all processes, unless they say the same."""
        assert self.ranks is not None
        for what, values in (("names of settings", [tuple(facts)]), ("", list(facts.values()))):
            rows = self.ranks.gather([_digest(value) for value in values], torch.device("cpu"))
            for place, column in enumerate(zip(*rows, strict=True)):
                known = [rank for rank, digest in enumerate(column) if digest]
                other = [rank for rank in known if column[rank] != column[known[0]]]
                if other:
                    name = what or list(facts)[place]
                    raise ConfigError(
                        f"process {other[0]} of {self.size} has another {name} than process"
                        f" {known[0]}: start all with the same command, packages and kind of"
                        " machine"
                    )


class _Pulse:
    """Looks whether the first process lives: the signs under a key must become more.

    Args:
        meeting: What this process sees of it.
        key: Of the signs.
    """

    def __init__(self, meeting: Meeting, key: str) -> None:
        self._meeting, self._key = meeting, key
        self._beats, self._heard = "", time.monotonic()

    def check(self) -> None:
        """Raise RankError after the time limit without a sign."""
        now, beats = time.monotonic(), self._meeting.beats(self._key)
        if beats != self._beats:
            self._beats, self._heard = beats, now
        if now - self._heard > self._meeting.timeout:
            raise RankError(
                f"process 0 of {self._meeting.size} gave no sign of life for"
                f" {self._meeting.timeout:g} s"
            )


def _digest(value: Any) -> float:
    """Twelve digits, which a float64 holds; 0 of what is not known."""
    if value is UNKNOWN:
        return 0.0
    return float(int(hashlib.sha256(repr(value).encode()).hexdigest()[:12], 16))


def _end_with_launcher() -> None:
    """Let the end of the launcher be a SIGTERM to this process."""
    if MEETING_FILE in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
