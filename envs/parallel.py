"""Gymnasium environments stepped by workers: this process, and forked ones over shared memory.

Gymnasium's AsyncVectorEnv would do the same with less code. Ours stay because they are 4.0 times
as fast on HalfCheetah-v5 and 2.5 times on Hopper-v5: 8 environments, random actions, two cores of
an otherwise idle machine, three rounds in turn on 2026-11-28, in thousands of steps per second:

    =================================  ==============  =========
    Gymnasium 1.4.0, MuJoCo 3.17.0     HalfCheetah-v5  Hopper-v5
    =================================  ==============  =========
    two workers                                  55.3       22.9
    one worker                                   32.5       13.0
    AsyncVectorEnv, shared memory                14.0        9.1
    SyncVectorEnv                                30.8       12.4
    EnvPool 1.2.5, two threads                   41.2       21.8
    =================================  ==============  =========

AsyncVectorEnv has a process for each environment, which pickles its infos, and sleeps between
steps; a worker has several environments, pickles nothing and does not sleep.
"""

from __future__ import annotations

import math
import os
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from acktr.envs.episodes import SUCCESS
from acktr.envs.errors import EnvError, EnvFault
from acktr.envs.exchange import LOAD, SAVE, Snapshots
from acktr.envs.masks import MASK, FoundMasks, MaskSetting, decide
from acktr.envs.nested import nested
from acktr.envs.process import CLOSE, ForkedProcess, end_all
from acktr.envs.settings import Workers
from acktr.envs.values import Tree
from acktr.envs.vector import AnyEnv, Array, StepResult, check_mask
from acktr.envs.watch import TIMEOUT, Late, Watch
from acktr.envs.worker import UNSEEDED, Rows, Worker

_STEP, _RESET = b"s", b"r"
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


