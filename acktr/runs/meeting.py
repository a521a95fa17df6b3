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
from contextlib import contextmanager, suppress
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

_LOOK = 0.05
_GRACE = 5.0
"""Seconds that a process that got a signal still waits for the first one."""
_PR_SET_PDEATHSIG = 1


class Meeting:
    """The processes that torch's elastic agent started for one run, and this one among them.

    Args:
        interrupts: Tell of signals while this process waits.
        timeout: Seconds to wait for the others.
    """

    def __init__(self, interrupts: Interrupts, timeout: float = RANK_TIMEOUT) -> None:
        self.rank, self.size, self.local_rank, self.restarts = (
            int(os.environ.get(name, "0"))
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")
        )
        self._interrupts, self._timeout = interrupts, timeout
        self._store: Store | None = None
        self._pauses = 0
        self.ranks: Ranks | None = None

    @classmethod
    def given(cls, interrupts: Interrupts, timeout: float = RANK_TIMEOUT) -> Meeting | None:
        """The meeting that the environment tells of; None for a process alone."""
        several = os.environ.get("WORLD_SIZE", "1") != "1"
        return cls(interrupts, timeout) if several and "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def leads(self) -> bool:
        """Whether this process writes: logs, checkpoints, what people read."""
        return self.rank == 0

    @property
    def _limit(self) -> timedelta:
        return timedelta(seconds=self._timeout)

    def part(self, num_envs: int) -> tuple[int, int]:
        """How many of all environments are this process's, and the number of the first.

        Raises:
            ConfigError: They cannot be shared out evenly.
        """
        return part_of_envs(num_envs, self.rank, self.size)

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
            yield World(self.ranks, self.local_rank)
        finally:
            with suppress(Exception):
                distributed.destroy_process_group()

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
        beats, heard = 0, time.monotonic()
        while not self._checked(key):
            now = time.monotonic()
            if (found := self._store_there.add(f"busy/{self._pauses}", 0)) != beats:
                beats, heard = found, now
            if now - heard > self._timeout:
                raise RankError(
                    f"process 0 of {self.size} gave no sign of life for {self._timeout:g} s"
                )
            if self._interrupts.requested is not None:
                deadline = min(deadline, now + _GRACE)
            if now > deadline:
                self._interrupts.check()
            time.sleep(_LOOK)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While entered, the others :meth:`pause`; a thread gives signs of life meanwhile."""
        self._pauses += 1
        name, store, done = self._pauses, self._store_there, threading.Event()

        def beat() -> None:
            while not done.wait(min(1.0, self._timeout / 4)):
                with suppress(Exception):
                    store.add(f"busy/{name}", 1)

        thread = threading.Thread(target=beat, name="sign of life", daemon=True)
        thread.start()
        try:
            yield
            store.set(f"on/{name}", "1")
        finally:
            done.set()
            thread.join()

    def explained(self, error: RankError) -> str:
        """The error with the processes that are missing, which are those that do not say so too."""
        with suppress(Exception):
            self._appear("lost")
            time.sleep(1)
            missing = [r for r in range(self.size) if not self._checked(f"lost/{r}")]
            if missing and "did not answer" in str(error):
                names = ", ".join(map(str, missing))
                return (
                    f"process {names} of {self.size} did not answer within {self._timeout:g} s, or"
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
        deadline = time.monotonic() + self._timeout
        while not done():
            if time.monotonic() > deadline:
                missing = [r for r in range(self.size) if not self._checked(f"{what}/{r}")]
                raise RankError(
                    f"process {', '.join(map(str, missing))} of {self.size} did not come within"
                    f" {self._timeout:g} s"
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


def _digest(value: Any) -> float:
    """Twelve digits, which a float64 holds; 0 of what is not known."""
    if value is UNKNOWN:
        return 0.0
    return float(int(hashlib.sha256(repr(value).encode()).hexdigest()[:12], 16))


def _end_with_launcher() -> None:
    """Let the end of the launcher be a SIGTERM to this process."""
    if MEETING_FILE in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
