"""One training session of a run: logs, checkpoints, evaluations and an orderly end."""

from __future__ import annotations

import math
import shlex
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from acktr.config import Config, to_dict
from acktr.envs import make_vec
from acktr.evaluate import Evaluation, evaluate
from acktr.interrupts import Interrupts, Stopped
from acktr.report.plot import plot_runs
from acktr.rollout import NonFiniteError
from acktr.runs.checkpoint import CheckpointError, save_checkpoint
from acktr.runs.folder import RunFolder
from acktr.runs.logger import RunLogger
from acktr.runs.progress import Progress
from acktr.runs.saved import usually_deterministic
from acktr.train import Trainer, TrainStats

EVALUATION_SEED = 10_000
"""Added to the run's seed for evaluations during training."""

EVALUATION_ENVS = 8
"""Most parallel environments of such an evaluation."""


@dataclass
class Marks:
    """Steps at which something was last done."""

    checkpoint: int
    evaluation: int
    good: int
    """Steps of the last checkpoint that was written."""


class Session:
    """Trains until the configuration's total, from wherever the trainer is.

    Args:
        folder: The run.
        trainer: What learns; its configuration holds the total and the intervals.
        logger: Where statistics go.
        progress: What the user sees.
        interrupts: Entered by the caller.
        best: Score of the best checkpoint so far.
    """

    def __init__(
        self,
        folder: RunFolder,
        trainer: Trainer,
        logger: RunLogger,
        progress: Progress,
        interrupts: Interrupts,
        best: float | None = None,
    ) -> None:
        self.folder = folder
        self.trainer = trainer
        self.config: Config = trainer.config
        self.logger = logger
        self.progress = progress
        self.interrupts = interrupts
        self.best = -math.inf if best is None else best
        now = trainer.timesteps
        self._marks = Marks(now, folder.last_evaluation(), now)
        self._evaluation: tuple[int, Evaluation] | None = None

    def run(self) -> str:
        """Train, evaluate and draw the learning curve.

        Returns:
            A line that sums the run up.

        Raises:
            Stopped: A signal came; its note says where the run can be resumed.
            EnvFault, NonFiniteError, FactorError: From training, with ``last`` as it was.
            CheckpointError: The last checkpoint cannot be written.
        """
        try:
            with self.interrupts.deferred():
                self._train()
                with self.interrupts.at_once():
                    evaluation = self._final_evaluation()
                if self.config.eval_freq > 0:  # now that it is logged, a signal waits
                    self._improve(evaluation.mean)
                self._draw()
        except Stopped as stop:
            stop.note = self._farewell(stop.signum)
            raise
        return self._summary(evaluation)

    def save(self) -> None:
        """Write checkpoints/last.

        Raises:
            CheckpointError: It cannot be written; the older one is intact then.
            NonFiniteError: The network is broken; the older one is intact too.
        """
        self._save(self.folder.last, None)
        self._marks.good = self.trainer.timesteps

    @property
    def resume_command(self) -> str:
        """What the user types to go on."""
        return shlex.join(["acktr", "train", "--resume", str(self.folder.path)])

    @property
    def last_good(self) -> str:
        """Where the last good checkpoint is, for error messages."""
        return f"last good checkpoint: {self.folder.last}, step {self._marks.good:,}"

    def _train(self) -> None:
        self.interrupts.check()
        self._maybe_evaluate(self.trainer.timesteps)  # one that was interrupted
        for stats in self.trainer.run(self.config.total_timesteps):
            self.logger.write(stats)
            self.progress.update(stats, self.logger.ep_rew_mean)
            self._maybe_evaluate(stats.timesteps)
            self._maybe_checkpoint(stats)
            if self.interrupts.requested is not None and self._marks.good != stats.timesteps:
                self.save()
            self.interrupts.check()
        if self._marks.good != self.trainer.timesteps:
            self.save()
        self._improve(self._training_score())

    def _maybe_evaluate(self, timesteps: int) -> None:
        every = self.config.eval_freq
        if every == 0 or timesteps // every == self._marks.evaluation // every:
            return
        self._marks.evaluation = timesteps
        self._try_keep(None)  # an interrupted evaluation loses no training
        with self.interrupts.at_once():
            evaluation = self._evaluate()
        result = f"{evaluation.mean:,.1f} +- {evaluation.std:,.1f}"
        self.progress.note(f"evaluation at step {timesteps:,}: {result}")
        self._try_improve(evaluation.mean)

    def _maybe_checkpoint(self, stats: TrainStats) -> None:
        every = self.config.checkpoint_freq
        if stats.timesteps // every == self._marks.checkpoint // every:
            return
        self._marks.checkpoint = stats.timesteps
        self._try_keep(self._training_score())

    def _training_score(self) -> float | None:
        """What stands in for evaluations in a run without them."""
        return self.logger.ep_rew_mean if self.config.eval_freq == 0 else None

    def _evaluate(self) -> Evaluation:
        """Play with the present policy in separate environments, and log it."""
        config, trainer = self.config, self.trainer
        seed, count = config.seed + EVALUATION_SEED, min(config.eval_episodes, EVALUATION_ENVS)
        envs = make_vec(config.env, count, seed, training=False, atari=config.atari)
        try:
            policy = trainer.policy(seed)
            likeliest = usually_deterministic(config.env)
            found = evaluate(policy, envs, config.eval_episodes, seed=seed, deterministic=likeliest)
        finally:
            envs.close()
        if found.cut:
            self.progress.note(f"{found.cut} episodes of the evaluation were cut short")
        self.logger.write_evaluation(trainer.timesteps, found.returns, found.lengths)
        self._evaluation = (trainer.timesteps, found)
        return found

    def _final_evaluation(self) -> Evaluation:
        if self._evaluation is not None and self._evaluation[0] == self.trainer.timesteps:
            return self._evaluation[1]
        return self._evaluate()

    def _keep(self, score: float | None) -> None:
        self.save()
        self._improve(score)

    def _improve(self, score: float | None) -> None:
        if score is not None and score > self.best:
            self._save(self.folder.best, score)
            self.best = score

    def _try_keep(self, score: float | None) -> None:
        self._tolerate(lambda: self._keep(score))

    def _try_improve(self, score: float) -> None:
        self._tolerate(lambda: self._improve(score))

    def _tolerate(self, action: Callable[[], None]) -> None:
        """A full disk must not end training; the next checkpoint may succeed."""
        try:
            action()
        except CheckpointError as error:
            self.progress.note(f"warning: {error}; training goes on")

    def _save(self, path: Path, score: float | None) -> None:
        trainer = self.trainer
        if not all(bool(torch.isfinite(p).all()) for p in trainer.network.parameters()):
            raise NonFiniteError(
                f"the network's weights are NaN or Inf at step {trainer.timesteps}"
            )
        meta = {
            "format": "acktr-run",
            "config": to_dict(self.config),
            "timesteps": trainer.timesteps,
            "seconds": trainer.seconds,
            "score": score,
        }
        save_checkpoint(path, trainer.state_dict(), meta)

    def _draw(self) -> None:
        """Draw the learning curve if there is one to draw."""
        if self.logger.ep_rew_mean is None:
            self.progress.note("no learning curve: no training episode has ended")
            return
        try:
            plot_runs([self.folder.path], self.folder.curve, published=(self.config.algo,))
        except (ValueError, OSError) as error:
            self.progress.note(f"no learning curve: {error}")

    def _farewell(self, signum: int) -> str:
        name = signal.Signals(signum).name
        return (
            f"stopped by {name}, checkpoint at step {self._marks.good:,}; "
            f"continue with: {self.resume_command}"
        )

    def _summary(self, evaluation: Evaluation) -> str:
        minutes, seconds = divmod(round(self.trainer.seconds), 60)
        wall = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
        recent = self.logger.ep_rew_mean
        parts = [
            f"done: {self.config.env}, {self.trainer.timesteps:,} steps in {wall}",
            f"evaluation return {evaluation.mean:,.1f} +- {evaluation.std:,.1f}"
            f" ({len(evaluation.returns)} episodes)",
            "no training episode ended"
            if recent is None
            else f"training return {recent:,.1f} (last 100 episodes)",
            str(self.folder.path),
        ]
        return "; ".join(parts)