class ParallelEnvs(SyncVectorEnv):
    """Environments under same-step autoreset, without infos but for masks and what `record` names.

    The first part is stepped by this process, unless it steps none, and each other part by one of
    its own; steps are the same for any number of them.

    Args:
        envs: The environments, which this object owns from now on.
        name: Name for messages.
        workers: Number of processes that step.
        timeout: Seconds that a call of one environment may take.
        record: Keys of the infos of last steps whose numbers are in `infos["recorded"]`.
        masks: Where action masks come from.
        apart: Whether this process is none of those, so that it survives what environments do.

    Raises:
        EnvError: A process cannot be started.
        RuntimeError: The environments have different spaces.
    """

    def __init__(
        self,
        envs: Sequence[AnyEnv],
        name: str,
        workers: int = 1,
        timeout: float = TIMEOUT,
        record: tuple[str, ...] = (),
        masks: MaskSetting = "auto",
        apart: bool = False,
    ) -> None:
        makers = [lambda env=env: env for env in envs]
        super().__init__(makers, autoreset_mode=AutoresetMode.SAME_STEP)
        self._name = name
        self._timeout = timeout
        keys = tuple(dict.fromkeys((*record, SUCCESS)))
        self._masking = masks
        bounds = [self.num_envs * part // workers for part in range(workers + 1)]
        bounds = [0, *bounds] if apart else bounds
        seen, done = self.single_observation_space, self.single_action_space
        self._rows = Rows(self.num_envs, seen, done, keys, shared=len(bounds) > 2)
        self._owner = os.getpid()
        self._own, *self._others = (
            Worker(envs[first:last], first, self._rows, name, masks)
            for first, last in pairwise(bounds)
        )
        self._snapshots = Snapshots(self.envs, name, bounds)
        self._processes: list[ForkedProcess] = []
        weakref.finalize(self, end_all, self._processes)  # also when the interpreter ends
        try:
            for worker, part in zip(self._others, self._snapshots.parts[1:], strict=True):
                commands = {_STEP: worker.step, _RESET: worker.reset, CLOSE: worker.close}
                commands |= {SAVE: part.save, LOAD: part.load}
                process = ForkedProcess(worker.label, commands, worker.doing, worker.said)
                self._processes.append(process)
        except EnvError:
            end_all(self._processes)
            raise
        self._watch = Watch(self._own.doing_here, self._own.said, timeout)
        weakref.finalize(self, self._watch.stop)

    @property
    def workers(self) -> int:
        """Number of processes that step."""
        return len(self._processes) + (self._own.size > 0)

    @property
    def found_masks(self) -> FoundMasks | None:
        """The action masks that were found at the first reset; None before it.

        Raises:
            EnvError: There are none, and they are asked for.
        """
        offered = self._rows.offered_by(0)
        if offered is None:
            return None
        place = f"environment 0 of {self._name}"
        return decide(self._masking, offered, self.single_action_space, place)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Reset all environments, or those of `options["reset_mask"]`; seeds are a list or None."""
        rest = dict(options or {})
        self._rows.mask[:] = check_mask(rest.pop("reset_mask", None), self.num_envs)
        self._rows.seeds[:] = UNSEEDED if seed is None else seed
        if rest and self._processes:
            raise EnvError(f"reset options {sorted(rest)} cannot be given: set env_workers to 1")
        self._run(_RESET, lambda: self._own.reset(rest or None))
        odd = self._rows.masked != self._rows.masked[0]
        if odd.any():
            some, none = sorted((0, int(odd.argmax())), key=lambda row: not self._rows.masked[row])
            raise EnvFault(
                f"environment {some} of {self._name} has action masks and environment {none} none"
            )
        return self._copied(self._rows.observations), self._masks()

    def step(self, actions: Any) -> StepResult:
        """Step all environments."""
        rows = self._rows
        rows.actions[...] = actions
        self._run(_STEP, self._own.step)
        terminated, truncated = rows.terminated.copy(), rows.truncated.copy()
        ended = terminated | truncated
        infos = self._masks()
        if ended.any():
            infos |= {"final_obs": self._copied(rows.final), "_final_obs": ended}
            infos["recorded"] = {
                key: np.where(ended, values, math.nan) for key, values in rows.recorded
            }
        observations = self._copied(rows.observations)
        return observations, rows.rewards.copy(), terminated, truncated, infos

    def state_dict(self) -> Tree:
        """What the environments are in the middle of; an UnsavedError tells which cannot tell."""
        self._run(SAVE, self._snapshots.parts[0].save)
        return self._snapshots.taken()

    def check_state_dict(self, state: Any) -> None:
        """Raise ValueError unless a state fits; it is not trusted."""
        self._snapshots.check(state)

    def load_state_dict(self, state: Tree) -> None:
        """Restore a state, in environments that are reset before."""
        self._snapshots.check(state)
        self.reset(seed=[0] * self.num_envs)
        self._snapshots.give(state)
        self._run(LOAD, self._snapshots.parts[0].load)

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call a method of all environments, or get an attribute, if this process has them all."""
        self._require_all_here()
        return super().call(name, *args, **kwargs)

    def set_attr(self, name: str, values: Any) -> None:
        """Set an attribute of all environments, if this process has them all."""
        self._require_all_here()
        super().set_attr(name, values)

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environments, each in its process, and end the processes.

        A process that was lost did not do so: its environments are closed here, as they may have
        processes of their own.
        """
        end_all(self._processes)
        self._own.close()
        for process, worker in zip(self._processes, self._others, strict=False):
            if process.lost:
                worker.close()
        self._watch.stop()

    def _copied(self, rows: dict[str, Array]) -> Any:
        """Observations of all environments as their space has them."""
        if "" in rows:  # at once, for speed
            return rows[""].copy()
        copies = {name: array.copy() for name, array in rows.items()}
        return nested(self.single_observation_space, copies)

    def _masks(self) -> dict[str, Any]:
        return {MASK: self._rows.action_masks.copy()} if self._rows.masked[0] else {}

    def _run(self, command: bytes, own: Callable[[], None]) -> None:
        """Let all workers do the same; the first fault in the order of environments counts."""
        if self._processes and os.getpid() != self._owner:
            raise EnvError(
                f"{self._name}: these environments belong to process {self._owner}: make the agent"
                " in the process that trains it"
            )
        for process in self._processes:
            process.send(command)
        answers = [lambda p=process: p.receive(self._timeout) for process in self._processes]
        faults: list[EnvFault | EnvError] = []
        for answer in (own, *answers):
            try:
                answer()
            except (EnvFault, EnvError) as error:
                faults.append(error)
            except Late as late:
                faults.append(EnvFault(str(late)).with_traceback(late.__traceback__))
        if faults:
            raise faults[0]

    def _require_all_here(self) -> None:
        if self._processes:
            raise EnvError("the environments live in other processes: set env_workers to 1")


def worker_count(asked: Workers, spec: EnvSpec | None, num_envs: int) -> int:
    """How many processes step the environments, the main one included.

    "auto" means one, except for MuJoCo and pictures on Linux: there it is the number of usable
    cores, but at most half the number of environments, of two or three environments two.
    OMP_NUM_THREADS=1 asks for one.

    Raises:
        EnvError: The setting cannot be used, or not on this system.
    """
    if asked != "auto":
        if isinstance(asked, bool) or not isinstance(asked, int) or not 1 <= asked <= 1024:
            raise EnvError(
                f"env_workers must be 'auto' or an integer from 1 to 1024, got {asked!r}"
            )
        if asked > 1 and sys.platform != "linux":
            raise EnvError(f"env_workers must be 'auto' or 1 on this system, got {asked}")
        return min(asked, num_envs)
    entry = None if spec is None else spec.entry_point
    costly = isinstance(entry, str) and ("envs.mujoco" in entry or "envs.pixels" in entry)
    if not costly or sys.platform != "linux":
        return 1
    return min(usable_cores(), num_envs, max(2, num_envs // 2))


def usable_cores() -> int:
    """Cores that this process may keep busy: by affinity, container limit and OMP_NUM_THREADS."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = _QUOTA.read_text().split()
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    with suppress(ValueError):
        cores = min(cores, int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0]))
    return max(1, cores)


def thread_ids() -> frozenset[str] | None:
    """The threads of this process; None if processes cannot be forked from it.

    What has begun with threads, or with CUDA, does not go on in a fork.
    """
    torch: Any = sys.modules.get("torch")
    if sys.platform != "linux" or (torch is not None and torch.cuda.is_initialized()):
        return None
    return frozenset(os.listdir("/proc/self/task"))


def can_fork(threads: frozenset[str] | None) -> bool:
    """Whether the process has no thread that was not there before, and the system can fork it.

    Numbers would not do: an older thread may end while a new one begins. One that has ended a
    moment ago is still listed for a while.
    """
    for _ in range(20):
        now = thread_ids()
        if threads is None or now is None or now <= threads:
            return threads is not None and now is not None
        time.sleep(0.005)
    return False
