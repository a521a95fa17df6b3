"""A run's folder and what training writes into it: CSV files and TensorBoard events."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from acktr.files import read_limited, read_object, reason, write_atomic
from acktr.runs.board import Board
from acktr.runs.tables import Table, read_table

if TYPE_CHECKING:
    from acktr.train import TrainStats

WINDOW = 100
"""Episodes over which rollout/ep_rew_mean and rollout/ep_len_mean are taken."""

_COMMAND_CAP = 1 << 20
_MONITOR = ("r", "l", "t", "step")
_EVAL = ("timesteps", "mean_reward", "std_reward", "mean_length", "episodes", "returns")
_PACKAGES = ("acktr", "torch", "gymnasium", "ale-py", "mujoco", "numpy")


class RunError(RuntimeError):
    """A run folder that cannot be created, opened or read; the message is one line."""


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps its files. TensorBoard events lie in the folder itself."""

    path: Path
    """The folder."""

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Make a new run's folder; an empty one may exist.

        Raises:
            RunError: if it holds something already or cannot be made.
        """
        try:
            if path.is_dir() and any(path.iterdir()):
                held = "already holds a run" if (path / "config.json").exists() else "is not empty"
                raise RunError(
                    f"{path} {held}; continue a run with --resume PATH "
                    "or choose another --run-dir or --seed"
                )
            path.mkdir(parents=True, exist_ok=True)
            (path / "checkpoints").mkdir()
        except OSError as error:
            raise RunError(f"{path}: cannot create the run folder: {reason(error)}") from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing run's folder.

        Raises:
            RunError: if there is no config.json in it.
        """
        if not (path / "config.json").is_file():
            raise RunError(f"{path}: not a run folder (it has no config.json)")
        return cls(path)

    @property
    def config(self) -> Path:
        """The configuration, JSON."""
        return self.path / "config.json"

    @property
    def versions(self) -> Path:
        """Versions of what the run was started with, JSON."""
        return self.path / "versions.json"

    @property
    def command(self) -> Path:
        """The command line, one line per start of the run."""
        return self.path / "command.txt"

    @property
    def monitor(self) -> Path:
        """One row per episode."""
        return self.path / "monitor.csv"

    @property
    def progress(self) -> Path:
        """One row per update."""
        return self.path / "progress.csv"

    @property
    def evaluations(self) -> Path:
        """One row per evaluation."""
        return self.path / "eval.csv"

    @property
    def curve(self) -> Path:
        """The learning curve."""
        return self.path / "curve.png"

    @property
    def last(self) -> Path:
        """The latest checkpoint."""
        return self.path / "checkpoints" / "last"

    @property
    def best(self) -> Path:
        """The checkpoint with the best evaluation."""
        return self.path / "checkpoints" / "best"

    def write_config(self, config: Mapping[str, object]) -> None:
        """Write config.json. Raises RunError if that fails."""
        self._write(self.config, json.dumps(config, indent=2, allow_nan=False) + "\n")

    def read_config(self) -> dict[str, Any]:
        """Read config.json: a JSON object whose contents are not checked.

        Raises:
            RunError: if it cannot be read, is larger than 1 MiB or is no JSON object.
        """
        try:
            return read_object(self.config)
        except ValueError as error:
            raise RunError(str(error)) from error

    def name_in(self, config: Mapping[str, object], key: str) -> str:
        """A name in what config.json holds.

        Raises:
            ValueError: if it is no printable text of 1 to 100 characters.
        """
        value = config.get(key)
        if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= 100:
            raise ValueError(f"{self.config}: {key} must be a printable name")
        return value

    def last_evaluation(self) -> int:
        """Steps of the last evaluation in eval.csv; 0 without one that can be read."""
        try:
            return max(
                (int(row["timesteps"]) for row in read_table(self.evaluations).rows), default=0
            )
        except (OSError, ValueError, KeyError):
            return 0

    def write_versions(self) -> None:
        """Write versions.json. Raises RunError if that fails."""
        self._write(self.versions, json.dumps(versions(), indent=2) + "\n")

    def write_command(self, argv: Sequence[str]) -> None:
        """Add a command line to command.txt. Raises RunError if that fails."""
        try:
            old = read_limited(self.command, _COMMAND_CAP) if self.command.exists() else b""
        except OSError as error:
            raise RunError(f"{self.command}: cannot read: {reason(error)}") from error
        line = shlex.join(argv).encode("utf-8", "surrogateescape") + b"\n"
        self._write(self.command, old + line)

    def _write(self, path: Path, content: str | bytes) -> None:
        try:
            write_atomic(path, content.encode() if isinstance(content, str) else content)
        except OSError as error:
            raise RunError(f"{path}: cannot write: {reason(error)}") from error


