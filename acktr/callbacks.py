"""Callbacks of training in Python: what they may be, and ready ones.

A callback is a function of :class:`acktr.TrainStats`, called after every update. What it returns
decides: False (Python's, NumPy's or torch's) stops the training after this update; a dict of
numbers by name is recorded with the metrics; all else is ignored. A callback that wants to know
the agent, and when training begins and ends, is a :class:`Listener`.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from acktr.config import Config
from acktr.evaluate import Evaluation
from acktr.files import reason
from acktr.runs.checkpoint import CheckpointError
from acktr.runs.folder import RunError, RunFolder
from acktr.runs.logger import RunLogger
from acktr.runs.progress import Progress, score
from acktr.runs.session import Every
from acktr.runs.tables import WINDOW
from acktr.train import TrainStats


class Learning(Protocol):
    """What callbacks may use of an agent; :class:`acktr.agent.Agent` is one."""

    config: Config

    @property
    def num_timesteps(self) -> int:
        """Environment steps learned from so far."""

    def evaluate(
        self,
        env: Any = None,
        episodes: int = 100,
        *,
        deterministic: bool | None = None,
        best_by: str | None = None,
    ) -> Evaluation:
        """Play whole episodes."""

    def save(self, path: str | Path) -> None:
        """Write everything to a folder or a file."""


@runtime_checkable
class Listener(Protocol):
    """A callback that is told the agent before the first update, and when training ends."""

    def begin(self, agent: Learning, total_timesteps: int) -> None:
        """Take in the agent, and the number of steps at which training will end."""

    def __call__(self, stats: TrainStats) -> object:
        """Take in an update; False stops, a dict of numbers is recorded."""

    def end(self) -> None:
        """Leave, also where training ended by an exception."""


Callback = Listener | Callable[[TrainStats], object]
"""A function of an update's statistics, or a ready one."""


@dataclasses.dataclass(frozen=True)
class _Function:
    """A function as a listener."""

    function: Callable[[TrainStats], object]

    def begin(self, agent: Learning, total_timesteps: int) -> None:
        """Nothing to do."""

    def __call__(self, stats: TrainStats) -> object:
        """What the function returns."""
        return self.function(stats)

    def end(self) -> None:
        """Nothing to do."""


def listeners(
    callback: Callback | Sequence[Callback] | None, logs: Logs | None = None
) -> list[Listener]:
    """All that listen to a training: what the user gives, and the logs after it.

    Raises:
        TypeError: A callback is none; one line that says what to write.
    """
    given: Sequence[Any] = callback if isinstance(callback, list | tuple) else [callback]
    those = [] if callback is None else [_listener(each) for each in given]
    return those if logs is None else [*those, logs]


def with_panel(those: list[Listener], first: str) -> list[Listener]:
    """The listeners with a panel at the end, after a line, unless the user gave one."""
    if any(isinstance(each, ProgressBar) for each in those):
        return those
    return [*those, ProgressBar(first)]


def _listener(given: Any) -> Listener:
    if isinstance(given, type):
        raise TypeError(f"callback {given.__name__} is a class: give {given.__name__}(...)")
    if isinstance(given, Listener):
        return given
    if callable(given):
        return _Function(given)
    theirs = " of Stable-Baselines3" if hasattr(given, "on_step") else ""
    raise TypeError(
        f"callback must be a function of acktr.TrainStats, one of acktr.callbacks, or a list of"
        f" them, got {type(given).__name__}{theirs}"
    )


def tell(those: Sequence[Listener], stats: TrainStats) -> bool:
    """Tell an update to all listeners; each also sees the metrics that earlier ones returned.

    Returns:
        Whether training goes on: none of them said False.

    Raises:
        TypeError: A dict that a callback returned holds something else than numbers by name.
    """
    going_on = True
    for each in those:
        answer = each(stats)
        if isinstance(answer, Mapping):
            stats = dataclasses.replace(stats, metrics={**stats.metrics, **_numbers(answer)})
        elif _is_false(answer):
            going_on = False
    return going_on


