"""A process's share of the environments of a vector, and the rows of memory that it fills."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
from gymnasium import spaces

from acktr.envs.episodes import number
from acktr.envs.errors import EnvFault, named
from acktr.envs.masks import (
    MASK,
    SOURCES,
    MaskReader,
    Masks,
    MaskSetting,
    MaskSource,
    choices,
)
from acktr.envs.nested import Arrays, flat, parts
from acktr.envs.vector import AnyEnv, Array

UNSEEDED = -1
"""In place of a seed: the environment goes on with its own generator."""
_CLOSING = -1
"""In place of the number of a step."""
_NUMBERS = frozenset((float, int, np.float64, np.float32))
_FLAGS = frozenset((bool, np.bool_))
_Place = tuple[int, AnyEnv, Arrays, Arrays, MaskReader]
"""An environment: its row, the places of its observations and last ones, and its masks."""


class Rows:
    """One row for each environment.

    With `shared` each array begins a page of memory that later forks share; else a fork has its
    own, so that copies of an agent in several processes leave one another alone.
    """

    def __init__(
        self,
        num_envs: int,
        seen: spaces.Space[Any],
        done: spaces.Space[Any],
        record: tuple[str, ...],
        shared: bool = True,
    ) -> None:
        self._shared = shared

        def made(dtype: Any, shape: tuple[int, ...] | None = None) -> Array:
            full = (num_envs, *(shape or ()))
            return np.ndarray(full, dtype, self.memory(math.prod(full) * np.dtype(dtype).itemsize))

        self.actions = made(done.dtype, done.shape)
        """Actions that the next step executes."""
        self.seeds = made(np.int64)
        """Seeds of the next reset, or UNSEEDED."""
        self.mask = made(np.bool_)
        """Mask of the environments that the next reset resets."""
        self.space = seen
        inside = parts(seen)
        self.observations = {name: made(p.dtype, p.shape) for name, p in inside.items()}
        """Observations by part after the step, those of new episodes where one ended."""
        self.final = {name: made(p.dtype, p.shape) for name, p in inside.items()}
        """Last observations of episodes that ended, by part; undefined in other rows."""
        self.rewards = made(np.float64)
        self.terminated, self.truncated = made(np.bool_), made(np.bool_)
        self.recorded = [(key, made(np.float64)) for key in record]
        """Numbers in the infos of the last steps of episodes; undefined in other rows."""
        self.action_masks = made(np.bool_, (sum(choices(done) or (1,)),))
        """Action masks of the observations, where environments have some."""
        self.masked = made(np.bool_)
        """Whether an environment has action masks."""
        self.offered = made(np.uint8)
        """The kinds of action masks that an environment offers, see `offers`."""

    def memory(self, size: int) -> mmap.mmap | bytearray:
        """So many bytes of the kind that the rows are in."""
        return mmap.mmap(-1, size) if self._shared else bytearray(size)

    def offers(self, row: int, sources: Sequence[MaskSource]) -> None:
        """Take note of the kinds of action masks that an environment offers."""
        self.offered[row] = 1 + sum(2 << SOURCES.index(source) for source in sources)

    def offered_by(self, row: int) -> list[MaskSource] | None:
        """The kinds of action masks that an environment offers; None if that is not known yet."""
        bits = int(self.offered[row])
        return [source for i, source in enumerate(SOURCES) if bits & 2 << i] if bits else None


class Worker:
    """Steps neighbouring environments of a vector in turn, under same-step autoreset.

    `first` is the index of their first one in the vector, and `rows` are those of the whole vector.
    """

    def __init__(
        self, envs: Sequence[AnyEnv], first: int, rows: Rows, name: str, masks: MaskSetting
    ) -> None:
        last = first + len(envs) - 1
        which = f"environment {first}" if first == last else f"environments {first} to {last}"
        self.label = f"{which} of {name}"
        self._part = slice(first, last + 1)
        self._rows = rows
        self._name = name
        self.size = len(envs)
        self._space = rows.space
        self._steps = 0
        # What is called just now, for whoever watches it, in another process too: 2 * row + 1, or
        # + 2 for the reset behind a step, 0 between calls; the step; the count of resets; a thread.
        self._now = memoryview(rows.memory(4 * 8)).cast("q")
        self._places: list[_Place] = [
            (
                row,
                env,
                _views(rows.observations, row),
                _views(rows.final, row),
                MaskReader(env, masks, f"environment {row} of {name}"),
            )
            for row, env in enumerate(envs, first)
        ]

    def doing(self) -> tuple[int, ...] | None:
        """What is called just now, another value for each call; None between commands."""
        now = tuple(self._now)
        return now if now[0] else None

    def doing_here(self) -> tuple[int, ...] | None:
        """The same where the main thread of this process does it."""
        now = self.doing()
        return now if now is not None and now[-1] == threading.main_thread().ident else None

    def said(self, doing: tuple[int, ...]) -> str:
        """That in words."""
        row, begins = divmod(doing[0] - 1, 2)
        when = {0: "reset", _CLOSING: "close"}.get(doing[1], f"step {doing[1]}")
        which = f"environment {row} of {self._name}"
        return f"{which} did not return from {'the reset after ' if begins else ''}{when}"

    def reset(self, options: dict[str, Any] | None = None) -> None:
        """Reset the environments of the mask; an EnvFault tells which one failed."""
        now = self._now
        now[1], now[2], now[3] = 0, now[2] + 1, threading.get_ident()
        try:
            for place in self._places:
                if self._rows.mask[place[0]]:
                    now[0] = 2 * place[0] + 1
                    self._reset(place, options)
        finally:
            now[0] = 0

    def _reset(self, place: _Place, options: dict[str, Any] | None) -> None:
        row, env, observation, _, reader = place
        seed = int(self._rows.seeds[row])
        obs, info = env.reset(seed=None if seed == UNSEEDED else seed, options=options)
        try:
            _require_dict(info)
            _put(self._space, observation, obs)
        except Exception as error:
            raise self._fault(row, "reset", error) from error
        self._rows.offers(row, reader.offered(info))
        self._keep_mask(row, reader.read(obs, info, "reset"))

    def step(self) -> None:
        """Execute the actions; an EnvFault tells which environment failed."""
        self._steps += 1
        now = self._now
        now[1], now[3] = self._steps, threading.get_ident()
        try:
            self._step()
        finally:
            now[0] = 0

    def _step(self) -> None:
        rows, space, now = self._rows, self._space, self._now
        rewards, terminated, truncated = rows.rewards, rows.terminated, rows.truncated
        actions = rows.actions[self._part].copy()  # an environment may keep its last action
        for place, action in zip(self._places, actions, strict=True):
            row, env, observation, final, reader = place
            now[0] = 2 * row + 1
            obs, reward, terminal, cut, info = env.step(action)
            try:
                if reward.__class__ not in _NUMBERS:
                    reward = _number(reward)
                if terminal.__class__ not in _FLAGS or cut.__class__ not in _FLAGS:
                    terminal, cut = _flag("terminated", terminal), _flag("truncated", cut)
                rewards[row], terminated[row], truncated[row] = reward, terminal, cut
                if terminal or cut:
                    for key, values in rows.recorded:
                        values[row] = number(info.get(key))
                    _put(space, final, obs)
                    now[0] = 2 * row + 2
                    obs, info = env.reset()
                _put(space, observation, obs)
                if info.__class__ is not dict:
                    _require_dict(info)
                if reader.source is not None or MASK in info:
                    self._keep_mask(row, reader.read(obs, info, f"step {self._steps}"))
            except EnvFault:
                raise
            except Exception as error:
                raise self._fault(row, f"step {self._steps}", error) from error

    def _keep_mask(self, row: int, mask: Masks | None) -> None:
        self._rows.masked[row] = mask is not None
        if mask is not None:
            self._rows.action_masks[row] = mask

    def close(self) -> None:
        """Close the environments."""
        now = self._now
        now[1], now[3] = _CLOSING, threading.get_ident()
        try:
            for row, env, *_ in self._places:
                now[0] = 2 * row + 1
                env.close()
        finally:
            now[0] = 0

    def _fault(self, row: int, when: str, error: Exception) -> EnvFault:
        place = f"environment {row} of {self._name}"
        return EnvFault(f"{place} gave something unfit at {when}: {named(error)}")


def _views(rows: dict[str, Array], row: int) -> Arrays:
    """The places of one environment; one array where observations have no parts."""
    places = {name: array[row, ...] for name, array in rows.items()}
    return places.get("", places)


def _put(space: spaces.Space[Any], places: Arrays, obs: Any) -> None:
    """Write an observation to its place, or its parts to theirs."""
    if (
        obs.__class__ is np.ndarray
        and places.__class__ is np.ndarray
        and obs.dtype == places.dtype
        and obs.shape == places.shape
    ):
        places[...] = obs
    elif isinstance(places, dict):
        values = flat(space, obs)
        assert isinstance(values, dict)
        for name, place in places.items():
            _write(place, values[name], f" part {name!r}")
    else:
        _write(places, np.asarray(obs), "")


def _write(place: Array, value: Array, which: str) -> None:
    if value.shape != place.shape:
        raise ValueError(
            f"an observation{which} of shape {value.shape}, its space has {place.shape}"
        )
    if value.dtype == place.dtype:
        np.copyto(place, value)
        return
    if not np.can_cast(value.dtype, place.dtype, "same_kind"):
        raise ValueError(f"an observation{which} of {value.dtype}, its space has {place.dtype}")
    with np.errstate(over="ignore"):
        np.copyto(place, value, casting="same_kind")
    lost = place != value if value.dtype.kind in "iu" else np.isinf(place) & np.isfinite(value)
    if lost.any():
        raise ValueError(
            f"an observation{which} with the number {value[lost][0]}, which is too large for the"
            f" {place.dtype} of its space"
        )


def _number(value: Any) -> float:
    """A reward that is no plain number: an array of one, or of another library."""
    array = np.asarray(float(value) if isinstance(value, Real) else value)
    if array.size != 1:
        raise ValueError(f"a reward of shape {array.shape}, not one number")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"the reward {value!r:.60}, not a number")
    return float(array.item())


def _flag(name: str, value: Any) -> bool:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biuf" or array.item() not in (0, 1):
        raise ValueError(f"{name} = {value!r:.60}, not True or False")
    return bool(array.item())


def _require_dict(info: object) -> None:
    if not isinstance(info, dict):
        raise ValueError(f"the info {info!r:.60}, not a dict")
