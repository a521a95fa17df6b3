"""Measures one case: our training, its parts and its two limits, or what other files measure.

``python -m scripts.bench.measure FOLDER`` does the task of a folder; a case has a process of its
own, so that neither memory nor threads nor caches of one are those of another.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from acktr import tree
from acktr.compute import one_thread, threads_for
from acktr.config import Config, from_dict
from acktr.environments import training_envs
from acktr.envs import group_count
from acktr.files import read_object, write_atomic
from acktr.rollout import make_batch
from acktr.train import Trainer
from scripts.bench.cases import Case, Timing

TASK, RESULT, OUTPUT = "task.json", "result.json", "output.txt"
"""Files of a task: what to measure, what was found, and what the process said."""

_ENDLESS = 10**12
"""Steps of a training that is stopped before; step sizes stay those of the beginning."""
_POOL = 256
"""Random actions that are drawn beforehand and used in turn."""
_ROLLOUT = ("env", "forward", "update")
"""Parts of training by their tags time/..., of which forward is acting."""
_RENAMED = {"factors": "statistics", "apply": "precondition"}
_INSIDE_STEP = ("refresh", "apply")
_PROCESSES = Path("/proc")


def write_task(folder: Path, case: Case, timing: Timing) -> None:
    """Leave a task in a folder."""
    values = {"case": asdict(case), "timing": asdict(timing)}
    (folder / TASK).write_text(json.dumps(values))


def work(folder: Path) -> None:
    """Do the task of a folder and leave the result there, JSON values."""
    task = read_object(folder / TASK)
    case, timing = Case(**task["case"]), Timing(**task["timing"])
    torch.set_num_threads(timing.threads)
    found = measure(case, timing)
    found.setdefault("peak_mib", peak_mib())  # with processes, where there were some
    write_atomic(folder / RESULT, json.dumps(found).encode())


def measure(case: Case, timing: Timing) -> dict[str, Any]:
    """The measurement of a case; what only some cases need is imported for them alone."""
    if case.kind == "kfac":
        from scripts.bench.kfac import measure_kfac

        return measure_kfac(case, timing)
    if case.kind == "drawing":
        from scripts.bench.drawing import measure_drawing

        return measure_drawing(case, timing)
    if case.kind in ("atari peer", "mujoco peer"):
        from scripts.bench.peers import measure_peer

        return measure_peer(case, timing)
    if case.ranks:
        from scripts.bench.ranks import measure_ranks

        return measure_ranks(case, timing)
    of_ours = {"environment": measure_environment, "compute": measure_compute}
    return of_ours.get(case.kind, measure_training)(from_dict(case.settings), timing)


class Windows:
    """Takes the ends of updates and keeps the speed of each window.

    Args:
        timing: Lengths.
        clock: Seconds.
        count: Counts something by name, such as messages.
        processor: Seconds that processors have worked for this so far; None if nobody knows.
    """

    def __init__(
        self,
        timing: Timing,
        clock: Callable[[], float] = time.perf_counter,
        count: Callable[[], dict[str, float]] = dict,
        processor: Callable[[], float | None] | None = None,
    ) -> None:
        self.rates: list[float] = []
        """Environment steps per second of each finished window."""
        self.updates = 0
        """Updates since the warm-up."""
        self.seconds = 0.0
        """Seconds of all finished windows together."""
        self.steps = 0
        """Environment steps of all finished windows together."""
        self.processor: float | None = 0.0
        """Seconds of all processors in the finished windows; None if not known."""
        self.warm = False
        """Whether the warm-up is over."""
        self.counted: dict[str, float] = {}
        """What was counted in all finished windows together."""
        self._timing, self._clock, self._count = timing, clock, count
        self._worked = processor or processor_seconds
        self._first = count()
        self._before: float | None = None
        self._started, self._steps, self._cold_updates = clock(), 0, 0

    @property
    def done(self) -> bool:
        """Whether there are as many windows as wanted."""
        return len(self.rates) >= self._timing.windows

    def end_update(self, timesteps: int) -> None:
        """Record the end of an update.

        Args:
            timesteps: Environment steps so far, those of the warm-up included.
        """
        now = self._clock()
        elapsed = now - self._started
        if self.warm:
            self.updates += 1
            if elapsed < self._timing.seconds:
                return
            self.rates.append((timesteps - self._steps) / elapsed)
            self.seconds += elapsed
            self.steps += timesteps - self._steps
            worked = self._worked()
            if worked is None or self._before is None:
                self.processor = None
            else:
                self.processor = worked - self._before
            self.counted = {name: n - self._first[name] for name, n in self._count().items()}
        else:
            self._cold_updates += 1
            enough = self._cold_updates >= self._timing.warm_up_updates
            if elapsed < self._timing.warm_up or not enough:
                return
            # The first updates refresh at every step, and would be most of a short measurement.
            self.warm, self._first, self._before = True, self._count(), self._worked()
        self._started, self._steps = now, timesteps

    def result(self) -> dict[str, Any]:
        """The measurement as JSON values."""
        return {
            "rates": self.rates,
            "updates": self.updates,
            "seconds": self.seconds,
            "steps": self.steps,
            "processor": self.processor,
        }


def measure_training(config: Config, timing: Timing) -> dict[str, Any]:
    """Train and time it.

    Returns:
        JSON values of :class:`Windows`, and the ``shares`` of its parts over the same windows.

    Raises:
        EnvError: The environment cannot be made.
    """
    envs = training_envs(config)
    try:
        return timed(Trainer(config, envs), timing)
    finally:
        envs.close()


def timed(
    trainer: Trainer, timing: Timing, count: Callable[[], dict[str, float]] | None = None
) -> dict[str, Any]:
    """The measurement of :func:`measure_training`; several processes end in the same update.

    Args:
        trainer: It trains.
        timing: How long.
        count: Counts messages by name, which are told for an update of the windows.
    """
    windows = Windows(timing, count=count or dict)
    rollout, before = dict.fromkeys(_ROLLOUT, 0.0), trainer.learner.seconds
    trainer.asked = lambda: int(signal.SIGTERM) if windows.done else None
    peak: float | None = None
    for stats in trainer.run(_ENDLESS):
        if not windows.done:
            counts = windows.warm
            windows.end_update(stats.timesteps)
            if counts:
                for part in _ROLLOUT:
                    rollout[part] += stats.metrics.get(f"time/{part}", 0.0)
            else:
                before = trainer.learner.seconds
        if trainer.stop or (windows.done and trainer.world is None):
            peak = peak_mib()  # with the process of a critic, which ends with the loop
            break
    spent = {name: s for name, s in trainer.learner.seconds.items() if s}  # parts in use
    inside = {name: s - before.get(name, 0.0) for name, s in spent.items()}
    parts = shares(windows.seconds, rollout, inside)
    found = windows.result() | {"shares": parts, "peak_mib": peak}
    if count is not None:
        found["messages"] = {name: n / windows.updates for name, n in windows.counted.items()}
    return found


def shares(
    elapsed: float, rollout: Mapping[str, float], inside: Mapping[str, float]
) -> dict[str, float]:
    """Disjoint parts of the time, which sum to 1.

    Args:
        elapsed: Seconds of the whole.
        rollout: Seconds in the environments (env), of acting (forward) and of the update.
        inside: Seconds by part of the update, as learners keep them: ``step`` holds ``refresh`` and
            ``apply``.

    Returns:
        By part: ``batch`` is what remains of the whole, ``step`` what remains of the step, and
        ``rest`` what remains of the update.
    """
    parts = dict(inside)
    known = sum(parts.values()) - sum(parts.get(name, 0.0) for name in _INSIDE_STEP)
    if "step" in parts:
        parts["step"] -= sum(parts.get(name, 0.0) for name in _INSIDE_STEP)
    seconds = {"env": rollout["env"], "act": rollout["forward"]}
    seconds["batch"] = elapsed - sum(rollout[part] for part in _ROLLOUT)
    seconds |= {_RENAMED.get(name, name): value for name, value in parts.items()}
    seconds["rest"] = rollout["update"] - known
    return {name: value / elapsed for name, value in seconds.items()}


def measure_environment(config: Config, timing: Timing) -> dict[str, Any]:
    """Step the environments of a training with random actions, and do nothing else."""
    envs = training_envs(config)
    try:
        envs.reset(seed=config.seed)
        envs.action_space.seed(config.seed)
        pool = [envs.action_space.sample() for _ in range(_POOL)]
        windows = Windows(timing)
        steps = 0
        while not windows.done:
            for _ in range(config.num_steps):
                envs.step(pool[steps % _POOL])
                steps += 1
            windows.end_update(steps * config.num_envs)
        return windows.result()
    finally:
        envs.close()


def measure_compute(config: Config, timing: Timing) -> dict[str, Any]:
    """Act on fixed observations and learn from a fixed batch, without any environment.

    The parameters are put back after every update, which is not timed, so that all updates are
    alike but for what K-FAC does at intervals. Acting takes a group of environments at a time.
    """
    envs = training_envs(config)
    try:
        trainer = Trainer(config, envs)
        trainer.collector.reset(config.seed)
        rollout = trainer.collector.collect(config.num_steps)
        parts = group_count(envs)
    finally:
        envs.close()
    batch = make_batch(rollout, config.gamma, config.gae_lambda, trainer.device)
    few: Any = tree.rows(batch.observations, slice(config.num_envs // parts))
    shown = tree.tree_map(torch.clone, few)
    acting = trainer.collector.acting

    @torch.no_grad()
    def act() -> None:
        """The forward passes of a rollout: to act, and one for the values that those leave out."""
        with one_thread():
            for _ in range(config.num_steps * parts):
                acting(shown)
        acting.values(shown if acting.gives_values else batch.observations)

    named = dict(trainer.network.named_parameters())
    start = {name: parameter.detach().clone() for name, parameter in named.items()}
    spent, updates = 0.0, 0
    windows = Windows(timing, lambda: spent)
    while not windows.done:
        started = time.perf_counter()
        with threads_for(envs.single_observation_space, config.network.channels):  # as in training
            act()
            trainer.learner.update(batch, 0.0)
        spent += time.perf_counter() - started
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(start[name])
        updates += 1
        windows.end_update(updates * rollout.env_steps)
    return windows.result()


def peak_mib() -> float | None:
    """Largest resident memory so far of this process and of those it has started, in MiB.

    Pages that they share are counted once for each of them. What the kernel keeps for a process is
    read, because ``getrusage`` starts at the peak of the process that has started this one.

    Returns:
        None where the system does not tell.
    """
    peaks = [_value(process, "VmHWM") for process in _family()]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) / 1024 if len(known) == len(peaks) else None


def processor_seconds() -> float | None:
    """Seconds that processors have worked so far for this process and those it has started.

    Returns:
        None where the system does not tell, or a process has ended meanwhile.
    """
    ticks = 0
    try:
        for process in _family():
            said = (_PROCESSES / str(process) / "stat").read_text()
            user, system = said.rpartition(")")[2].split()[11:13]  # the name may hold anything
            ticks += int(user) + int(system)
    except OSError:
        return None
    return ticks / os.sysconf("SC_CLK_TCK")


def _family() -> set[int]:
    """This process and all that it has started, by fork or by way of multiprocessing's server."""
    parents = {
        number: _value(number, "PPid")
        for number in (int(path.name) for path in _PROCESSES.glob("[0-9]*"))
    }
    found = {child.pid for child in multiprocessing.active_children() if child.pid is not None}
    found.add(os.getpid())
    while more := {number for number, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _value(process: int, name: str) -> int | None:
    """A number in the status that the system keeps of a process."""
    try:
        lines = (_PROCESSES / str(process) / "status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) if found else None


if __name__ == "__main__":
    work(Path(sys.argv[1]))
