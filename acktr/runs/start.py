"""Starting and resuming runs: everything is checked before the disk is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from acktr.compute import resolve_device, threads_for
from acktr.config import Config, ConfigError, to_dict
from acktr.environments import described, training_envs
from acktr.envs import drawer, lookup, worker_count
from acktr.files import flat
from acktr.interrupts import Interrupts
from acktr.policies import NetworkSource, with_network
from acktr.runs.checkpoint import (
    CheckpointError,
    checkpoint_exists,
    finish_swap,
    older_checkpoints,
    require_replaceable,
    restoring,
    save_checkpoint,
    set_aside,
)
from acktr.runs.folder import (
    KEPT,
    RunError,
    RunFolder,
    locked,
    run_path,
    stored_config,
    versions,
)
from acktr.runs.follower import assist, follow
from acktr.runs.meeting import UNKNOWN, Meeting
from acktr.runs.opening import Opening, best_score
from acktr.runs.saved import SavedAgent, read_agent, run_meta
from acktr.runs.session import Draw
from acktr.train import Trainer
from acktr.world import World

_WITHOUT_EFFECT = ("env_timeout", "env_workers", "record")
"""Settings that results do not depend on."""


def start(
    config: Config,
    run_dir: Path,
    source: str,
    interrupts: Interrupts,
    argv: Sequence[str],
    draw: Draw,
    label: str | None = None,
    network: NetworkSource | None = None,
    stop_at: int | None = None,
    meeting: Meeting | None = None,
) -> str:
    """Train a new run.

    ``source`` says where the configuration comes from, ``argv`` is the command line for
    command.txt, ``draw`` draws the learning curve at the end, ``label`` is the name of the folder
    in place of the algorithm's, ``network`` one of one's own, and ``stop_at`` a number of steps
    after which training stops early, on the schedule of the whole run. Of the processes of
    ``meeting`` the first one writes. ``interrupts`` is entered by the caller. The result is a line
    that sums the run up.

    Raises:
        ConfigError, EnvError: The run cannot be made; nothing is left on the disk.
        RunError, CheckpointError: The folder exists already or cannot be written.
        TrainingFault: Training failed; the last good checkpoint is kept.
        Stopped: A signal came.
        RankError: Another process is gone, failed or hangs.
    """
    config = with_network(config, network)
    require_within(stop_at, config)
    path = run_path(run_dir, config, label)
    leads = meeting is None or meeting.leads
    if leads:
        RunFolder(path).require_new()
    if meeting is not None and meeting.serves:
        return _assist(config, stop_at, interrupts, meeting)
    facts = described(config)
    with ExitStack() as stack:
        trainer = stack.enter_context(_trainer(config, network, meeting, stop_at))
        facts["action_masks"] = trainer.begin().source
        if meeting is not None and not leads:
            return follow(trainer, interrupts, meeting, stop_at)
        stack.enter_context(interrupts.deferred())  # now the run can be left in an orderly way
        opening = Opening(trainer, interrupts, source, facts, argv, stop_at, meeting=meeting)
        return opening.run(opening.new(path, stack), draw)


def resume(
    path: Path,
    total: int | None,
    interrupts: Interrupts,
    argv: Sequence[str],
    draw: Draw,
    network: NetworkSource | None = None,
    stop_at: int | None = None,
    meeting: Meeting | None = None,
) -> str:
    """Go on with the run in a folder; what :func:`start` has too is as there.

    ``total`` is the new total of environment steps; the run's own if None.

    Raises:
        RunError: There is no run that can be resumed, or another process trains it.
        CheckpointError: Its last checkpoint is damaged, fits another environment, or could not be
            replaced by a newer one.
        EnvError, ConfigError: Its environment or device is not there.
        TrainingFault: Training failed; the last good checkpoint is kept.
        Stopped: A signal came.
        RankError: Another process is gone, failed or hangs.
    """
    stored = stored_config(path)
    folder = RunFolder(path)
    if meeting is not None and not meeting.leads:
        return _join(folder, stored, total, interrupts, network, stop_at, meeting)
    with ExitStack() as stack:
        stack.enter_context(locked(folder))  # before anything is read that training changes
        folder.sweep()
        # Before the session's first save, which replaces the newest and keeps none aside.
        finish_swap(folder.last, KEPT - 1)
        agent, damaged = _last_agent(folder, stored)
        _require_told(agent)
        finish_swap(folder.best)
        _finish_best(folder, agent)
        config, done = _longer(stored, total), agent.timesteps
        require_within(stop_at, config)
        _require_ahead(total, stored, done, path)
        if (nothing := _nothing_left(folder, config, done, stop_at, draw)) is not None:
            return nothing
        facts = described(config)
        require_replaceable(folder.best)
        trainer = stack.enter_context(_trainer(config, network, meeting, stop_at))
        with restoring(agent.path):
            trainer.load_state_dict(agent.state)
        _agree_about(agent, meeting)
        facts["action_masks"] = trainer.begin().source
        best = best_score(folder)
        stack.enter_context(interrupts.deferred())
        source = f"resuming {path} at step {done:,}"
        opening = Opening(trainer, interrupts, source, facts, argv, stop_at, meeting=meeting)
        session = opening.again(folder, stack, best)
        for unsound, error in damaged.items():
            session.progress.note(
                f"warning: {error}; going on from {agent.path.name}, step {done:,}"
            )
            set_aside(unsound)
        opening.save(session)
        return opening.run(session, draw)


def _nothing_left(
    folder: RunFolder, config: Config, done: int, stop_at: int | None, draw: Draw
) -> str | None:
    """A line for a run that is complete, or as far as it is to go; None for others."""
    if done >= config.total_timesteps and folder.last_evaluation() >= done:
        if not folder.curve.exists():  # it was killed before, or there was nothing to draw
            draw(folder, config)
        return (
            f"{folder.path} is complete: {done:,} of {config.total_timesteps:,} steps;"
            " a larger --total-timesteps continues it"
        )
    if stop_at is not None and stop_at <= done < config.total_timesteps:
        return f"{folder.path} is at step {done:,}: a --stop-at above it, or none, continues it"
    return None


def _join(
    folder: RunFolder,
    stored: Config,
    total: int | None,
    interrupts: Interrupts,
    network: NetworkSource | None,
    stop_at: int | None,
    meeting: Meeting,
) -> str:
    """Go on with a run as another of its processes than the first, which reads alone."""
    config = _longer(stored, total)
    agent, _ = _last_agent(folder, stored)
    done, goal = agent.timesteps, stop_at or config.total_timesteps
    if done >= goal and (done < config.total_timesteps or folder.last_evaluation() >= done):
        return f"{folder.path}: nothing to do"  # as the first one says
    if meeting.serves:
        return _assist(config, stop_at, interrupts, meeting)
    with _trainer(config, network, meeting, stop_at) as trainer:
        agent, _ = _last_agent(folder, stored)  # now that the first one has looked at the folder
        with restoring(agent.path):
            trainer.load_state_dict(agent.state)
        _agree_about(agent, meeting)
        trainer.begin()
        return follow(trainer, interrupts, meeting, stop_at)


def _agree_about(agent: SavedAgent, meeting: Meeting | None) -> None:
    """Refuse a folder that another process sees otherwise.

    Raises:
        RunError: It has another checkpoint.
    """
    if meeting is not None and (first := meeting.tell(agent.timesteps)) != agent.timesteps:
        raise RunError(
            f"{agent.path}: process {meeting.rank} sees the checkpoint of step"
            f" {agent.timesteps:,} and process 0 that of step {first:,}: the folder must be the"
            " same for all"
        )


def check(config: Config, network: NetworkSource | None = None, stop_at: int | None = None) -> None:
    """Build what the run needs, on the CPU, and drop it again; nothing is written.

    Raises:
        ConfigError, EnvError: The run cannot be made.
    """
    require_within(stop_at, config)
    resolve_device(config.device)
    worker_count(config.env_workers, lookup(config.env), config.num_envs)
    with _trainer(dataclasses.replace(config, device="cpu", env_workers=1), network):
        pass


def _longer(stored: Config, total: int | None) -> Config:
    """A run's configuration with another total, or with its own."""
    return dataclasses.replace(stored, total_timesteps=total or stored.total_timesteps)


