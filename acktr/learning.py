"""A call of ``learn``: an agent and its listeners in; updates, and a run folder if wanted, out."""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from acktr.callbacks import ProgressBar, with_panel
from acktr.config import Config, from_dict, refuse_learn
from acktr.environments import described
from acktr.envs import AnyVectorEnv, EnvError, FoundMasks, is_among
from acktr.given import Given, evaluation_place
from acktr.interrupts import Interrupts
from acktr.listeners import Learning, Listener, tell
from acktr.runs.folder import RunError, RunFolder, locked, run_path
from acktr.runs.logger import RunLogger, Window
from acktr.runs.opening import Opening, best_score
from acktr.runs.session import Host
from acktr.runs.start import difference
from acktr.train import Trainer, TrainStats


@dataclass(frozen=True)
class Kept:
    """What a call of ``learn`` keeps on the disk."""

    run_dir: Path
    """Folder of all runs."""
    label: str | None
    """Name of the run's folder in place of the algorithm's."""
    eval_freq: int | None
    """Steps between evaluations; None: the configuration's."""
    eval_env: Any
    """Where to evaluate; None: in more environments of the agent's kind."""
    tensorboard: bool
    """Whether there are events for TensorBoard."""


@dataclass(frozen=True)
class Lesson:
    """A call of ``learn``."""

    agent: Learning
    """Whose."""
    trainer: Trainer
    """What trains; its environments have begun."""
    end: int
    """Steps of the trainer at which it ends."""
    told: Sequence[Listener]
    """What listens to every update."""
    shown: bool
    """Whether progress is shown."""
    masks: FoundMasks
    """The action masks that the environments have."""

    def begin(self, told: Sequence[Listener], stack: ExitStack) -> None:
        """Tell listeners the beginning, and the end when the stack is left."""
        for each in told:
            each.begin(self.agent, self.end)
            stack.callback(each.end)


class Lessons:
    """What goes on from one call of ``learn`` to the next: the window of episodes, and the run.

    Attributes:
        logger: What writes the run folder of the latest call that had one; None before.
    """

    def __init__(self) -> None:
        self.logger: RunLogger | None = None
        self._window = Window()
        self._under_way = False

    def require_over(self) -> None:
        """Refuse to give a trainer up that is in use.

        Raises:
            RuntimeError: A call of ``learn`` is under way.
        """
        if self._under_way:
            raise RuntimeError(
                "set_env() during learn(): return False from the callback, then call set_env() and"
                " learn() again"
            )

    @contextmanager
    def _going_on(self) -> Iterator[ExitStack]:
        """A call of ``learn``, and what is left at its end."""
        before, self._under_way = self._under_way, True
        try:
            with ExitStack() as stack:
                yield stack
        finally:
            self._under_way = before

    def learn(self, lesson: Lesson) -> None:
        """Train, telling the listeners after every update; nothing is written."""
        told, trainer = list(lesson.told), lesson.trainer
        if lesson.shown:
            first = f"{trainer.described}, {lesson.masks.said or 'no action masks'}"
            told = with_panel(told, first)
        start = trainer.timesteps
        with self._going_on() as stack:
            lesson.begin(told, stack)
            for stats in trainer.run(lesson.end, start=start):
                if not self._told(told, stats)[1]:
                    break

    def learn_in_run(self, lesson: Lesson, given: Given, kept: Kept, meta: dict[str, Any]) -> None:
        """Train as a run of the command line does, in a folder of its own.

        Args:
            lesson: The call.
            given: Where the agent learns.
            kept: What is written.
            meta: What its checkpoints say besides.

        Raises:
            RunError: The folder holds another run, or cannot be written.
            EnvError: It would be evaluated where it learns.
            TrainingFault: Training failed; the message names the last good checkpoint.
            Stopped: A signal came, after which the run was saved.
        """
        from acktr.report.plot import draw_curve  # matplotlib takes a second

        trainer, told = lesson.trainer, lesson.told
        meta = {**meta, "eval_env": None if kept.eval_env is None else "own"}
        config = dataclasses.replace(trainer.config, total_timesteps=lesson.end)
        if kept.eval_freq is not None:
            config = dataclasses.replace(config, eval_freq=kept.eval_freq)

        def place(config: Config, count: int, seed: int) -> AbstractContextManager[AnyVectorEnv]:
            return evaluation_place(given, kept.eval_env, count, seed, None)

        if is_among(kept.eval_env, given.envs):
            raise EnvError("eval_env is where the agent learns: a run is evaluated in others")
        with place(config, 1, config.seed):
            pass  # what cannot be made is told before training
        path = run_path(kept.run_dir, config, kept.label)
        known = described(given.config) if given.origin is None else {"environment": given.origin}
        begun = trainer.timesteps
        host = Host(config, begun, partial(self._told, told), place, meta)
        with self._going_on() as stack:
            interrupts = stack.enter_context(Interrupts())
            stack.enter_context(interrupts.deferred())
            opening = Opening(
                trainer,
                interrupts,
                trainer.described,
                {**known, "action_masks": lesson.masks.source},
                ["python", *sys.argv],
                host=host,
                shown=lesson.shown and not any(isinstance(each, ProgressBar) for each in told),
                events=kept.tensorboard,
            )
            if self.logger is not None and self.logger.path == path:
                folder = RunFolder(path)
                stack.enter_context(locked(folder))
                _require_alike(folder, config)
                session = opening.again(folder, stack, best_score(folder))
                opening.save(session)
            else:
                session = opening.new(path, stack)
            self.logger = session.logger
            lesson.begin(told, stack)
            session.progress.note(opening.run(session, draw_curve))

    def _told(
        self,
        told: Sequence[Listener],
        stats: TrainStats,
        record: Callable[[TrainStats], None] = lambda stats: None,
    ) -> tuple[TrainStats, bool]:
        """Tell an update, with means over the last episodes among its metrics."""
        for each in stats.episodes:
            self._window.add(each.reward, each.length, each.info)
        means = {tag: mean for tag, mean in self._window.means.items() if mean is not None}
        stats = dataclasses.replace(stats, metrics={**stats.metrics, **means})
        return tell(told, stats, record)


