"""Gymnasium environments stepped in turn by one process, or by several at the same time."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

from acktr.envs.chunk import UNSEEDED, AnyEnv, Chunk, step_arrays
from acktr.envs.guard import Array, StepResult
from acktr.envs.settings import EnvError, EnvFault, Workers
from acktr.envs.worker import RESET, STEP, Worker, end_all, end_with

DEADLINE = 60.0
"""Seconds after which a process that does not answer counts as stuck."""

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


class ParallelEnvs(SyncVectorEnv):
    """Environments under same-step autoreset whose infos are dropped, except final observations.

    The first part is stepped by this process and each other part by one of its own; steps are the
    same for any number of them.

    Args:
        envs: The environments, which this object owns from now on.
        name: For messages.
        workers: Processes, this one included.
        deadline: Seconds after which one that does not answer counts as stuck.

    Raises:
        EnvError: A process cannot be started.
        RuntimeError: The environments have different spaces.
    """

    def __init__(
        self, envs: Sequence[AnyEnv], name: str, workers: int = 1, deadline: float = DEADLINE
    ) -> None:
        super().__init__([_giver(env) for env in envs], autoreset_mode=AutoresetMode.SAME_STEP)
        self._deadline = deadline
        self._arrays = step_arrays(
            self.single_observation_space, self.single_action_space, self.num_envs
        )
        bounds = [self.num_envs * part // workers for part in range(workers + 1)]
        self._own, *others = (
            Chunk(envs[first:last], first, self._arrays, name) for first, last in pairwise(bounds)
        )
        self._others: list[Worker] = []
        end_with(self, self._others)
        try:
            for chunk in others:
                self._others.append(Worker(chunk, self._others))
        except EnvError:
            end_all(self._others)
            raise

    @property
    def workers(self) -> int:
        """Processes that step, this one included."""
        return 1 + len(self._others)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Reset all environments, or those of `options["reset_mask"]`; seeds are a list or None."""
        rest = dict(options or {})
        self._arrays.chosen[:] = chosen_envs(rest.pop("reset_mask", None), self.num_envs)
        self._arrays.seeds[:] = UNSEEDED if seed is None else seed
        if rest and self._others:
            raise EnvError(f"reset options {sorted(rest)} cannot be given: set env_workers to 1")
        self._run(RESET, lambda: self._own.reset(rest or None))
        return self._arrays.observations.copy(), {}

    def step(self, actions: Any) -> StepResult:
        """Step all environments."""
        arrays = self._arrays
        arrays.actions[...] = actions
        self._run(STEP, self._own.step)
        terminated, truncated = arrays.terminated.copy(), arrays.truncated.copy()
        ended = terminated | truncated
        infos: dict[str, Any] = {}
        if ended.any():
            infos = {"final_obs": arrays.final.copy(), "_final_obs": ended}
        return arrays.observations.copy(), arrays.rewards.copy(), terminated, truncated, infos

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call a method of all environments, or get an attribute, if this process has them all."""
        self._only_here()
        return super().call(name, *args, **kwargs)

    def set_attr(self, name: str, values: Any) -> None:
        """Set an attribute of all environments, if this process has them all."""
        self._only_here()
        super().set_attr(name, values)

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environments and end the processes."""
        end_all(self._others)
        super().close_extras(**kwargs)

    def _run(self, command: bytes, own: Callable[[], None]) -> None:
        """Let all processes do the same; the first fault in the order of environments counts."""
        for worker in self._others:
            worker.send(command)
        faults: list[EnvFault] = []
        try:
            own()
        except EnvFault as error:
            faults.append(error)
        for worker in self._others:
            try:
                worker.receive(self._deadline)
            except EnvFault as error:
                faults.append(error)
        if faults:
            raise faults[0]

    def _only_here(self) -> None:
        if self._others:
            raise EnvError("the environments live in other processes: set env_workers to 1")


def chosen_envs(mask: Any, num_envs: int) -> NDArray[np.bool_]:
    """The environments of a `reset_mask`, which is None for all.

    Raises:
        EnvError: It is no mask, or chooses none.
    """
    array = np.ones(num_envs, np.bool_) if mask is None else np.asarray(mask)
    if array.shape != (num_envs,) or array.dtype != np.bool_ or not array.any():
        raise EnvError(
            f"reset_mask must be {num_envs} booleans, not all of them false; got {mask!r}"
        )
    return array


def worker_count(asked: Workers, spec: EnvSpec, num_envs: int) -> int:
    """How many processes step the environments, the main one included.

    "auto" means one, except for MuJoCo on Linux: there it is the number of usable cores, but at
    most half the number of environments, of two or three environments two. OMP_NUM_THREADS=1 asks
    for one.

    Args:
        asked: The setting.
        spec: The environment.
        num_envs: Number of environments.

    Raises:
        EnvError: The setting cannot be used, or not on this system.
    """
    number = isinstance(asked, int) and not isinstance(asked, bool)
    if asked != "auto" and not (number and 1 <= int(asked) <= 1024):
        raise EnvError(f"env_workers must be 'auto' or an integer from 1 to 1024, got {asked!r}")
    if asked != "auto":
        if asked > 1 and sys.platform != "linux":
            raise EnvError(f"env_workers must be 'auto' or 1 on this system, got {asked}")
        return min(asked, num_envs)
    mujoco = isinstance(spec.entry_point, str) and "envs.mujoco" in spec.entry_point
    if not mujoco or sys.platform != "linux":
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


def _giver(env: AnyEnv) -> Callable[[], AnyEnv]:
    return lambda: env
