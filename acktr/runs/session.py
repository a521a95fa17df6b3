"""One training session of a run: logs, checkpoints, evaluations and an orderly end."""

from __future__ import annotations

import math
import shlex
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acktr.algorithms import CriticError
from acktr.config import Config, modules_of
from acktr.environments import evaluation_envs
from acktr.envs import AnyVectorEnv, EnvFault
from acktr.evaluate import Evaluation, evaluate, usually_deterministic
from acktr.interrupts import Interrupts, Stopped
from acktr.kfac import FactorError
from acktr.rollout import NonFiniteError
from acktr.runs.checkpoint import CheckpointError, save_checkpoint
from acktr.runs.episodes import SharedEpisodes
from acktr.runs.folder import KEPT, RunError, RunFolder
from acktr.runs.logger import RunLogger
from acktr.runs.meeting import Meeting
from acktr.runs.progress import Progress, duration, score
from acktr.runs.saved import broken_number, run_meta
from acktr.train import Trainer, TrainStats

EVALUATION_SEED = 10_000
"""Added to the run's seed for evaluations during training."""

EVALUATION_ENVS = 8
"""Most parallel environments of such an evaluation."""

Draw = Callable[[RunFolder, Config], str | None]
"""Draws the learning curve of a run, or returns one line that says why there is none."""


class TrainingFault(RuntimeError):  # noqa: N818 - as EnvFault
    """Training cannot go on; the message names the cause and the last good checkpoint.

    Args:
        message: One line.
        environment: Whether the environment is at fault rather than the numbers.
    """

    def __init__(self, message: str, environment: bool) -> None:
        super().__init__(message)
        self.environment = environment


class Every:
    """Something to do whenever the steps pass a multiple of ``interval``; never if that is 0.

    It was last done at ``last`` steps.
    """

    def __init__(self, interval: int, last: int) -> None:
        self._interval, self._last = interval, last

    def due(self, timesteps: int) -> bool:
        """Whether a multiple was passed since the last time that this was true."""
        if self._interval == 0 or timesteps // self._interval == self._last // self._interval:
            return False
        self._last = timesteps
        return True


Told = Callable[[TrainStats, Callable[[TrainStats], None]], tuple[TrainStats, bool]]
"""What listens to updates: statistics with what was added to them, and whether to go on.

The second argument is called with the statistics where it fails.
"""

Place = Callable[[Config, int, int], AbstractContextManager[AnyVectorEnv]]
"""Environments to evaluate in, of a configuration, a number and a seed."""


def _new_place(config: Config, count: int, seed: int) -> AbstractContextManager[AnyVectorEnv]:
    return closing(evaluation_envs(config, count, seed))


@dataclass(frozen=True)
class Host:
    """What a program whose agent trains in a run folder adds to a run of the command line."""

    config: Config
    """Settings of the run, in place of the trainer's."""
    begun: int
    """Steps at which schedules begin."""
    told: Told
    """What listens to updates."""
    place: Place
    """Where to evaluate."""
    meta: Mapping[str, Any]
    """What checkpoints say besides."""


