"""What training writes into a run's folder: CSV files and TensorBoard events."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from acktr.files import reason
from acktr.runs.folder import RunError, RunFolder
from acktr.runs.tables import WINDOW, Table

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from acktr.train import TrainStats

_FLUSH_SECONDS = 30
_MONITOR = ("r", "l", "t", "step")
_EVAL = ("timesteps", "mean_reward", "std_reward", "mean_length", "episodes", "returns")

_logger = logging.getLogger(__name__)


class RunLogger:
    """Writes what training reports: monitor.csv, progress.csv, eval.csv and TensorBoard.

    A write that fails (a full disk) is reported once as a warning and never raised. Whole rows are
    lost then and no partial ones stay; TensorBoard's events end with the first failure. They get at
    most one point per ``interval`` seconds.
    """

    def __init__(
        self,
        folder: RunFolder,
        env_id: str,
        resume_timesteps: int | None = None,
        *,
        interval: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the files; when resuming, drop rows of later timesteps.

        ``interval`` is the least seconds, by ``clock``, between two TensorBoard points.

        Raises:
            RunError: if an existing file cannot be read or is not what this class writes.
        """
        self._folder = folder
        header = json.dumps({"t_start": time.time(), "env_id": env_id})
        self._monitor = Table(folder.monitor, "step", _MONITOR, comment=f"#{header}")
        self._progress = Table(folder.progress, "timesteps", ("timesteps", "updates"))
        self._evaluations = Table(folder.evaluations, "timesteps", _EVAL)
        self._episodes: deque[tuple[float, int, Mapping[str, float]]] = deque(maxlen=WINDOW)
        try:
            self._start(resume_timesteps)
        except ValueError as error:
            raise RunError(str(error)) from error
        except OSError as error:
            raise RunError(f"{folder.path}: cannot continue the logs: {reason(error)}") from error
        self._board: SummaryWriter | None = None
        with self._board_kept():
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            # The events of earlier files count up to here only.
            purge = None if resume_timesteps is None else resume_timesteps + 1
            self._board = SummaryWriter(
                str(folder.path), purge_step=purge, flush_secs=_FLUSH_SECONDS
            )
        self._interval, self._clock = interval, clock
        self._next_point = -math.inf
        self._pending: tuple[int, dict[str, float]] | None = None

    @property
    def ep_rew_mean(self) -> float | None:
        """Mean return of the last 100 episodes; None before the first."""
        return _mean([reward for reward, _, _ in self._episodes])

    @property
    def ep_len_mean(self) -> float | None:
        """Mean length of the last 100 episodes; None before the first."""
        return _mean([length for _, length, _ in self._episodes])

    @property
    def recorded_means(self) -> dict[str, float | None]:
        """Means of recorded infos of the last 100 episodes by name."""
        names = dict.fromkeys(name for *_, info in self._episodes for name in info)
        return {
            name: _mean([info[name] for *_, info in self._episodes if _known(info.get(name))])
            for name in names
        }

    def write(self, stats: TrainStats) -> None:
        """Record one update and the episodes that ended in it."""
        rows = []
        for episode in stats.episodes:
            reward = round(float(episode.reward), 6)
            seconds = round(float(episode.seconds), 6)
            self._episodes.append((reward, int(episode.length), episode.info))
            values = (repr(reward), str(int(episode.length)), repr(seconds), str(stats.timesteps))
            infos = {k: f"{v:.9g}" if _known(v) else "" for k, v in episode.info.items()}
            rows.append(dict(zip(_MONITOR, values, strict=True)) | infos)
        if rows:
            self._monitor.add(rows)
        means = {"rollout/ep_rew_mean": self.ep_rew_mean, "rollout/ep_len_mean": self.ep_len_mean}
        means |= {f"rollout/{name}_mean": mean for name, mean in self.recorded_means.items()}
        row = {"timesteps": str(stats.timesteps), "updates": str(stats.updates)}
        row |= {tag: "" if mean is None else f"{mean:.9g}" for tag, mean in means.items()}
        row |= {tag: f"{float(value):.9g}" for tag, value in stats.metrics.items()}
        self._progress.add([row])
        scalars = {tag: mean for tag, mean in means.items() if mean is not None} | stats.metrics
        self._keep_rare(scalars)
        self._pending = (stats.timesteps, scalars)
        now = self._clock()
        if now >= self._next_point:
            self._next_point = now + self._interval
            self._write_point()

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
        others = {f"mean_{k}": v for k, v in (recorded or {}).items() if _known(v)}
        row = dict(zip(_EVAL, values, strict=True)) | {k: f"{v:.9g}" for k, v in others.items()}
        self._evaluations.add([row])
        point = {"eval/mean_reward": mean, "eval/mean_ep_length": length}
        self._add_point(timesteps, point | {f"eval/{k}": v for k, v in others.items()})

    def flush(self) -> None:
        """Write the latest point to TensorBoard and wait until all events are in the file."""
        self._write_point()
        with self._board_kept():
            if self._board is not None:
                self._board.flush()

    def close(self) -> None:
        """Write the latest point and close the files; further calls do nothing."""
        self._write_point()
        with self._board_kept():
            if self._board is not None:
                self._board.close()
        self._board = None

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, resume_timesteps: int | None) -> None:
        """Cut the files, and take the episode window from the rows that are left."""
        tables = (self._monitor, self._progress, self._evaluations)
        if resume_timesteps is None:
            for table in tables:
                table.require_new()
            return
        kept = [table.cut(resume_timesteps) for table in tables]
        try:
            for row in kept[0][-WINDOW:]:
                infos = {k: float(row[k] or "nan") for k in row if k not in _MONITOR}
                self._episodes.append((float(row["r"]), int(row["l"]), infos))
        except ValueError as error:
            raise ValueError(f"{self._folder.monitor}: {error}") from error

    def _keep_rare(self, scalars: Mapping[str, float]) -> None:
        """Write what the waiting point has and these do not, as an evaluation, which are rare."""
        if self._pending is not None:
            timesteps, waiting = self._pending
            self._add_point(timesteps, {t: v for t, v in waiting.items() if t not in scalars})

    def _write_point(self) -> None:
        if self._pending is not None:
            self._add_point(*self._pending)
            self._pending = None

    def _add_point(self, timesteps: int, scalars: Mapping[str, float]) -> None:
        with self._board_kept():
            if self._board is not None:
                for tag, value in scalars.items():
                    self._board.add_scalar(tag, value, timesteps)

    @contextmanager
    def _board_kept(self) -> Iterator[None]:
        """Give TensorBoard up if it fails; it is not even closed, as its thread may be dead."""
        try:
            yield
        except Exception as error:
            self._board = None
            _logger.warning("%s: no more TensorBoard events: %s", self._folder.path, error)


def _known(value: float | None) -> bool:
    """Whether a number that was to be recorded was there."""
    return value is not None and not math.isnan(value)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
