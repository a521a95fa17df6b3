"""Ranks for tests: processes that are started once for many cases, and threads."""

from __future__ import annotations

import os
import socket
import threading
import traceback
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from datetime import timedelta
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, multiprocessing

from acktr.kfac import Ranks

HELPED = ("--curvature-ranks", "1")
"""Words with which the last process of ``acktr train`` decomposes for the others."""
OFTEN = tuple(
    word
    for part in ("actor", "critic")
    for name, value in (("interval", "4"), ("delay", "3"))
    for word in (f"--acktr.{part}.refresh-{name}", value)
)
"""Refreshes that are under way most of the time."""

Case = Callable[[Ranks], Any]
"""What a rank does; the result is made of tensors, numbers and text."""
Results = dict[str, list[Any]]
"""Results by case, each of all ranks."""
_LIMIT = timedelta(seconds=60)


def on_ranks(cases: Mapping[str, Case], size: int, folder: Path, backend: str = "gloo") -> Results:
    """Run every case on several processes, which a server without threads forks.

    Each would take ten seconds on a busy processor to import torch and what optimizers import.

    Args:
        cases: Functions of a module, by name.
        size: Number of processes.
        folder: An empty folder of the test.
        backend: Of torch.distributed; nccl gives every process a GPU of its own.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo"])
    work = (dict(cases), size, str(folder), backend)
    multiprocessing.start_processes(_rank, work, nprocs=size, start_method="forkserver")
    saved = [torch.load(folder / f"{rank}.pt") for rank in range(size)]
    missing = "Traceback: an earlier case left the ranks apart"
    return {name: [mine.get(name, missing) for mine in saved] for name in cases}


def _rank(rank: int, cases: dict[str, Case], size: int, folder: str, backend: str) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    if "lo" in [name for _, name in socket.if_nameindex()]:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/store"
    distributed.init_process_group(
        backend, init_method=store, rank=rank, world_size=size, timeout=_LIMIT
    )
    try:
        ranks, results = Ranks(), {}
        for name, case in cases.items():
            try:
                results[name] = case(ranks)
            except BaseException as error:  # told by the test of the case
                results[name] = "".join(traceback.format_exception(error))
            try:
                distributed.barrier()
            except RuntimeError:  # a rank waits for others that are elsewhere
                break
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


class ThreadRanks(Ranks):
    """Ranks that are threads of one process, and add up in the order of their numbers.

    One of them computes at a time: forward-mode differentiation has one level for all threads.

    Args:
        rank: Number of this one.
        table: What all say, by rank.
        barrier: Waits for all.
        turn: Whoever computes holds it.
    """

    def __init__(
        self, rank: int, table: list[Any], barrier: threading.Barrier, turn: threading.Lock
    ) -> None:
        self.group, self.rank, self.size = None, rank, len(table)
        self._table, self._barrier, self._turn = table, barrier, turn

    def _add(self, flat: Tensor) -> None:
        said = self._exchanged(flat.clone())
        flat.copy_(reduce(torch.add, said))

    def _send(self, flat: Tensor, source: int) -> None:
        flat.copy_(self._exchanged(flat.clone())[source])

    def _exchanged(self, mine: Tensor) -> list[Tensor]:
        self._table[self.rank] = mine
        self._wait()
        said = list(self._table)
        self._wait()
        return said

    def _wait(self) -> None:
        self._turn.release()
        try:
            self._barrier.wait()
        finally:
            self._turn.acquire()


def on_threads(case: Case, size: int) -> list[Any]:
    """Run a case on ranks that are threads; the first error is raised."""
    barrier, turn = threading.Barrier(size, timeout=60), threading.Lock()
    table: list[Any] = [None] * size
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        with turn:
            try:
                results[rank] = case(ThreadRanks(rank, table, barrier, turn))
            except BaseException as error:
                errors.append(error)
                barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not errors
    return results


def same(one: Any, other: Any, without: AbstractSet[str]) -> bool:
    """Whether two states have the same bits, but for entries of some names."""
    if isinstance(one, dict):
        names = one.keys() - without
        return one.keys() == other.keys() and all(same(one[n], other[n], without) for n in names)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(
            same(*pair, without) for pair in zip(one, other, strict=True)
        )
    if isinstance(one, Tensor | np.ndarray):
        return bool((torch.as_tensor(one) == torch.as_tensor(other)).all())
    return bool(one == other)
