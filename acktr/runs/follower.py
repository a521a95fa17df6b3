"""A process of a run that writes nothing: it trains with the first one, and waits for it."""

from __future__ import annotations

import math

from acktr.interrupts import Interrupts, Stopped
from acktr.kfac import FactorError, RankError
from acktr.rollout import NonFiniteError
from acktr.runs.episodes import SharedEpisodes
from acktr.runs.meeting import Meeting
from acktr.runs.session import Every, TrainingFault
from acktr.train import Trainer


def follow(
    trainer: Trainer, interrupts: Interrupts, meeting: Meeting, stop_at: int | None = None
) -> str:
    """Train until the configuration's total, or ``stop_at``, as the first process does.

    Returns:
        A line that says so.

    Raises:
        Stopped: A signal came to one of the processes.
        TrainingFault: Training failed.
        EnvFault: One of this process's environments did.
        RankError: Another process did.
    """
    config, goal = trainer.config, math.inf if stop_at is None else stop_at
    assert trainer.world is not None
    episodes = SharedEpisodes(trainer, trainer.world, goal)
    evaluations = Every(config.eval_freq, meeting.tell(0))
    trainer.asked = lambda: interrupts.requested
    try:
        with interrupts.deferred(lambda: trainer.doing == "collecting"):
            if evaluations.due(trainer.timesteps):
                meeting.pause()
            for stats in trainer.run(config.total_timesteps):
                episodes.after_update()
                if evaluations.due(stats.timesteps):
                    meeting.pause()
                if trainer.stop is not None:
                    raise Stopped(trainer.stop)
                if stats.timesteps >= goal:
                    break
    except (NonFiniteError, FactorError) as error:
        raise TrainingFault(str(error), environment=False) from error
    except RankError as error:
        raise RankError(meeting.explained(error)) from error
    return f"process {meeting.rank} of {meeting.size} is done at step {trainer.timesteps:,}"