def _require_alike(folder: RunFolder, config: Config) -> None:
    """Refuse to go on in a run's folder with what its files do not tell of.

    Raises:
        RunError: A setting is another one than there, as after ``set_env``.
    """
    changing = {name: getattr(config, name) for name in ("total_timesteps", "eval_freq")}
    stored = dataclasses.replace(from_dict(folder.read_config()), **changing)
    if differing := difference(stored, config):
        name, ours, theirs = differing
        raise RunError(
            f"{folder.config}: {name} is {ours!r} in this run and {theirs!r} now: give another"
            " label= to go on in a folder of its own"
        )


def asked_steps(total_timesteps: Any) -> int:
    """The steps that ``learn`` is asked for; 1e5 is a number of steps too.

    Raises:
        ValueError: They are not positive, or no number.
    """
    number = isinstance(total_timesteps, int | float | np.integer | np.floating)
    if not number or isinstance(total_timesteps, bool) or not 1 <= total_timesteps < math.inf:
        raise ValueError(
            f"total_timesteps must be at least 1 and a number, got {total_timesteps!r:.80}"
        )
    return int(total_timesteps)


def begin(trainer: Trainer) -> FoundMasks:
    """Begin episodes, and warn of what the caller of ``learn`` should know about them.

    Raises:
        ValueError: Somebody has put another network in the trainer's place, which does not learn;
            or the environments are closed.
    """
    if trainer.envs.closed:
        raise ValueError(
            "the agent's environments are closed: go on in others with set_env(), or load() it"
        )
    if trainer.network is not trainer.learner.network:
        raise ValueError(
            "trainer.network was replaced, and the new one would not learn: give it when the agent"
            " is made, network=..., or set_parameters() of the old one"
        )
    begun = trainer.collector.begun
    masks = trainer.begin()
    for warning in (None if begun else trainer.restarted, masks.unused):
        if warning is not None:
            warnings.warn(warning, UserWarning, stacklevel=3)
    return masks


def kept_by(
    run_dir: str | Path | None,
    label: str | None,
    eval_freq: int | None,
    eval_env: Any,
    tensorboard: bool,
    others: Iterable[str] = (),
) -> Kept | None:
    """What the arguments of ``learn`` ask to keep; None without a run folder.

    Raises:
        ConfigError: There are others.
        ValueError: An argument stands for nothing without a run folder.
    """
    refuse_learn(others)
    if run_dir is not None:
        return Kept(Path(run_dir), label, eval_freq, eval_env, tensorboard)
    alone = {"label": label, "eval_freq": eval_freq, "eval_env": eval_env}
    for name, value in alone.items():
        if value is not None:
            raise ValueError(
                f"{name} is for the run folder, so that run_dir is needed too;"
                " acktr.callbacks.Evaluations evaluates without one"
            )
    return None
