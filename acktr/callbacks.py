"""Ready callbacks; what a callback may be is said in :mod:`acktr.listeners`."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from acktr.apart import TOLD_LATER
from acktr.files import reason
from acktr.listeners import Learning, Listener, Recorder
from acktr.policies import NetworkSource
from acktr.runs.checkpoint import CheckpointError
from acktr.runs.folder import RunError, RunFolder
from acktr.runs.logger import RunLogger
from acktr.runs.progress import Progress, score
from acktr.runs.saved import read_agent
from acktr.runs.session import Every
from acktr.runs.tables import WINDOW, tag_of
from acktr.train import TrainStats


def with_panel(those: list[Listener], first: str) -> list[Listener]:
    """The listeners with a panel at the end, after a line, unless the user gave one."""
    if any(isinstance(each, ProgressBar) for each in those):
        return those
    return [*those, ProgressBar(first)]


def require_order(those: Sequence[Listener]) -> None:
    """Raise ValueError if something waits for evaluations that are made after it."""
    kinds = [type(each) for each in those]
    for place, each in enumerate(those):
        of_evaluations = isinstance(each, StopAt) and each.metric.startswith("eval/")
        if of_evaluations and Evaluations in kinds[place:] and Evaluations not in kinds[:place]:
            raise ValueError("StopAt must stand after the Evaluations that it waits for")


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
            mean = stats.metrics["eval/mean_reward"]
            result = score(mean)
            self._progress.evaluated(mean, stats.timesteps)
            self._progress.note(f"evaluation at step {stats.timesteps:,}: {result}")
        self._progress.update(stats, stats.metrics.get("rollout/ep_rew_mean"))

    def end(self) -> None:
        """Leave the panel as it is."""
        if self._progress is not None:
            self._progress.close()


class _OfAgent:
    """What follows one agent through its calls of ``learn``; the next one begins anew."""

    _agent: Learning | None = None

    def _takes_another(self, agent: Learning) -> bool:
        """Take in the agent; whether it is another one than last time."""
        former, self._agent = self._agent, agent
        return former is not agent

    def end(self) -> None:
        """Nothing to do."""


class Logs(_OfAgent, Recorder):
    """TensorBoard events, progress.csv and monitor.csv, as a training run writes them.

    They lie in a folder ``ALGO_N`` of the given one, with the first N that is free, as in
    Stable-Baselines3. Later calls of ``learn`` of the same agent go on in the same folder.

    Args:
        folder: Where the folders of all agents are.
    """

    def __init__(self, folder: str | Path) -> None:
        self._root = Path(folder)
        self.folder: Path | None = None
        """The folder of this agent, after training has begun."""
        self.logger: RunLogger | None = None
        """What writes them, after training has begun."""

    def begin(self, agent: Learning, total_timesteps: int) -> None:
        """Make the folder or open its files again.

        Raises:
            RunError: It cannot be made.
        """
        if self._takes_another(agent):
            self.folder = None
        done = None if self.folder is None else agent.num_timesteps
        if self.folder is None:
            self.folder = _new_folder(self._root, agent.config.algo)
        self.logger = RunLogger(RunFolder(self.folder), agent.config.env, done)

    def __call__(self, stats: TrainStats) -> None:
        """Write the update."""
        assert self.logger is not None
        self.logger.write(stats)

    def end(self) -> None:
        """Close the files."""
        if self.logger is not None:
            self.logger.close()


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


class Checkpoints(_OfAgent):
    """Saves the agent to ``FOLDER/step_N.zip`` every so many steps.

    Args:
        folder: Where to.
        every: Environment steps between two of them.
    """

    def __init__(self, folder: str | Path, every: int = 100_000) -> None:
        self._folder = Path(folder)
        self._every = _positive("every", every)
        self._due = Every(every, 0)

    def begin(self, agent: Learning, total_timesteps: int) -> None:
        """Make the folder.

        Raises:
            CheckpointError: It cannot be made.
        """
        _make(self._folder)
        self._takes_another(agent)
        self._due = Every(self._every, agent.num_timesteps)

    def __call__(self, stats: TrainStats) -> None:
        """Save if it is time to.

        Raises:
            CheckpointError: It cannot be written.
        """
        if self._due.due(stats.timesteps):
            assert self._agent is not None
            self._agent.save(self._folder / f"step_{stats.timesteps}.zip")


class Videos(_OfAgent):
    """Films episodes every so many steps: ``FOLDER/step_N.mp4``.

    They are played by a copy of the agent in an environment of their own, so that training goes on
    as if nobody had looked.

    Args:
        folder: Where to.
        every: Environment steps between two of them.
        episodes: Episodes of each.
        max_steps: Most steps of an episode that are filmed.
        network: The network of one's own that is trained, as for ``Agent.load``.
    """

    def __init__(
        self,
        folder: str | Path,
        every: int = 100_000,
        *,
        episodes: int = 1,
        max_steps: int = 10_000,
        network: NetworkSource | None = None,
    ) -> None:
        self._folder, self._network = Path(folder), network
        self._every, self._episodes = _positive("every", every), _positive("episodes", episodes)
        self._max_steps = _positive("max_steps", max_steps)
        self._due = Every(every, 0)

    def begin(self, agent: Learning, total_timesteps: int) -> None:
        """Make the folder, and film a step to see that it can be done.

        Raises:
            CheckpointError: It cannot be made, or no file can bring back the agent's environments
                or, unless it was given, its network.
            EnvError: The environment cannot be made or rendered.
            RecordError: The video cannot be written.
        """
        _make(self._folder)
        self._takes_another(agent)
        self._due = Every(self._every, agent.num_timesteps)
        self._film(None, 1, 1)

    def __call__(self, stats: TrainStats) -> None:
        """Film if it is time to.

        Raises:
            EnvError: The environment cannot be made or rendered.
            RecordError: The video cannot be written.
        """
        if self._due.due(stats.timesteps):
            out = self._folder / f"step_{stats.timesteps}.mp4"
            self._film(out, self._episodes, self._max_steps)

    def _film(self, out: Path | None, episodes: int, max_steps: int) -> None:
        """Write a video; to nowhere if there is no name."""
        from acktr.runs.video import record  # imageio is for who films

        assert self._agent is not None
        with TemporaryDirectory() as scratch:
            saved = Path(scratch) / "agent.zip"
            self._agent.save(saved)
            record(
                replace(read_agent(saved), network=self._network),
                out or saved.with_suffix(".mp4"),
                episodes=episodes,
                max_steps=max_steps,
                seed=0,
                device="cpu",
            )


class Evaluations(_OfAgent):
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
        score: Score of the agent's best evaluation so far.
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
        self.score = -math.inf

    def begin(self, agent: Learning, total_timesteps: int) -> None:
        """Take in the agent; of another one than before no evaluation was yet."""
        if self._takes_another(agent):
            self.score = -math.inf
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
        means = {tag_of("eval", key): found.mean_of(key) for key in sorted(keys)}
        lengths = float(np.mean(found.lengths))
        return {"eval/mean_reward": found.mean, "eval/mean_ep_length": lengths, **means}


class StopAt(_OfAgent):
    """Stops when a metric reaches a threshold.

    Args:
        threshold: The least value that stops.
        metric: Which; the mean return of training, or ``eval/mean_reward`` of
            :class:`Evaluations` before it in the list. Metrics ``rollout/...`` are there when an
            episode has ended, metrics ``eval/...`` when there was an evaluation, and all others
            must be there after every update; the first may lack those of a critic that learns in
            another process.
        episodes: Training episodes that must have ended before a mean over them, a metric
            ``rollout/...``, counts: a mean over few of them is luck.
    """

    def __init__(
        self, threshold: float, metric: str = "rollout/ep_rew_mean", episodes: int = WINDOW
    ) -> None:
        self.metric = metric
        self._threshold = float(threshold)
        self._group = metric.partition("/")[0]
        self._needed = episodes if self._group == "rollout" else 0
        self._ended, self._seen, self._last = 0, False, math.inf
        self._late = metric in TOLD_LATER

    def begin(self, agent: Learning, total_timesteps: int) -> None:
        """Take in when training will end, and begin anew with another agent than before."""
        if self._takes_another(agent):
            self._ended, self._seen, self._late = 0, False, self.metric in TOLD_LATER
        self._last = total_timesteps

    def __call__(self, stats: TrainStats) -> bool:
        """Whether to go on.

        Raises:
            ValueError: The statistics have no such metric, and later ones would have none.
        """
        self._ended += len(stats.episodes)
        value = stats.metrics.get(self.metric)
        if value is not None:
            self._seen = True
            return not (value >= self._threshold and self._ended >= self._needed)
        if not self._seen and not self._may_come(stats):
            raise ValueError(self._lacking(stats))
        self._late = False
        if not self._seen and self._group == "eval" and stats.timesteps >= self._last:
            warnings.warn(
                f"StopAt waited for {self.metric!r}, but there was no evaluation: give Evaluations"
                " before it in the list, which evaluate before training ends",
                UserWarning,
                stacklevel=2,
            )
        return True

    def _may_come(self, stats: TrainStats) -> bool:
        """Whether a metric that these statistics lack may be in later ones."""
        if self._group == "eval":
            return not any(name.startswith("eval/") for name in stats.metrics)
        return self._late or (self._group == "rollout" and not self._ended)

    def _lacking(self, stats: TrainStats) -> str:
        near = difflib.get_close_matches(self.metric, stats.metrics, cutoff=0.5)
        alike = [name for name in stats.metrics if name.startswith(f"{self._group}/")]
        return (
            f"StopAt waits for the metric {self.metric!r}, which update {stats.updates} has not; it"
            f" has {', '.join(near or alike or sorted(stats.metrics)):.300}"
        )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot make it: {reason(error)}") from error


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r:.30}")
    return int(value)
