"""Measures training in several processes: its speed, and what they tell one another.

``python -m scripts.bench.ranks FOLDER RANK`` is one of the processes of a folder's task.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from acktr.config import from_dict
from acktr.environments import training_envs
from acktr.files import read_object
from acktr.kfac import Ranks
from acktr.train import Trainer
from acktr.world import World, part_of_envs
from scripts.bench.cases import Case, Timing
from scripts.bench.measure import TASK, timed, write_task

_LIMIT = timedelta(seconds=300)


class CountedRanks(Ranks):
    """All processes, with their messages counted."""

    def __init__(self) -> None:
        super().__init__()
        self.told = {"calls": 0.0, "bytes": 0.0, "seconds": 0.0}
        """Of all messages so far; the seconds hold the wait for the others."""

    def _add(self, flat: Tensor) -> None:
        with self._counted(flat):
            super()._add(flat)

    def _send(self, flat: Tensor, source: int) -> None:
        with self._counted(flat):
            super()._send(flat, source)

    @contextmanager
    def _counted(self, flat: Tensor) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.size == 1:
            return
        self.told["calls"] += 1
        self.told["bytes"] += flat.nbytes
        self.told["seconds"] += time.perf_counter() - started


def measure_ranks(case: Case, timing: Timing) -> dict[str, Any]:
    """Train in ``case.ranks`` processes, of which this is the first, and time it.

    Returns:
        As :func:`scripts.bench.measure.measure_training`, and the ``messages`` of an update.
    """
    with tempfile.TemporaryDirectory(prefix="bench-ranks-") as name:
        write_task(Path(name), case, timing)
        others = [
            subprocess.Popen([sys.executable, "-P", "-m", "scripts.bench.ranks", name, str(rank)])
            for rank in range(1, case.ranks)
        ]
        try:
            return _train(case, timing, Path(name), 0)
        finally:
            for other in others:
                other.wait()


def _train(case: Case, timing: Timing, folder: Path, rank: int) -> dict[str, Any]:
    config, size = from_dict(case.settings), case.ranks
    torch.set_num_threads(max(1, timing.threads // size))
    envs = training_envs(config, part_of_envs(config.num_envs, rank, size))
    try:
        store = f"file://{folder}/store"
        distributed.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=size, timeout=_LIMIT
        )
        ranks = CountedRanks()
        trainer = Trainer(config, envs, world=World(ranks, rank))
        return timed(trainer, timing, lambda: dict(ranks.told))
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        envs.close()


if __name__ == "__main__":
    _given = read_object(Path(sys.argv[1]) / TASK)
    _train(Case(**_given["case"]), Timing(**_given["timing"]), Path(sys.argv[1]), int(sys.argv[2]))
