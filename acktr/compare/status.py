"""What there is of the runs of a grid."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from acktr.compare.grid import RunPlan
from acktr.config import Config, ConfigError
from acktr.files import reason
from acktr.runs.checkpoint import CheckpointError, checkpoint_exists, older_checkpoints
from acktr.runs.folder import KEPT, RunError, RunFolder, locked, stored_config
from acktr.runs.saved import read_agent
from acktr.runs.start import check, difference, require_within

if sys.platform != "win32":
    import fcntl


class State(Enum):
    """What there is of a run."""

    NEW = "new"
    UNFINISHED = "unfinished"
    FINISHED = "finished"
    STUCK = "stuck"


@dataclass(frozen=True)
class Status:
    """How far a run is."""

    state: State
    timesteps: int = 0
    """Environment steps done, as its checkpoint says."""
    reason: str = ""
    """Why it is stuck and what to do, one line."""


def survey(plans: Sequence[RunPlan]) -> list[Status]:
    """How far each run is, after checking that every run that is left can be made.

    Raises:
        ConfigError, EnvError: A run cannot be made.
        RunError: A folder holds another run than the grid's, or is in training.
    """
    for plan in plans:
        with _named(plan):
            require_within(plan.stop_at, plan.config)
    statuses = [status(plan) for plan in plans]
    cells: dict[Config, RunPlan] = {}  # seeds make no difference
    for plan, found in zip(plans, statuses, strict=True):
        if found.state in (State.NEW, State.UNFINISHED):
            cells.setdefault(dataclasses.replace(plan.config, seed=0), plan)
    for plan in cells.values():
        with _named(plan):
            check(plan.config, plan.network.source if plan.network else None, plan.stop_at)
    return statuses


@contextmanager
def _named(plan: RunPlan) -> Iterator[None]:
    """Let what is wrong with a run's configuration say which run it is."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{plan.config.env} {plan.label}: {error}") from error


@contextmanager
def claimed(plans: Sequence[RunPlan]) -> Iterator[None]:
    """Keep other comparisons from training the same runs, where the system can.

    The file ``logs/lock`` is locked at one byte for each run, which its folder's name gives: for
    any number of runs one file is open, and other runs of the same folder may be trained meanwhile.

    Raises:
        RunError: Another comparison trains one of them, or there cannot be such a file.
    """
    if sys.platform == "win32" or not plans:
        yield
        return
    run_dir = plans[0].run_dir
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{run_dir}: cannot create the folder: {reason(error)}") from error
    path = run_dir / "logs" / "lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RunError(f"{path}: cannot open: {reason(error)}") from error
    try:
        for plan in plans:
            name = str(plan.path.relative_to(run_dir)).encode("utf-8", "surrogateescape")
            place = int.from_bytes(hashlib.sha256(name).digest()[:7])
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            except (BlockingIOError, PermissionError):
                raise RunError(f"{plan.path}: another acktr compare trains this run") from None
            except OSError:
                break  # a file system without locks
        yield
    finally:
        os.close(handle)


def status(plan: RunPlan) -> Status:
    """What there is of a run.

    It is finished when eval.csv has an evaluation at its last step or later and its checkpoint,
    if there is one, is there too; one that is to stop early when its checkpoint is there.

    Raises:
        RunError: The folder cannot be read, holds another run, or is in training.
    """
    path, total = plan.path, plan.config.total_timesteps
    try:
        if not path.exists() or not any(path.iterdir()):
            return Status(State.NEW)
    except OSError as error:
        raise RunError(f"{path}: cannot read: {reason(error)}") from error
    folder = RunFolder(path)
    with locked(folder):
        if folder.config.is_file():
            differs = difference(stored_config(path), plan.config)
            if differs is not None:
                name, theirs, ours = differs
                raise RunError(
                    f"{path}: its {name} is {theirs!r} but the grid's is {ours!r}; "
                    "choose another --run-dir, or LABEL=FILE.json for a variant"
                )
        if folder.unborn:
            return Status(State.NEW)
        if not folder.config.is_file():
            return _stuck(path, "holds no run")
        done = folder.last_evaluation() >= total
        if not (checkpoint_exists(folder.last) or older_checkpoints(folder.last, KEPT - 1)):
            return Status(State.FINISHED, total) if done else _stuck(path, "has no checkpoint")
        try:
            steps = read_agent(folder.last).timesteps
        except CheckpointError:
            return Status(State.UNFINISHED)  # its process will say what is wrong
        finished = steps >= plan.goal and (done or steps < total)
        return Status(State.FINISHED if finished else State.UNFINISHED, steps)


def _stuck(path: Path, why: str) -> Status:
    return Status(State.STUCK, reason=f"{path} {why}; delete it and start again")