class Session:
    """Trains until the configuration's total, from wherever the trainer is.

    ``stop_at`` ends the session at the first update with so many steps or more, with a checkpoint;
    schedules are those of the configuration's total all the same, so that a resumed run goes on as
    if it had not stopped. ``interrupts`` is entered by the caller. A signal that comes while an
    update is computed or a file written waits until that is done; one that comes during an
    evaluation does not. ``best`` is the score of the best checkpoint so far. ``host`` is the
    program that trains here, if that is not the command line. The other processes of ``meeting``
    train along; a signal to any of them stops all.
    """

    def __init__(
        self,
        folder: RunFolder,
        trainer: Trainer,
        logger: RunLogger,
        progress: Progress,
        interrupts: Interrupts,
        best: float | None = None,
        stop_at: int | None = None,
        host: Host | None = None,
        meeting: Meeting | None = None,
    ) -> None:
        self._meeting = meeting
        self.folder = folder
        self.trainer = trainer
        self._host = host
        self.config: Config = trainer.config if host is None else host.config
        self.logger = logger
        self.progress = progress
        self.interrupts = interrupts
        self.best = -math.inf if best is None else best
        self._stop_at = math.inf if stop_at is None else stop_at
        world = trainer.world
        self._episodes = None if world is None else SharedEpisodes(trainer, world, self._stop_at)
        self._checkpoints = Every(self.config.checkpoint_freq, trainer.timesteps)
        self._evaluations = Every(self.config.eval_freq, folder.last_evaluation())
        self._saved = -1
        self._saving = False
        self._refused = False
        self._evaluated: dict[int, Evaluation] = {}

    def run(self, draw: Draw) -> str:
        """Train, evaluate and draw the learning curve; only train if that is to stop early.

        Where the host's listeners stop it, the evaluation and the curve are made all the same.

        Returns:
            A line that sums the run up.

        Raises:
            Stopped: A signal came; its note says where the run can be resumed.
            TrainingFault: Training failed; the message names the last good checkpoint, which is
                that of the last update if an environment is at fault.
            CheckpointError: The last checkpoint cannot be written.
            RankError: Another process of the run is gone, failed or hangs.
        """
        try:
            # One update may take hours or, with an environment that hangs, for ever: steps may be
            # broken off, since the state of before the rollout can be saved.
            with self.interrupts.deferred(self._may_be_broken_off, self._leave):
                self._train()
                if not (self._complete or self._refused):
                    return self._continuation(f"stopped as asked at step {self._saved:,}")
                evaluation = self._evaluated.get(self.trainer.timesteps) or self._evaluate()
                # The evaluation is logged, so that a signal waits: a resumed run would find
                # nothing left to do, and the best checkpoint and the curve would never be made.
                if self.config.eval_freq > 0:
                    self.checkpoint(evaluation.mean, required=True)
                why: str | None = "no training episode has ended"
                if self.logger.ep_rew_mean is not None:
                    why = draw(self.folder, self.config)
                if why:
                    self.progress.note(f"no learning curve: {why}")
        except Stopped as stop:
            stop.note = self._leave(stop.signum)
            raise
        except (NonFiniteError, FactorError, CriticError) as error:
            raise TrainingFault(f"{error}; {self.good}", environment=False) from error
        except EnvFault as error:
            self._rescue()
            raise TrainingFault(
                f"{error}; {self.good}{self._log_fault(error)}", environment=True
            ) from error
        except (CheckpointError, RunError):
            raise
        except Exception:
            self._rescue()
            raise
        return self._summary(evaluation)

    def checkpoint(self, score: float | None = None, *, required: bool = False) -> None:
        """Write checkpoints/best if the score is, and last unless it is of this step already.

        Args:
            score: What the best checkpoint is chosen by, if it is known.
            required: Whether a checkpoint that cannot be written is an error. It is at the start
                and at the end of a session; between them a full disk must not end training, as
                the next checkpoint may succeed.

        Raises:
            CheckpointError: It cannot be written; the older one is intact then.
            NonFiniteError: The network is broken; the older one is intact too.
            RunError: The folder is gone.
        """
        self.logger.require_folder()
        self.logger.flush()  # a run that goes on from here has all logs up to here
        errors: list[CheckpointError] = []
        # The best one comes first: a run that is killed between the two goes on from before both,
        # and finds the same one again. One that fails must not keep the other from being written.
        if (
            score is not None
            and score > self.best
            and self._written(self.folder.best, score, errors)
        ):
            self.best = score
        if self._saved != self.trainer.timesteps and self._written(self.folder.last, None, errors):
            self._saved = self.trainer.timesteps
        if errors and required:
            raise errors[0]
        for error in errors:
            self.progress.note(f"warning: {error}; training goes on")

    def _written(self, path: Path, score: float | None, errors: list[CheckpointError]) -> bool:
        """Save a checkpoint; whether that succeeded, else the error is added to the others."""
        try:
            self._save(path, score)
        except CheckpointError as error:
            errors.append(error)
            return False
        return True

    def _may_be_broken_off(self) -> bool:
        return self.trainer.doing == "collecting"

    def _leave(self, signum: int) -> str:
        """Keep what was learned before the program ends; a line for the user."""
        self._rescue()
        name = signal.Signals(signum).name
        return self._continuation(f"stopped by {name}, checkpoint at step {self._saved:,}")

    def _continuation(self, what: str) -> str:
        """What happened, and the command that goes on."""
        config = self.config
        command = ["acktr", "train", "--resume", str(self.folder.path)]
        if config.network.custom is not None:
            command += ["--network", config.network.custom]
        modules = modules_of(config)
        command += ["--import", ",".join(modules)] if modules else []
        return f"{what}; continue with: {shlex.join(command)}"

    def _rescue(self) -> None:
        """Before an end, keep what was learned, unless it comes in the middle of an update.

        What collecting has changed is left out: see :meth:`acktr.train.Trainer.run`.
        """
        if self.trainer.doing == "learning" or self._saving:
            return
        try:
            self.logger.require_folder()
            self.logger.flush()
            if self._saved != self.trainer.timesteps:
                self._save(self.folder.last, None)
                self._saved = self.trainer.timesteps
        except (CheckpointError, NonFiniteError, FactorError, CriticError, RunError) as error:
            self.progress.note(f"warning: {error}")

    @property
    def good(self) -> str:
        """Which checkpoint a failure leaves, in words."""
        return f"last good checkpoint: {self.folder.last}, step {self._saved:,}"

    def _log_fault(self, error: EnvFault) -> str:
        """Write the environment's traceback to a file; the end of a message that names it."""
        trace = "".join(traceback.format_exception(error))
        head = f"{time.strftime('%F %T')}, after step {self.trainer.timesteps:,}: {error}"
        told = self.folder.write_fault(f"{head}\n{trace}")
        return f"; traceback in {self.folder.fault}" if told else ""

    def _train(self) -> None:
        self.interrupts.check()
        self.trainer.asked = self._asked
        if self._evaluations.due(self.trainer.timesteps):  # one that was interrupted
            self._evaluate_between()
        host = self._host
        begun = None if host is None else host.begun
        for stats in self.trainer.run(self.config.total_timesteps, begun):
            if self._episodes is not None:
                self._episodes.after_update()
            if host is not None:
                # Also an update that a callback fails at is written, which the checkpoint is of.
                stats, going_on = host.told(stats, self.logger.write)
                self._refused = not going_on
            self.logger.require_folder()
            self.logger.write(stats)
            self.progress.update(stats, self.logger.ep_rew_mean)
            if self._evaluations.due(stats.timesteps):
                self._evaluate_between()
            if self._checkpoints.due(stats.timesteps):
                self.checkpoint(self._training_score())
            stop = self._asked() if self.trainer.world is None else self.trainer.stop
            if stop is not None:
                self._rescue()
                raise Stopped(stop)
            if stats.timesteps >= self._stop_at or self._refused:
                break
        # The run that does not stop here has no reason to look for its best one here either.
        self.checkpoint(self._training_score() if self._complete else None, required=True)

    def _asked(self) -> int | None:
        """The signal that this process got, or one that works for it alone; None without one."""
        return self.interrupts.requested if self._meeting is None else self._meeting.asked()

    @property
    def _complete(self) -> bool:
        return self.trainer.timesteps >= self.config.total_timesteps

    def _training_score(self) -> float | None:
        """The mean return of training, which stands in for evaluations in a run without them."""
        return self.logger.ep_rew_mean if self.config.eval_freq == 0 else None

    def _evaluate_between(self) -> None:
        """Evaluate, while the other processes wait."""
        with nullcontext() if self._meeting is None else self._meeting.busy():
            self.checkpoint()  # an interrupted evaluation loses no training
            evaluation = self._evaluate()
            result = f"{score(evaluation.mean)} +- {score(evaluation.std)}"
            self.progress.note(f"evaluation at step {self.trainer.timesteps:,}: {result}")
            self.checkpoint(evaluation.mean)

    def _evaluate(self) -> Evaluation:
        """Play with the present policy in separate environments, and log it."""
        config, trainer = self.config, self.trainer
        seed, count = config.seed + EVALUATION_SEED, min(config.eval_episodes, EVALUATION_ENVS)
        place = _new_place if self._host is None else self._host.place
        with self.interrupts.at_once(), place(config, count, seed) as envs:
            evaluation = evaluate(
                trainer.policy(seed),
                envs,
                config.eval_episodes,
                seed=seed,
                deterministic=usually_deterministic(config.env),
            )
        if evaluation.cut:
            self.progress.note(f"{evaluation.cut} episodes of the evaluation were cut short")
        keys = dict.fromkeys((*config.record, *(key for info in evaluation.infos for key in info)))
        recorded = {key: evaluation.mean_of(key) for key in keys}
        self.logger.write_evaluation(
            trainer.timesteps, evaluation.returns, evaluation.lengths, recorded
        )
        self._evaluated = {trainer.timesteps: evaluation}
        self.progress.evaluated(evaluation.mean, trainer.timesteps)
        return evaluation

    def _save(self, path: Path, score: float | None) -> None:
        trainer = self.trainer
        state = trainer.state_dict()
        if self._episodes is not None:
            self._episodes.put_into(state)
        broken = broken_number(state)
        if broken is not None:
            what = "the network's weights are" if broken.startswith("network/") else f"{broken} is"
            raise NonFiniteError(f"{what} NaN or Inf at step {trainer.timesteps}")
        meta = run_meta(self.config, state, score)
        if self._host is not None:
            meta |= self._host.meta
        # What a session begins with is on the disk already: it takes that one's place.
        older = KEPT - 1 if path == self.folder.last and self._saved >= 0 else 0
        self._saving = True
        try:
            save_checkpoint(path, state, meta, older)
        except Exception:
            self._saving = False
            raise
        self._saving = False  # but not after a signal, so that what hung is not tried again

    def _summary(self, evaluation: Evaluation) -> str:
        recent = self.logger.ep_rew_mean
        training = "no training episode ended"
        if recent is not None:
            training = f"training return {score(recent)} (last 100 episodes)"
        return (
            f"done: {self.config.env}, {self.trainer.timesteps:,} steps in "
            f"{duration(self.trainer.seconds)}; evaluation return {score(evaluation.mean)} +- "
            f"{score(evaluation.std)} ({len(evaluation.returns)} episodes); {training}; "
            f"{self.folder.path}"
        )
