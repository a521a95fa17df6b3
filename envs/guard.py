"""Checks around a vector environment: finite values, actions, final observations, episodes."""

from __future__ import annotations

import math
import re
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from acktr.envs.episodes import SUCCESS, EpisodeStats, last_infos
from acktr.envs.errors import EnvError, EnvFault, EnvWarning, named
from acktr.envs.masks import MASK, FoundMasks, MaskSetting, VectorMasks
from acktr.envs.nested import dense_finals, flat, is_nested, parts
from acktr.envs.spaces import bounds, check_actions, integers
from acktr.envs.values import Tree, require_like
from acktr.envs.vector import (
    Array,
    OpenVectorEnv,
    StepResult,
    check_seed,
    check_state,
    env_seeds,
    require_distinct,
    state_method,
)
from acktr.envs.watch import TIMEOUT, Late, Watch

_LARGEST = float(np.finfo(np.float32).max)
"""An observation that is larger would be infinite to the network."""
_LARGEST_REWARD = math.sqrt(_LARGEST)
"""The squared error of a larger reward would be."""


class GuardedVectorEnv(OpenVectorEnv):
    """A Gymnasium vector environment with the guarantees of `envs` (see the package).

    Args:
        env: The vector environment, under either same-step or next-step autoreset.
        name: For messages.
        seed: Of the first reset.
        foreign: Made by somebody else: its seeds, actions and infos are passed through as they
            are, except for the statistics of episodes, action masks and "forced".
        record: Keys of the infos of last steps whose numbers are in `infos["recorded"]`.
        masks: Where the action masks of a foreign environment come from.
        timeout: Seconds that a call of a foreign environment may take.
        bounded: Whether to warn of observations outside of the bounds of their Boxes.
        first: Number of the first of them among all that share a seed.
    """

    reports_episodes = True
    """Its infos have the statistics of ended episodes."""

    def __init__(
        self,
        env: VectorEnv[Any, Any, Any],
        name: str,
        seed: int,
        *,
        foreign: bool = False,
        record: tuple[str, ...] = (),
        masks: MaskSetting = "auto",
        timeout: float = TIMEOUT,
        bounded: bool = True,
        first: int = 0,
    ) -> None:
        super().__init__(env)
        self.record, self._first = tuple(record), first
        self._missing: set[str] = set()
        self._foreign = foreign
        self._masks = VectorMasks(env, masks, name) if foreign else None
        self._next_step = env.metadata.get("autoreset_mode") == AutoresetMode.NEXT_STEP
        self._dead = np.zeros(env.num_envs, np.bool_)
        self._name = name
        self._seed: int | None = check_seed(seed)
        self._seeds = np.full(env.num_envs, -1)  # of the last seeded resets; -1 where not known
        self._steps = 0
        self._stats = EpisodeStats(env.num_envs)
        space = env.single_observation_space
        self._nested = is_nested(space)
        self._parts = parts(space)
        self._limits = {name: integers(part) for name, part in self._parts.items()}
        self._bounds = {name: bounds(part) for name, part in self._parts.items() if bounded}
        calls: list[tuple[int, str] | None] = [None]  # the call that is under way, by its number
        self._calls = calls
        if foreign:
            require_distinct(env, name)
            watch = Watch(
                lambda: calls[0], lambda call: f"{name} did not return from {call[1]}", timeout
            )
            weakref.finalize(self, watch.stop)

    @property
    def found_masks(self) -> FoundMasks | None:
        """The action masks that a foreign environment was found to have; None if not known."""
        return None if self._masks is None else self._masks.found

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Reset all environments, or those of `options["reset_mask"]`."""
        seed, self._seed = (self._seed if seed is None else check_seed(seed)), None
        mask = (options or {}).get("reset_mask")
        seeds: Any = seed
        if seed is not None and not self._foreign:
            every = env_seeds(seed, self._first + self.num_envs)
            seeds = every[self._first :]  # sync environments take a list of seeds
        obs, infos = self._call("reset", lambda: self.env.reset(seed=seeds, options=options))
        self._check_observations(obs, "observation", "reset")
        which = np.ones(self.num_envs, np.bool_) if mask is None else mask
        if seed is not None:
            self._stats.begun[which] = 0
            # What a vector of somebody else makes of the seed for each environment is its affair.
            self._seeds = np.where(which, -1 if self._foreign else seeds, self._seeds)
        self._stats.reset(mask)
        self._dead[which] = False
        self._add_masks(obs, infos, "reset", which)
        return obs, infos

    def step(self, actions: Any) -> StepResult:
        """Step all environments; a fault names the environment, its episode and its seed."""
        try:
            return self._step(actions)
        except EnvFault as fault:
            fault.args = (self._placed(str(fault)),)
            raise

    def _step(self, actions: Any) -> StepResult:
        batch = actions
        if not self._foreign:
            batch = check_actions(actions, self.single_action_space, self.num_envs)
        self._steps += 1
        when = f"step {self._steps}"
        obs, rewards, terminated, truncated, infos = self._call(when, lambda: self.env.step(batch))
        if self._foreign:
            rewards = self._column(rewards, "rewards", "numbers", when)
            terminated = self._column(terminated, "terminated", "booleans", when)
            truncated = self._column(truncated, "truncated", "booleans", when)
        alive = ~self._dead
        dones = (terminated | truncated) & alive
        self._dead = dones & self._next_step
        self._check_finite(rewards, "reward", when, _LARGEST_REWARD)
        if dones.any():
            self._record(infos, dones)
        if dones.any() and not self._next_step:
            self._give_finals(infos, dones, ~terminated, obs, when)
        self._check_observations(obs, "observation", when)
        # Words of this package, in which environments of others may say something else.
        for key in ("episode", "_episode", "forced", "_forced"):
            infos.pop(key, None)
        infos.update(self._stats.step(rewards, dones, alive))
        self._add_masks(obs, infos, when, ~self._dead)
        return obs, rewards, terminated, truncated, infos

    def state_dict(self) -> Tree:
        """What the environments are in the middle of, for :meth:`load_state_dict`.

        Raises:
            UnsavedError: They cannot be saved; one line.
        """
        envs = state_method(self.env, "state_dict")()
        return {"envs": envs, "episodes": self._stats.state_dict(), "dead": self._dead.copy()}

    def check_state_dict(self, state: Any) -> None:
        """Raise ValueError, with one line, unless a state fits; it is not trusted."""
        template = {"episodes": self._stats.state_dict(), "dead": self._dead, "envs": None}
        require_like(state, template, f"the state of {self._name}")
        check_state(self.env, state["envs"])

    def load_state_dict(self, state: Tree) -> None:
        """Restore a state; those that somebody else made are not reset before.

        Raises:
            ValueError: It does not fit; one line.
        """
        self.check_state_dict(state)
        self._count += 1
        state_method(self.env, "load_state_dict")(state["envs"])
        self._stats.load_state_dict(state["episodes"])
        self._dead[:] = state["dead"]
        self._seed = None

    def _call(self, when: str, call: Callable[[], Any]) -> Any:
        """The results of a reset or step, which may fail in any way."""
        self._count += 1
        self._calls[0] = self._count, when
        try:
            results = call()
            if self._foreign and not isinstance(results[-1], dict):
                raise TypeError(f"its infos are {results[-1]!r:.60}, not a dict")
            return results
        except (EnvError, EnvFault):
            raise
        except Late as late:
            raise EnvFault(str(late)) from late
        except (Exception, SystemExit) as error:
            raise EnvFault(f"{self._name} failed at {when}: {named(error)}") from error
        finally:
            self._calls[0] = None

    def _placed(self, said: str) -> str:
        """A message with the episode, since the seed, of the environment that it is about."""
        found = re.search(r"environment (\d+) of", said)
        if found is None:
            return said
        begun, seed = self._stats.begun[int(found[1])], self._seeds[int(found[1])]
        if np.isnan(begun):
            return said
        return f"{said} (episode {begun:.0f}{f', seed {seed}' if seed >= 0 else ''})"

    def _column(self, values: Any, what: str, kind: str, when: str) -> Array:
        """One value for each environment, from whatever a foreign environment has them in."""
        column = np.asarray(values)
        if column.size != self.num_envs:
            raise EnvFault(
                f"{self._name} returned {what} of shape {column.shape} at {when}, not"
                f" ({self.num_envs},)"
            )
        fits = column.dtype.kind in "biuf"
        if kind == "booleans" and fits:
            fits = bool(((column == 0) | (column == 1)).all())
        if not fits:
            shown = " ".join(str(column).split())
            raise EnvFault(f"{self._name} returned {what} {shown:.60} at {when}, not {kind}")
        kept = np.bool_ if kind == "booleans" else column.dtype
        return column.reshape(self.num_envs).astype(kept)

    def _give_finals(
        self, infos: dict[str, Any], ended: Array, cut: Array, obs: Any, when: str
    ) -> None:
        """Give the last observations, without which an episode that was cut has no value."""
        shown = infos.pop("final_obs", None)
        there = ended.copy()
        for index in np.flatnonzero(ended):
            if shown is None or (isinstance(shown, np.ndarray) and shown[index] is None):
                there[index] = False
        lost = np.flatnonzero(ended & cut & ~there)
        if len(lost):
            raise EnvFault(
                f"environment {lost[0]} of {self._name} was truncated at {when} without its last"
                " observation: under same-step autoreset infos['final_obs'] must hold it"
            )
        infos["_final_obs"] = there
        if there.any():
            infos["final_obs"] = dense_finals(self.single_observation_space, shown, there, obs)
            self._check_observations(infos["final_obs"], "final observation", when, there)

    def _record(self, infos: dict[str, Any], ended: Array) -> None:
        """Give `infos["recorded"]`, and tell once of each number that is not there.

        Whether tasks were solved is among them where environments say so, asked for or not.
        """
        if self._foreign:
            keys = dict.fromkeys((*self.record, SUCCESS))
            infos["recorded"] = last_infos(infos, tuple(keys), ended, not self._next_step)
        columns = infos.get("recorded", {})
        if SUCCESS not in self.record and np.isnan(columns.get(SUCCESS, math.nan)).all():
            columns.pop(SUCCESS, None)
        if not columns:
            infos.pop("recorded", None)
        for key, values in columns.items():
            if key not in self._missing and np.isnan(values[ended]).any() and key in self.record:
                self._missing.add(key)
                warnings.warn(
                    f"{self._name}: the info of an episode's last step has no number {key!r}, which"
                    " is to be recorded",
                    stacklevel=2,
                )

    def _add_masks(self, obs: Any, infos: dict[str, Any], when: str, rows: Array) -> None:
        """Put the action masks of a foreign environment, new ones in these rows, into its infos."""
        if self._masks is None:
            return
        self._masks.free(self._dead)
        masks = self._masks.read(obs, infos, when, rows)
        if masks is not None:
            infos[MASK], infos[f"_{MASK}"] = masks, np.ones(self.num_envs, np.bool_)

    def _check_observations(
        self, values: Any, what: str, when: str, mask: Array | None = None
    ) -> None:
        """Finite numbers, or integers that the space has, in every part of the observations.

        Environments outside of the mask pass.
        """
        if not self._nested:
            self._check_part("", values, what, when, mask)
            return
        try:
            arrays = flat(self.single_observation_space, values)
        except (KeyError, IndexError, TypeError) as error:
            raise EnvFault(
                f"{self._name} returned the {what} without a part of its space at {when}:"
                f" {named(error)}"
            ) from error
        assert isinstance(arrays, dict)
        for name in self._limits:
            self._check_part(name, arrays[name], f"{what} {name!r}", when, mask)

    def _check_part(
        self, name: str, values: Array, what: str, when: str, mask: Array | None
    ) -> None:
        if self._foreign:
            self._check_batch(name, values, what, when)
        limits = self._limits[name]
        if limits is None:
            self._check_finite(values, what, when)
            if self._bounds.get(name) is not None:
                self._check_bounds(name, values, what, when, mask)
            return
        low, high = limits
        good = ((values >= low) & (values < high)).reshape(len(values), -1).all(1)
        if mask is not None:
            good |= ~mask
        if not good.all():
            index = int(np.argmin(good))
            raise EnvFault(
                f"environment {index} of {self._name} returned the {what} {values[index]} at"
                f" {when}, which is not in range for {self._parts[name]}"
            )

    def _check_batch(self, name: str, values: Any, what: str, when: str) -> None:
        """Refuse what is no batch of a part of the observation."""
        part = self._parts[name]
        shape, array = (self.num_envs, *(part.shape or ())), np.asarray(values)
        fits = np.can_cast(array.dtype, part.dtype or array.dtype, "same_kind")
        if not isinstance(values, np.ndarray):
            kind = type(values).__name__
            raise EnvFault(f"{self._name} returned the {what} as a {kind} at {when}, not an array")
        if array.shape != shape or not fits:
            raise EnvFault(
                f"{self._name} returned the {what} of all environments as {array.dtype}"
                f" {array.shape} at {when}, not as {part.dtype} {shape}"
            )

    def _check_bounds(
        self, name: str, values: Array, what: str, when: str, mask: Array | None
    ) -> None:
        """Warn of a part that leaves its bounds, once: some environments do so by a little."""
        bounds = self._bounds[name]
        assert bounds is not None
        low, high = bounds
        outside = (values < low) | (values > high)
        if mask is not None:
            outside[~mask] = False
        if not outside.any():
            return
        self._bounds[name] = None
        where, place = _first(outside)
        warnings.warn(
            f"environment {where[0]} of {self._name} returned the {what} {values[where]}{place} at"
            f" {when}, outside of the bounds {low[where[1:]]} and {high[where[1:]]} of its space:"
            " training goes on with it; the space should have the bounds that are kept",
            EnvWarning,
            stacklevel=2,
        )

    def _check_finite(self, values: Array, what: str, when: str, largest: float = _LARGEST) -> None:
        if values.dtype.kind != "f":
            return
        # Where the sum of squares is small no number is too large, and it is the cheapest to take.
        if np.vdot(values, values) <= largest:
            return
        finite = np.abs(values) <= largest
        if finite.all():
            return
        where, place = _first(~finite)
        large = np.isfinite(values[where])
        raise EnvFault(
            f"environment {where[0]} of {self._name} returned a"
            f" {'too large' if large else 'non-finite'} {what} at {when}: {values[where]}{place}"
        )


def _first(bad: Array) -> tuple[tuple[int, ...], str]:
    """The indices of the first bad value of a batch, and the place in its sample in words."""
    where = tuple(int(i) for i in np.argwhere(bad)[0])
    return where, f" at element {where[1:]}" if len(where) > 1 else ""
