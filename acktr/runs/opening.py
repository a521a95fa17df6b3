"""Opening a run's folder for a session, the same for the command line and for Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from acktr.config import Config, to_dict
from acktr.envs import found_masks, group_count, workers
from acktr.files import read_object
from acktr.interrupts import Interrupts
from acktr.kfac import RankError
from acktr.policies import require_saveable
from acktr.runs.checkpoint import CheckpointError, checkpoint_exists
from acktr.runs.folder import FORMER_TOTAL, INSTEAD, RunFolder, new_folder, versions
from acktr.runs.logger import RunLogger
from acktr.runs.meeting import Meeting
from acktr.runs.progress import Progress, Quiet
from acktr.runs.saved import read_agent
from acktr.runs.session import Draw, Host, Session
from acktr.train import Trainer

_PROGRAMS = ("python", "acktr", "torch", "gymnasium", "ale-py", "mujoco", "numpy", "git_commit")
"""Versions on which numbers may depend."""


@dataclass(frozen=True)
class Opening:
    """What a session begins with."""

    trainer: Trainer
    """What trains; its environments have begun."""
    interrupts: Interrupts
    """Entered by the caller."""
    source: str
    """Where the configuration comes from, or what is gone on with: the first line."""
    facts: Mapping[str, Any]
    """What protocol.json says about the environment."""
    argv: Sequence[str]
    """The command line, for command.txt."""
    stop_at: int | None = None
    """Steps at which the session ends early."""
    host: Host | None = None
    """The program that trains, if that is not the command line."""
    shown: bool = True
    """Whether progress is shown; warnings are Python's otherwise."""
    events: bool = True
    """Whether there are events for TensorBoard."""
    meeting: Meeting | None = None
    """The processes that train along, if there are some."""

    @property
    def config(self) -> Config:
        """Settings of the run."""
        return self.trainer.config if self.host is None else self.host.config

    def new(self, path: Path, held: ExitStack) -> Session:
        """The session of a new run; its folder vanishes again if that fails.

        Args:
            path: The folder.
            held: Where what must be closed at the end is entered.

        Raises:
            RunError, CheckpointError: The folder is not new or cannot be written.
            ConfigError: The network has a state that no checkpoint holds.
        """
        require_saveable(self.trainer.network)
        instead = INSTEAD
        if self.host is not None:  # a program has no options
            kind = self.config.algo.upper()
            instead = (
                f"{kind}.load({str(path)!r}) gives the agent of a run; a new one needs another"
                " run_dir=, label= or seed="
            )
        with new_folder(path, held, instead) as folder:
            folder.write_config(to_dict(self.config))
            with self.trainer.threads():
                folder.write_json(folder.versions, versions())
            folder.write_command(self.argv)
            how = {"preset": self.source, **compute(self.trainer), "environment": self.facts}
            folder.write_json(folder.protocol, how)
            session = self._session(folder, held, None, None)
            session.logger.describe(to_dict(self.config))
            session.checkpoint(required=True)
        return session

    def again(self, folder: RunFolder, held: ExitStack, best: float | None) -> Session:
        """The session of a run that the trainer goes on with.

        Args:
            folder: Its folder, which is locked.
            held: As in :meth:`new`.
            best: Score of the best checkpoint so far.

        Raises:
            RunError: The logs cannot be continued.
        """
        done = self.trainer.timesteps
        session = self._session(folder, held, done, best)
        if missing := session.logger.missing_updates(self.trainer.updates):
            session.progress.note(
                f"warning: {folder.progress.name} lacks the last {missing:,} updates before step"
                f" {done:,}: it was not written to the end, and the logs have a gap there"
            )
        self._tell_changes(session, done)
        return session

    def _tell_changes(self, session: Session, done: int) -> None:
        """Say, and keep in versions.json, what the run goes on with that it had not before."""
        folder = session.folder
        if not folder.versions.is_file():
            return
        known = read_object(folder.versions)
        sessions = known.get("sessions")
        sessions = sessions if isinstance(sessions, list) else []
        before = known
        for each in sessions:
            before = before | each if isinstance(each, dict) else before
        now = {name: value for name, value in versions().items() if name in _PROGRAMS}
        changed: dict[str, Any] = {
            name: value for name, value in now.items() if before.get(name) != value
        }
        if changed:
            said = ", ".join(f"{name} {before.get(name)} before" for name in changed)
            session.progress.note(f"warning: other versions from step {done:,} on: {said}")
        former, total = folder.read_config().get("total_timesteps"), self.config.total_timesteps
        if former != total:  # config.json has the new one from here on, and nothing says what was
            changed |= {"total_timesteps": total, FORMER_TOTAL: former}
        entry = {"step": done, **changed}
        if changed and entry not in sessions[-1:]:  # or the last one ended before config.json
            folder.write_json(folder.versions, {**known, "sessions": [*sessions, entry]})

    def save(self, session: Session) -> None:
        """Write what a session goes on from: what cannot be written is found out now.

        Raises:
            RunError, CheckpointError: It cannot be written.
        """
        session.checkpoint(required=True)
        session.folder.write_config(to_dict(self.config))
        session.folder.write_command(self.argv)

    def run(self, session: Session, draw: Draw) -> str:
        """Train, after the lines that say how; returns a line that sums it up.

        Raises:
            TrainingFault, CheckpointError, Stopped: As :meth:`acktr.runs.session.Session.run`.
            RankError: Another process is gone, failed or hangs.
        """
        named = ", ".join(f"{name} {value}" for name, value in compute(self.trainer).items())
        protocol = ", ".join(f"{name}={value}" for name, value in self.facts.items())
        masks = found_masks(self.trainer.envs)
        first = self.source if masks.said is None else f"{self.source}; {masks.said}"
        for line in (first, named.replace("_", " "), f"protocol: {protocol}"):
            session.progress.note(line)
        for warning in (masks.unused, self.trainer.restarted):
            if warning is not None:
                session.progress.note(f"warning: {warning}")
        if self.meeting is None:
            return session.run(draw)
        try:
            self.meeting.tell(session.folder.last_evaluation())
            return session.run(draw)
        except RankError as error:
            raise RankError(f"{self.meeting.explained(error)}; {session.good}") from error

    def _session(
        self, folder: RunFolder, held: ExitStack, done: int | None, best: float | None
    ) -> Session:
        goal = self.stop_at or self.config.total_timesteps
        logger = held.enter_context(RunLogger(folder, self.config.env, done, self.events))
        kind = Progress if self.shown else Quiet
        progress = held.enter_context(kind(goal, start_timesteps=done or 0))
        return Session(
            folder,
            self.trainer,
            logger,
            progress,
            self.interrupts,
            best,
            self.stop_at,
            self.host,
            self.meeting,
        )


def best_score(folder: RunFolder) -> float | None:
    """Score of the best checkpoint; a damaged one counts as none and will be replaced."""
    try:
        return read_agent(folder.best).score if checkpoint_exists(folder.best) else None
    except CheckpointError:
        return None


def compute(trainer: Trainer) -> dict[str, object]:
    """How a trainer computes, by name."""
    with trainer.threads():
        threads = torch.get_num_threads()
    world = trainer.world
    return {
        **({} if world is None else {"processes": world.ranks.size}),
        **({"curvature_ranks": 1} if trainer.helped else {}),
        "device": str(trainer.device),
        "precision": trainer.precision,
        "torch_threads": threads,
        "env_workers": workers(trainer.envs),
        "env_groups": group_count(trainer.envs),
    }
