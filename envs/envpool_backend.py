"""EnvPool's MuJoCo environments, stepped by threads in C++, with the promises of `envs`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from acktr.envs.guard import Array, StepResult, one_line
from acktr.envs.parallel import chosen_envs, usable_cores, worker_count
from acktr.envs.settings import EnvError, EnvFault, Workers

_NAMES = (
    *("Ant", "HalfCheetah", "Hopper", "InvertedDoublePendulum", "InvertedPendulum"),
    *("Pusher", "Reacher", "Swimmer", "Walker2d"),
)
SAME = frozenset(f"{name}-{v}" for name in _NAMES for v in ("v4", "v5")) - {"Pusher-v4"}
"""Ids whose steps from equal states are those of Gymnasium but for rounding.

Humanoid and HumanoidStandup are not among them: their v4 observes other contact forces, and their
v5 moves a little differently in EnvPool's own MuJoCo (3.6.0) than in a later one (3.17.0).
"""

_ENDLESS = 2**30
"""Time limit given to EnvPool: it would hide that an episode terminates at its last step."""


def check_envpool(spec: EnvSpec) -> None:
    """Check that EnvPool is installed and has the same environment under the same id.

    Raises:
        EnvError: It is not so; one line.
    """
    gymnasiums = isinstance(spec.entry_point, str) and "gymnasium.envs.mujoco" in spec.entry_point
    if spec.id not in SAME or not gymnasiums or spec.kwargs or spec.additional_wrappers:
        raise EnvError(
            f"env_backend 'envpool' is not for {spec.id}, only for what is the same there: "
            + ", ".join(sorted(SAME))
        )
    offered = SAME.intersection(_envpool().list_all_envs())
    if spec.id not in offered:
        raise EnvError(
            f"the installed EnvPool has no {spec.id}; it has {', '.join(sorted(offered)) or 'none'}"
        )


def thread_count(asked: Workers, spec: EnvSpec, num_envs: int) -> int:
    """How many threads step the environments: "auto" means the usable cores.

    Raises:
        EnvError: The setting cannot be used.
    """
    number = worker_count(asked, spec, num_envs)
    return min(usable_cores(), num_envs) if asked == "auto" else number


class EnvPoolEnvs(VectorEnv[Any, Any, Any]):
    """EnvPool under same-step autoreset, with Gymnasium's spaces and time limit.

    EnvPool resets an ended episode at the step after its end; here it is reset at once. Rewards
    are rounded to float32, as EnvPool gives them. Every environment has random numbers of its
    own, so that steps do not depend on the number of threads.

    Args:
        spec: Environment, which `check_envpool` accepts.
        seeds: One per environment, below 2^31, for the first episodes.
        observation_space: Of one environment of Gymnasium's.
        action_space: Of one environment of Gymnasium's.
        threads: That step.

    Raises:
        EnvError: EnvPool's spaces are other ones.
    """

    def __init__(
        self,
        spec: EnvSpec,
        seeds: Sequence[int],
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        threads: int = 1,
    ) -> None:
        super().__init__()
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.spec = spec
        self.num_envs = len(seeds)
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space = batch_space(observation_space, self.num_envs)
        self.action_space = batch_space(action_space, self.num_envs)
        self._threads = threads
        self._limit = spec.max_episode_steps or _ENDLESS
        self._elapsed = np.zeros(self.num_envs, np.int64)
        self._observations = np.zeros((self.num_envs, *(observation_space.shape or ())))
        self._pool: Any = None
        self._fresh = True  # no episode has begun
        self._unfinished = False  # a step or reset was begun and not ended
        self._renew(seeds)
        self._check_spaces()

    @property
    def workers(self) -> int:
        """Threads that step."""
        return self._threads

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Reset all environments, or those of `options["reset_mask"]`; seeds are a list or None."""
        self._check_open()
        rest = dict(options or {})
        chosen = chosen_envs(rest.pop("reset_mask", None), self.num_envs)
        if rest:
            raise EnvError(f"reset options {sorted(rest)} cannot be given to EnvPool")
        if seed is not None and not (self._fresh and list(seed) == self._seeds):
            if not chosen.all():
                raise EnvError("EnvPool cannot seed some environments only: reset all of them")
            self._renew(seed)
        elif self._unfinished:
            self._renew(self._other_seeds())
        self._start(np.arange(self.num_envs) if self._fresh else np.flatnonzero(chosen))
        return self._observations.copy(), {}

    def step(self, actions: Any) -> StepResult:
        """Step all environments; after an interrupted step all episodes are cut."""
        self._check_open()
        if self._unfinished:
            return self._cut()
        self._unfinished = True
        final, rewards, done, _, _ = self._pool.step(np.asarray(actions, np.float64))
        self._observations = final.copy()
        self._elapsed += 1
        terminated, truncated = done.astype(np.bool_), self._elapsed >= self._limit
        ended = terminated | truncated
        infos: dict[str, Any] = {}
        if ended.any():
            self._start(np.flatnonzero(ended))
            infos = {"final_obs": final, "_final_obs": ended}
        self._unfinished = False
        observations = self._observations.copy()
        return observations, rewards.astype(np.float64), terminated, truncated, infos

    def close_extras(self, **kwargs: Any) -> None:
        """End the threads."""
        self._pool = None

    def _start(self, which: NDArray[np.int64]) -> None:
        """Begin new episodes."""
        self._unfinished = True
        self._observations[which] = self._pool.reset(which.astype(np.int32))[0]
        self._elapsed[which] = 0
        self._fresh = self._unfinished = False

    def _renew(self, seeds: Sequence[int]) -> None:
        """Build the environments, since EnvPool takes seeds at no other time."""
        self._pool = None  # ends the threads
        self._seeds = [int(seed) for seed in seeds]
        self._fresh, self._unfinished = True, False
        assert self.spec is not None
        self._pool = _envpool().make_gymnasium(
            self.spec.id,
            num_envs=self.num_envs,
            num_threads=self._threads,
            seed=self._seeds,
            max_episode_steps=_ENDLESS,
        )

    def _cut(self) -> StepResult:
        """A step that truncates all episodes where they were, after an interrupted one.

        The interruption may have come before or after EnvPool's step, which is lost.
        """
        final = self._observations.copy()
        self._renew(self._other_seeds())
        self._start(np.arange(self.num_envs))
        ended = np.ones(self.num_envs, np.bool_)
        infos = {"final_obs": final, "_final_obs": ended}
        return self._observations.copy(), np.zeros(self.num_envs), ~ended, ended.copy(), infos

    def _other_seeds(self) -> list[int]:
        words = np.random.SeedSequence(self._seeds).generate_state(self.num_envs)
        return [int(word) >> 1 for word in words]

    def _check_open(self) -> None:
        if self._pool is None:
            name = "EnvPool" if self.spec is None else self.spec.id
            raise EnvFault(f"{name} is closed")

    def _check_spaces(self) -> None:
        for ours, theirs in (
            (self.single_observation_space, self._pool.observation_space),
            (self.single_action_space, self._pool.action_space),
        ):
            if not _same_bounds(ours, theirs):
                raise EnvError(f"EnvPool has the space {theirs} where Gymnasium has {ours}")


def _same_bounds(one: spaces.Space[Any], other: spaces.Space[Any]) -> bool:
    if not (isinstance(one, spaces.Box) and isinstance(other, spaces.Box)):
        return False
    return np.array_equal(one.low, other.low) and np.array_equal(one.high, other.high)


def _envpool() -> Any:
    """The module.

    Raises:
        EnvError: It is not installed or cannot be imported.
    """
    try:
        return importlib.import_module("envpool")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "envpool":
            raise EnvError(
                "env_backend 'envpool' needs a package that is missing:"
                " pip install 'acktr[envpool]' (Linux)"
            ) from None
        raise EnvError(f"the package envpool cannot be imported: {one_line(error)}") from error