def _numbers(answer: Mapping[Any, Any]) -> dict[str, float]:
    try:
        if all(isinstance(key, str) and key.isprintable() for key in answer):
            return {key: float(value) for key, value in answer.items()}
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"a callback returned {answer!r:.100}: own metrics are numbers by name")


def _is_false(answer: object) -> bool:
    """Whether it is False, of Python, NumPy or torch; None, 0 and all else are not."""
    if isinstance(answer, np.generic | np.ndarray | torch.Tensor) and math.prod(answer.shape) == 1:
        answer = answer.item()
    return answer is False


class ProgressBar:
    """A panel on the terminal; lines on standard error where there is none. As ``verbose=1``.

    Args:
        first: A line to begin with.
    """

    def __init__(self, first: str | None = None) -> None:
        self._first = first
        self._progress: Progress | None = None

    def begin(self, agent: Learning, total_timesteps: int) -> None:
        """Start the clock."""
        self._progress = Progress(total_timesteps, start_timesteps=agent.num_timesteps)
        if self._first is not None:
            self._progress.note(self._first)

    def __call__(self, stats: TrainStats) -> None:
        """Show the update, when it is time to, and evaluations."""
        assert self._progress is not None
        if "eval/mean_reward" in stats.metrics:
            result = score(stats.metrics["eval/mean_reward"])
            self._progress.note(f"evaluation at step {stats.timesteps:,}: {result}")
        self._progress.update(stats, stats.metrics.get("rollout/ep_rew_mean"))

    def end(self) -> None:
        """Leave the panel as it is."""
        if self._progress is not None:
            self._progress.close()


class Logs:
    """TensorBoard events, progress.csv and monitor.csv, as a training run writes them.

    They lie in a folder ``ALGO_N`` of the given one, with the first N that is free, as in
    Stable-Baselines3. Later calls of ``learn`` go on in the same folder.

    Args:
        folder: Where the folders of all agents are.
    """

    def __init__(self, folder: str | Path) -> None:
        self._root = Path(folder)
        self.folder: Path | None = None
        """The folder of this agent, after training has begun."""
        self._logger: RunLogger | None = None

    def begin(self, agent: Learning, total_timesteps: int) -> None:
        """Make the folder or open its files again.

        Raises:
            RunError: It cannot be made.
        """
        done = None if self.folder is None else agent.num_timesteps
        if self.folder is None:
            self.folder = _new_folder(self._root, agent.config.algo)
        self._logger = RunLogger(RunFolder(self.folder), agent.config.env, done)

    def __call__(self, stats: TrainStats) -> None:
        """Write the update."""
        assert self._logger is not None
        self._logger.write(stats)

    def end(self) -> None:
        """Close the files."""
        if self._logger is not None:
            self._logger.close()


def _new_folder(root: Path, name: str) -> Path:
    """A new folder NAME_N."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        number = 1
        while (root / f"{name}_{number}").exists():
            number += 1
        path = root / f"{name}_{number}"
        path.mkdir()
    except OSError as error:
        raise RunError(f"{root}: cannot make a folder for logs: {reason(error)}") from error
    return path


class Checkpoints:
    """Saves the agent to ``FOLDER/step_N.zip`` every so many steps.

    Args:
        folder: Where to.
        every: Environment steps between two of them.
    """

    def __init__(self, folder: str | Path, every: int = 100_000) -> None:
        self._folder = Path(folder)
        self._every = _positive("every", every)
        self._due = Every(every, 0)
        self._agent: Learning | None = None

    def begin(self, agent: Learning, total_timesteps: int) -> None:
        """Make the folder.

        Raises:
            CheckpointError: It cannot be made.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self._folder}: cannot make it: {reason(error)}") from error
        self._agent = agent
        self._due = Every(self._every, agent.num_timesteps)

    def __call__(self, stats: TrainStats) -> None:
        """Save if it is time to.

        Raises:
            CheckpointError: It cannot be written.
        """
        if self._due.due(stats.timesteps):
            assert self._agent is not None
            self._agent.save(self._folder / f"step_{stats.timesteps}.zip")

    def end(self) -> None:
        """Nothing to do."""