def _require_ahead(total: int | None, stored: Config, done: int, path: Path) -> None:
    """Refuse a new total behind what a run has done, which would count as a run of that length.

    Its own total may lie behind it, as updates are whole.

    Raises:
        ConfigError: One line.
    """
    if total not in (None, stored.total_timesteps) and total < done:
        raise ConfigError(
            f"total_timesteps must be at least the {done:,} steps that {path} has done, got"
            f" {total:,}"
        )


def require_within(stop_at: int | None, config: Config) -> None:
    """Refuse to stop where the run has not begun, or is behind its end.

    Raises:
        ConfigError: One line.
    """
    if stop_at is not None and not 1 <= stop_at <= config.total_timesteps:
        raise ConfigError(
            f"stop_at must be in [1, total_timesteps], here {config.total_timesteps:,}, got"
            f" {stop_at:,}"
        )


@contextmanager
def _trainer(
    config: Config,
    network: NetworkSource | None = None,
    meeting: Meeting | None = None,
    stop_at: int | None = None,
) -> Iterator[Trainer]:
    """A trainer with its environments, which are closed at the end, and torch's threads."""
    channels = config.network.channels
    part = None if meeting is None else meeting.part(config.num_envs)
    with ExitStack() as stack:
        envs = stack.enter_context(closing(training_envs(config, part)))
        world: World | None = None
        if meeting is not None:
            world = stack.enter_context(_joined(config, meeting, stop_at))
        stack.enter_context(threads_for(envs.single_observation_space, channels))
        try:
            trainer = Trainer(config, envs, network, world=world)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        yield trainer


