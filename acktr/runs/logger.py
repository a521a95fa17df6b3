"""What training writes into a run's folder: CSV files and TensorBoard events."""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from acktr.files import flat, reason
from acktr.runs.events import EventFile
from acktr.runs.folder import RunError, RunFolder
from acktr.runs.tables import WINDOW, Table, tag_of

if TYPE_CHECKING:
    from acktr.train import TrainStats

DENSE = 100_000
"""Updates up to which progress.csv has every one."""

POINTS = 256
"""Updates up to which TensorBoard gets every one; then each doubling has half as many points."""

_MONITOR = ("r", "l", "t", "step")
_EVAL = ("timesteps", "mean_reward", "std_reward", "mean_length", "episodes", "returns")


def rows_apart(updates: int, dense: int) -> int:
    """Updates from one row of progress.csv to the next, which bounds the file.

    Each of the first ``dense``, every second up to twice as many, every fourth up to four
    times as many, and so on; those that the distance divides.
    """
    return 1 << (max(updates - 1, 0) // dense).bit_length()


class Window:
    """Means over the last 100 episodes that ended in training."""

    def __init__(self) -> None:
        self._episodes: deque[tuple[float, int, Mapping[str, float]]] = deque(maxlen=WINDOW)

    def add(self, reward: float, length: int, info: Mapping[str, float]) -> None:
        """Take in an episode."""
        self._episodes.append((reward, length, info))

    @property
    def reward(self) -> float | None:
        """Mean return; None before the first episode."""
        return _mean([reward for reward, *_ in self._episodes])

    @property
    def means(self) -> dict[str, float | None]:
        """``rollout/ep_rew_mean``, ``rollout/ep_len_mean``, and means of infos.

        The last ones are ``rollout/KEY_mean``, or ``rollout/success_rate`` of is_success, of the
        episodes whose info had a number by this key. None stands where there is no number.
        """
        length = _mean([length for _, length, _ in self._episodes])
        means = {"rollout/ep_rew_mean": self.reward, "rollout/ep_len_mean": length}
        infos = [info for *_, info in self._episodes]
        for key in dict.fromkeys(key for info in infos for key in info):
            means[tag_of("rollout", key)] = _mean([info.get(key, math.nan) for info in infos])
        return means


class RunLogger:
    """Writes what training reports: monitor.csv, progress.csv, eval.csv and TensorBoard.

    A write that fails (a full disk) is reported as a warning and never raised: rows and events are
    kept in memory, up to a number, and written later. progress.csv has a row, and TensorBoard a
    point, for an update as :func:`rows_apart` says of :data:`DENSE` and :data:`POINTS`, and for
    metrics that the update before it had not. What is written depends on no clock, so that a
    resumed run writes the same.
    """

    def __init__(
        self,
        folder: RunFolder,
        env_id: str,
        resume_timesteps: int | None = None,
        events: bool = True,
    ) -> None:
        """Open the files, without TensorBoard's if not ``events``; drop rows of later timesteps.

        Raises:
            RunError: if an existing file cannot be read or is not what this class writes.
        """
        self._folder = folder
        self.path = folder.path
        """The folder."""
        header = json.dumps({"t_start": time.time(), "env_id": env_id})
        self._monitor = Table(folder.monitor, "step", _MONITOR, comment=f"#{header}")
        self._progress = Table(folder.progress, "timesteps", ("timesteps", "updates"))
        self._evaluations = Table(folder.evaluations, "timesteps", _EVAL)
        self._tables = (self._monitor, self._progress, self._evaluations)
        self._recorded = 0
        self.window = Window()
        """The last episodes."""
        try:
            self._start(resume_timesteps)
        except ValueError as error:
            raise RunError(str(error)) from error
        except OSError as error:
            raise RunError(f"{folder.path}: cannot continue the logs: {reason(error)}") from error
        self._identity = self._found()
        # The events of earlier files count up to here only.
        purge = None if resume_timesteps is None else resume_timesteps + 1
        self._events = EventFile(folder.path, purge) if events else None
        self._tags: set[str] | None = None

    @property
    def ep_rew_mean(self) -> float | None:
        """Mean return of the last 100 episodes; None before the first."""
        return self.window.reward

    def write(self, stats: TrainStats) -> None:
        """Record one update and the episodes that ended in it."""
        rows = []
        for episode in stats.episodes:
            reward = round(float(episode.reward), 6)
            seconds = round(float(episode.seconds), 6)
            infos = {k: f"{v:.9g}" if _known(v) else "" for k, v in episode.info.items()}
            # The numbers of the file, which a resumed run goes on with.
            read = {k: float(text or "nan") for k, text in infos.items()}
            self.window.add(reward, int(episode.length), read)
            values = (repr(reward), str(int(episode.length)), repr(seconds), str(stats.timesteps))
            rows.append(dict(zip(_MONITOR, values, strict=True)) | infos)
        if rows:
            self._monitor.add(rows)
        means = self.window.means
        row = {"timesteps": str(stats.timesteps), "updates": str(stats.updates)}
        row |= {tag: "" if mean is None else f"{mean:.9g}" for tag, mean in means.items()}
        # The means of callbacks are of the same episodes, but not rounded as those of the file.
        metrics = {tag: value for tag, value in stats.metrics.items() if tag not in means}
        row |= {tag: f"{float(value):.9g}" for tag, value in metrics.items()}
        rare = set(row) - (set(row) if self._tags is None else self._tags)
        self._tags = set(row)
        if rare or stats.updates % rows_apart(stats.updates, DENSE) == 0:
            self._progress.add([row])
        scalars = {tag: mean for tag, mean in means.items() if mean is not None} | metrics
        if stats.updates % rows_apart(stats.updates, POINTS):
            scalars = {tag: value for tag, value in scalars.items() if tag in rare}
        if self._events is not None:
            self._events.add(stats.timesteps, scalars)

    def write_evaluation(
        self,
        timesteps: int,
        returns: Sequence[float],
        lengths: Sequence[int],
        recorded: Mapping[str, float] | None = None,
    ) -> None:
        """Record an evaluation: returns and lengths of its episodes, means of recorded infos."""
        rewards = [float(value) for value in returns]
        mean, std, length = map(float, (np.mean(rewards), np.std(rewards), np.mean(lengths)))
        values = [str(int(timesteps)), f"{mean:.9g}", f"{std:.9g}", f"{length:.9g}"]
        values += [str(len(rewards)), ";".join(repr(round(value, 6)) for value in rewards)]
        others = {k: v for k, v in (recorded or {}).items() if _known(v)}
        row = dict(zip(_EVAL, values, strict=True))
        row |= {f"mean_{k}": f"{v:.9g}" for k, v in others.items()}
        self._evaluations.add([row])
        point = {"eval/mean_reward": mean, "eval/mean_ep_length": length}
        if self._events is not None:
            self._events.add(timesteps, point | {tag_of("eval", k): v for k, v in others.items()})

    def describe(self, settings: Mapping[str, Any]) -> None:
        """Record the settings of the run for TensorBoard, with its returns beside them.

        Those of other algorithms than its own are left out.
        """
        others = {"acktr", "a2c", "trpo"} - {settings.get("algo")}
        own = {name: value for name, value in settings.items() if name not in others}
        if self._events is not None:
            self._events.describe(flat(own), ("eval/mean_reward", "rollout/ep_rew_mean"))

    def flush(self) -> None:
        """Write all that waits to be written."""
        if self._events is not None:
            self._events.flush()
        for table in self._tables:
            table.flush()

    def close(self) -> None:
        """Write what waits, unless the folder is another one by now; nothing is open."""
        if self._found() == self._identity:
            self.flush()

    def require_folder(self) -> None:
        """Refuse to go on where the folder is another one than at the start.

        Raises:
            RunError: It was moved or deleted.
        """
        if self._found() != self._identity:
            raise RunError(
                f"{self._folder.path}: the run folder was moved or deleted during training, which"
                " ends here; where it was moved to, acktr train --resume goes on from its last"
                " checkpoint"
            )

    def missing_updates(self, updates: int) -> int:
        """Updates at the end of the first so many that should have a row here and have none."""
        return max(0, updates - updates % rows_apart(updates, DENSE) - self._recorded)

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, resume_timesteps: int | None) -> None:
        """Cut the files, and take the episode window from the rows that are left."""
        if resume_timesteps is None:
            for table in self._tables:
                table.require_new()
            return
        episodes, progress, _ = (table.cut(resume_timesteps, WINDOW) for table in self._tables)
        try:
            if progress:
                self._recorded = int(progress[-1]["updates"])
        except ValueError as error:
            raise ValueError(f"{self._folder.progress}: {error}") from error
        try:
            for row in episodes:
                infos = {k: float(row[k] or "nan") for k in row if k not in _MONITOR}
                self.window.add(float(row["r"]), int(row["l"]), infos)
        except ValueError as error:
            raise ValueError(f"{self._folder.monitor}: {error}") from error

    def _found(self) -> tuple[int, int] | None:
        """Which folder has the run's name; None if there is none."""
        try:
            found = os.stat(self._folder.path)
        except OSError:
            return None
        return found.st_dev, found.st_ino


def _known(value: float | None) -> bool:
    """Whether a number that was to be recorded was there."""
    return value is not None and not math.isnan(value)


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else None