class Evaluations:
    """Evaluates every so many steps, and saves the best agent so far.

    The metrics ``eval/mean_reward``, ``eval/mean_ep_length`` and, of recorded infos,
    ``eval/mean_KEY`` go to the logs.

    Args:
        env: Where to play, as in ``Agent.evaluate``.
        every: Environment steps between two evaluations.
        episodes: Episodes of each.
        best: Folder, or file ending in .zip, that the best agent is saved to; None: nowhere.
        best_by: Key of the infos of episodes' last steps whose mean says which agent is best; None:
            the return.
        deterministic: The most likely actions; None: except in Atari games.

    Attributes:
        score: Score of the best evaluation so far.
    """

    def __init__(
        self,
        env: Any = None,
        every: int = 10_000,
        episodes: int = 10,
        *,
        best: str | Path | None = None,
        best_by: str | None = None,
        deterministic: bool | None = None,
    ) -> None:
        self._env = env
        self._every, self._episodes = _positive("every", every), _positive("episodes", episodes)
        self._best, self._best_by = best, best_by
        self._deterministic = deterministic
        self._due = Every(every, 0)
        self._agent: Learning | None = None
        self.score = -math.inf

    def begin(self, agent: Learning, total_timesteps: int) -> None:
        """Take in the agent."""
        self._agent = agent
        self._due = Every(self._every, agent.num_timesteps)

    def __call__(self, stats: TrainStats) -> dict[str, float] | None:
        """Play if it is time to.

        Raises:
            CheckpointError: The best agent cannot be saved.
        """
        if not self._due.due(stats.timesteps):
            return None
        assert self._agent is not None
        found = self._agent.evaluate(
            self._env,
            self._episodes,
            deterministic=self._deterministic,
            best_by=self._best_by,
        )
        if found.score > self.score:
            self.score = found.score
            if self._best is not None:
                self._agent.save(self._best)
        keys = {key for info in found.infos for key in info}
        means = {f"eval/mean_{key}": found.mean_of(key) for key in sorted(keys)}
        lengths = float(np.mean(found.lengths))
        return {"eval/mean_reward": found.mean, "eval/mean_ep_length": lengths, **means}

    def end(self) -> None:
        """Nothing to do."""


class StopAt:
    """Stops when a metric reaches a threshold.

    Args:
        threshold: The least value that stops.
        metric: Which; the mean return of training, or ``eval/mean_reward`` of
            :class:`Evaluations` before it in the list.
        episodes: Training episodes that must have ended before a mean over them, a metric
            ``rollout/...``, counts: a mean over few of them is luck.
    """

    def __init__(
        self, threshold: float, metric: str = "rollout/ep_rew_mean", episodes: int = WINDOW
    ) -> None:
        self._threshold, self._metric = float(threshold), metric
        self._needed = episodes if metric.startswith("rollout/") else 0
        self._ended = 0

    def __call__(self, stats: TrainStats) -> bool:
        """Whether to go on."""
        self._ended += len(stats.episodes)
        reached = stats.metrics.get(self._metric, -math.inf) >= self._threshold
        return not (reached and self._ended >= self._needed)


class Window:
    """Means over the last 100 episodes that ended in training."""

    def __init__(self) -> None:
        self._episodes: deque[tuple[float, int]] = deque(maxlen=WINDOW)

    def __call__(self, stats: TrainStats) -> TrainStats:
        """The statistics with ``rollout/ep_rew_mean`` and ``rollout/ep_len_mean``."""
        self._episodes.extend((episode.reward, episode.length) for episode in stats.episodes)
        if not self._episodes:
            return stats
        rewards, lengths = np.mean(self._episodes, axis=0)
        means = {"rollout/ep_rew_mean": float(rewards), "rollout/ep_len_mean": float(lengths)}
        return dataclasses.replace(stats, metrics={**stats.metrics, **means})


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r:.30}")
    return int(value)
