"""What two runs have in common if they are the same, bit for bit, and chains of hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from acktr.apart import TOLD_LATER
from acktr.config import Config
from acktr.environments import training_envs
from acktr.runs.checkpoint import checkpoint_exists, load_checkpoint, save_checkpoint
from acktr.runs.folder import RunFolder
from acktr.runs.tables import read_table
from acktr.train import Trainer, TrainStats


def numbers(tree: Any) -> list[Any]:
    """The leaves of a state, without what the clock says."""
    if isinstance(tree, Mapping):
        items = sorted((key, each) for key, each in tree.items() if key != "seconds")
        return [leaf for key, each in items for leaf in (key, *numbers(each))]
    if isinstance(tree, list | tuple):
        return [leaf for each in tree for leaf in numbers(each)]
    if isinstance(tree, torch.Tensor | np.ndarray):
        array = np.asarray(tree)
        return [array.dtype.str, array.shape, array.tobytes()]
    return [tree]


def digest(*things: Any) -> str:
    """A hash of trees."""
    found = hashlib.sha256()
    for leaf in numbers(things):
        data = leaf if isinstance(leaf, bytes) else repr(leaf).encode()
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()[:16]


def fingerprint(path: Path) -> dict[str, str]:
    """Hashes of all that a finished run has kept, by what it is, without what the clock says.

    Raises:
        Exception: Something in it cannot be read.
    """
    folder = RunFolder(path)
    found = {}
    for name, checkpoint in (("last", folder.last), ("best", folder.best)):
        state, meta = load_checkpoint(checkpoint) if checkpoint_exists(checkpoint) else ({}, {})
        found[name] = digest(state, meta.get("score"), meta.get("timesteps"))
    for table in (folder.monitor, folder.progress, folder.evaluations):
        rows = read_table(table).rows if table.exists() else []
        kept = [{k: v for k, v in row.items() if k != "t" and k[:5] != "time/"} for row in rows]
        found[table.stem] = digest(kept)
    files = sorted(str(each.relative_to(path)) for each in path.rglob("*"))
    found["files"] = digest([name for name in files if not name.startswith("events.")])
    return found


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    """Names of what differs."""
    return ", ".join(sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k)))


def require_events_agree(path: Path) -> None:
    """TensorBoard's points are rows of progress.csv, in order; AssertionError if they are not."""
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    rows = {int(row["timesteps"]): row for row in read_table(RunFolder(path).progress).rows}
    for tag in events.Tags()["scalars"]:
        points = events.Scalars(tag)
        steps = [point.step for point in points]
        assert steps == sorted(set(steps)), f"TensorBoard: {tag} goes back"
        for point in points if tag in next(iter(rows.values())) else ():
            assert point.step in rows, f"TensorBoard: {tag} at step {point.step}, which is no row"
            ours = np.float32(float(rows[point.step][tag] or "nan"))
            close = np.isclose(ours, np.float32(point.value), rtol=1e-6, equal_nan=True)
            assert close, f"TensorBoard: {tag} at step {point.step} is {point.value}, not {ours}"


def link(stats: TrainStats, trainer: Trainer, whole: bool) -> str:
    """The hash of an update: parameters, metrics and episodes, and the whole state on wish.

    What a critic's own process tells later is left out: one worker has none.
    """
    metrics = {k: v for k, v in stats.metrics.items() if k not in TOLD_LATER and k[:5] != "time/"}
    episodes = [[each.reward, each.length, dict(each.info)] for each in stats.episodes]
    state = trainer.state_dict() if whole else dict(trainer.network.state_dict())
    if whole:
        state["learner"].pop("critic_report", None)
    return digest(state, stats.timesteps, metrics, episodes)


def chain(
    config: Config, until: int, *, origin: Path | None = None, save: Path | None = None
) -> list[str]:
    """A hash for every update up to number ``until``, the last one of the whole state.

    Args:
        config: The run; its total of steps is not looked at.
        until: Updates.
        origin: A checkpoint to go on from.
        save: Where the checkpoint of the end is written.
    """
    found: list[str] = []
    with closing(training_envs(config)) as envs:
        trainer = Trainer(config, envs)
        if origin is not None:
            trainer.load_state_dict(load_checkpoint(origin)[0])
        for stats in trainer.run(1 << 40):
            found.append(link(stats, trainer, stats.updates == until))
            if stats.updates == until:
                break
        if save is not None:
            state = trainer.state_dict()
            assert state["collector"].get("unsaved") is None, state["collector"]["unsaved"]
            save_checkpoint(save, state, {})
    return found
