"""A process of a run that writes nothing: it trains with the first one, or decomposes for it."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch

from acktr.interrupts import Interrupts, Stopped
from acktr.kfac import FactorError, RankError, serve
from acktr.rollout import NonFiniteError
from acktr.runs.episodes import SharedEpisodes
from acktr.runs.meeting import Meeting
from acktr.runs.session import Every, TrainingFault
from acktr.train import Trainer
from acktr.world import World


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


def assist(
    joined: AbstractContextManager[World],
    device: torch.device,
    interrupts: Interrupts,
    meeting: Meeting,
) -> str:
    """Decompose for the processes that train, until they end.

    Args:
        joined: What exchanges messages while entered.
        device: That of the network.
        interrupts: Entered by the caller.
        meeting: The processes.

    Returns:
        A line that says so.

    Raises:
        Stopped: A signal came to one of the processes.
        RankError: The first process is gone or hangs.
    """
    try:
        with joined as world, interrupts.deferred():
            signum = serve(world.ranks, meeting.attend, world.device(device))
    except RankError as error:
        raise RankError(meeting.explained(error)) from error
    if signum:
        raise Stopped(signum)
    return f"process {meeting.rank} of {meeting.size} has decomposed for the others"