def _joined(config: Config, meeting: Meeting, stop_at: int | None) -> AbstractContextManager[World]:
    alike = _alike(config) | {"--stop-at": stop_at, "--curvature-ranks": meeting.curvature}
    return meeting.joined(resolve_device(config.device), alike)


def _assist(config: Config, stop_at: int | None, interrupts: Interrupts, meeting: Meeting) -> str:
    """Decompose for the processes that train."""
    device = resolve_device(config.device)
    return assist(_joined(config, meeting, stop_at), device, interrupts, meeting)


def _alike(config: Config) -> dict[str, object]:
    """What must be the same in all processes of a run, by its name."""
    settings = flat(to_dict(config))
    without = (*_WITHOUT_EFFECT, "device")
    facts: dict[str, object] = {n: value for n, value in settings.items() if n not in without}
    packages = versions()
    for name in ("platform", "cpu_count"):
        packages.pop(name)
    facts |= packages
    # An installed package and a checkout of the same version may be of the same commit.
    facts["git_commit"] = packages["git_commit"] or UNKNOWN
    facts["kind of CPU"] = torch.backends.cpu.get_cpu_capability()
    facts["what draws pictures"] = drawer(config.env)
    facts["GPU"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return facts


def _last_agent(
    folder: RunFolder, stored: Config
) -> tuple[SavedAgent, dict[Path, CheckpointError]]:
    """The newest agent that is sound, and what is wrong with the newer ones.

    Raises:
        RunError: There is no checkpoint, or it was trained with other settings.
        CheckpointError: None is sound.
    """
    paths = [folder.last, *older_checkpoints(folder.last, KEPT - 1)]
    if not any(map(checkpoint_exists, paths)):
        what = "run the command again that started it" if folder.unborn else "delete it"
        raise RunError(f"{folder.path}: no checkpoint to resume from; {what} and start again")
    agent, damaged = _first_sound(paths)
    same = dataclasses.replace(agent.config, total_timesteps=stored.total_timesteps)
    if differing := difference(stored, same):
        name, ours, theirs = differing
        raise RunError(
            f"{folder.config}: {name} is {ours!r} but the checkpoint was trained with "
            f"{theirs!r}; only total_timesteps may be changed"
        )
    return agent, damaged


def _require_told(agent: SavedAgent) -> None:
    """Refuse an agent of a Python program that no file tells enough about to go on with.

    Raises:
        CheckpointError: Its environments, those of its evaluations or its learning rate are that
            program's own.
    """
    agent.require_env()
    if agent.lacks_learning_rate:
        kind = agent.config.algo.upper()
        raise CheckpointError(
            f"{agent.path}: trained with a learning_rate function, which no file can hold; go on in"
            f" Python: {kind}.load(path, learning_rate=...).learn(..., run_dir=...)"
        )
    if agent.lacks_eval_env:
        kind = agent.config.algo.upper()
        raise CheckpointError(
            f"{agent.path}: evaluated in an eval_env of its own, which no file can hold; go on in"
            f" Python: {kind}.load(path).learn(..., run_dir=..., eval_env=...)"
        )


def _first_sound(paths: Sequence[Path]) -> tuple[SavedAgent, dict[Path, CheckpointError]]:
    """The first agent that can be read, and why those before it cannot; CheckpointError if none."""
    damaged: dict[Path, CheckpointError] = {}
    for path in paths:
        try:
            return read_agent(path), damaged
        except CheckpointError as error:
            damaged[path] = error
    raise damaged[paths[0]]


def difference(one: Config, other: Config) -> tuple[str, Any, Any] | None:
    """The first setting in which two configurations differ, and its values; None if equal.

    What results do not depend on is no difference.
    """
    ours, theirs = flat(to_dict(one)), flat(to_dict(other))
    for name in ours | theirs:  # an argument of the environment may be in one of them only
        our, their = ours.get(name), theirs.get(name)
        if name not in _WITHOUT_EFFECT and our != their:
            return name, our, their
    return None


def _finish_best(folder: RunFolder, agent: SavedAgent) -> None:
    """Save the best checkpoint if the run was killed after its evaluation was logged."""
    score = folder.evaluated(agent.timesteps) if agent.config.eval_freq > 0 else None
    best = best_score(folder)
    if score is None or (best is not None and score <= best):
        return
    require_replaceable(folder.best)
    save_checkpoint(folder.best, agent.state, run_meta(agent.config, agent.state, score))