def versions() -> dict[str, str | int | None]:
    """Versions of Python, the packages that matter and the source; None for what is missing."""
    found: dict[str, str | int | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["platform"] = platform.platform()
    found["cpu_count"] = os.cpu_count()
    found["torch_threads"] = torch.get_num_threads()
    found["git_commit"] = _git_commit(Path(__file__).resolve().parents[2])
    return found


def _git_commit(source: Path) -> str | None:
    """The commit of a source checkout, with -dirty if it was edited."""
    if not (source / ".git").exists():
        return None
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--exclude", "*"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


class RunLogger:
    """Writes what training reports: monitor.csv, progress.csv, eval.csv and TensorBoard.

    A write that fails (a full disk) is reported once as a warning and never raised; whole rows are
    lost then, no partial ones stay. TensorBoard gets at most one point per ``interval`` seconds.
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

        Args:
            folder: The run.
            env_id: Environment id, for the header of monitor.csv.
            resume_timesteps: Timesteps of the checkpoint that training continues from.
            interval: Least seconds between two TensorBoard points.
            clock: Seconds, for ``interval``.

        Raises:
            RunError: if an existing file cannot be read or is not what this class writes.
        """
        header = json.dumps({"t_start": time.time(), "env_id": env_id})
        self._monitor = Table(folder.monitor, "step", _MONITOR, comment=f"#{header}")
        self._progress = Table(folder.progress, "timesteps", ("timesteps", "updates"))
        self._evaluations = Table(folder.evaluations, "timesteps", _EVAL)
        self._episodes: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        try:
            self._start(resume_timesteps, folder.monitor)
        except ValueError as error:
            raise RunError(str(error)) from error
        except OSError as error:
            raise RunError(f"{folder.path}: cannot continue the logs: {reason(error)}") from error
        purge = None if resume_timesteps is None else resume_timesteps + 1
        self._board = Board(folder.path, purge)
        self._interval, self._clock = interval, clock
        self._next_point = -math.inf
        self._pending: tuple[int, dict[str, float]] | None = None

    @property
    def ep_rew_mean(self) -> float | None:
        """Mean return of the last 100 episodes; None before the first."""
        return _mean([reward for reward, _ in self._episodes])

    @property
    def ep_len_mean(self) -> float | None:
        """Mean length of the last 100 episodes; None before the first."""
        return _mean([length for _, length in self._episodes])

    def write(self, stats: TrainStats) -> None:
        """Record one update and the episodes that ended in it."""
        rows = []
        for episode in stats.episodes:
            reward = round(float(episode.reward), 6)
            seconds = round(float(episode.seconds), 6)
            self._episodes.append((reward, int(episode.length)))
            values = (repr(reward), str(int(episode.length)), repr(seconds), str(stats.timesteps))
            rows.append(dict(zip(_MONITOR, values, strict=True)))
        if rows:
            self._monitor.add(rows)
        means = {"rollout/ep_rew_mean": self.ep_rew_mean, "rollout/ep_len_mean": self.ep_len_mean}
        row = {"timesteps": str(stats.timesteps), "updates": str(stats.updates)}
        row |= {tag: "" if mean is None else f"{mean:.9g}" for tag, mean in means.items()}
        row |= {tag: f"{float(value):.9g}" for tag, value in stats.metrics.items()}
        self._progress.add([row])
        scalars = {tag: mean for tag, mean in means.items() if mean is not None} | stats.metrics
        self._pending = (stats.timesteps, scalars)
        now = self._clock()
        if now >= self._next_point:
            self._next_point = now + self._interval
            self._write_point()

    def write_evaluation(
        self, timesteps: int, returns: Sequence[float], lengths: Sequence[int]
    ) -> None:
        """Record an evaluation: returns and lengths of its episodes.

        Raises:
            ValueError: if there are none, or not equally many.
        """
        if not returns or len(returns) != len(lengths):
            raise ValueError(
                f"{len(returns)} returns and {len(lengths)} lengths; need as many, > 0"
            )
        rewards = [float(value) for value in returns]
        mean, std, length = (
            float(x) for x in (np.mean(rewards), np.std(rewards), np.mean(lengths))
        )
        values = [str(int(timesteps)), f"{mean:.9g}", f"{std:.9g}", f"{length:.9g}"]
        values += [str(len(rewards)), ";".join(repr(round(value, 6)) for value in rewards)]
        self._evaluations.add([dict(zip(_EVAL, values, strict=True))])
        self._board.add(timesteps, {"eval/mean_reward": mean, "eval/mean_ep_length": length})

    def flush(self) -> None:
        """Write the latest point to TensorBoard and wait until all events are in the file."""
        self._write_point()
        self._board.flush()

    def close(self) -> None:
        """Write the latest point and close the files; further calls do nothing."""
        self._write_point()
        self._board.close()

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, resume_timesteps: int | None, monitor: Path) -> None:
        """Cut the files, and take the episode window from the rows that are left."""
        tables = (self._monitor, self._progress, self._evaluations)
        if resume_timesteps is None:
            for table in tables:
                table.require_new()
            return
        kept = [table.cut(resume_timesteps) for table in tables]
        try:
            for row in kept[0][-WINDOW:]:
                self._episodes.append((float(row["r"]), int(row["l"])))
        except ValueError as error:
            raise ValueError(f"{monitor}: {error}") from error

    def _write_point(self) -> None:
        if self._pending is not None:
            self._board.add(*self._pending)
            self._pending = None


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
