"""Action masks: which actions an environment allows, by three conventions.

    ============  ====================================================  ==========================
    name          where the mask is                                     who has it so
    ============  ====================================================  ==========================
    action_masks  the method `env.action_masks()`                       sb3-contrib
    info          `info["action_mask"]` of every reset and step         Gymnasium (Taxi), PettingZoo
    observation   the key `action_mask` of a Dict observation           RLlib
    ============  ====================================================  ==========================

A mask belongs to the observation that is shown with it. It has one number for each choice, 1 or
True where it is allowed: (n,) for Discrete(n); for MultiDiscrete those of all components side by
side (sum of nvec,), or a tuple with an array, or None for all, for each component. What is asked
for is found at the first reset, as an info cannot be known before. The last observation of an
episode needs no mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from numpy.typing import NDArray

from acktr.envs.errors import EnvError, EnvFault, named, one_line
from acktr.envs.vector import AnyEnv, AnyVectorEnv

MaskSource = Literal["action_masks", "info", "observation"]
"""Name of a convention."""
MaskSetting = Literal["auto", "action_masks", "info", "observation", None]
"""The convention to follow; auto: the first that the environment has; None: no masks."""
Masks = NDArray[np.bool_]

MASK = "action_mask"
"""Key of infos and observations; infos of `make_vec` have all masks there, checked (N, P)."""
SOURCES: tuple[MaskSource, ...] = get_args(MaskSource)
_METHOD = "action_masks"
_PLACES: dict[MaskSource, str] = {
    "action_masks": "env.action_masks()",
    "info": 'info["action_mask"]',
    "observation": "the observation's action_mask",
}


@dataclass(frozen=True)
class FoundMasks:
    """What an environment offers, and what is used of it."""

    source: MaskSource | None
    """The convention that is followed; None: there are no masks, or they are not used."""
    unused: str | None = None
    """One line about masks that are offered and not used."""
    wanted: bool = True
    """Whether masks would be used if there were some."""

    @property
    def said(self) -> str | None:
        """Where the masks come from, in words."""
        return None if self.source is None else f"action masks from {_PLACES[self.source]}"

    def require_none(self, info: Mapping[str, Any], name: str, when: str) -> None:
        """Refuse a mask that comes although there was none at the first reset.

        Raises:
            EnvFault: There is one in the infos, and it would be used; one line.
        """
        if self.wanted and MASK in info:
            raise EnvFault(
                f"{name} gave {_PLACES['info']} at {when} but not at its first reset: give it at"
                " every reset and step, or set masks to None"
            )


def choices(space: spaces.Space[Any]) -> tuple[int, ...] | None:
    """The number of choices of each component of a Discrete or MultiDiscrete space, else None."""
    if isinstance(space, spaces.Discrete):
        return (int(space.n),)
    if isinstance(space, spaces.MultiDiscrete):
        return tuple(int(n) for n in space.nvec.ravel())
    return None


def as_masks(value: Any, sizes: tuple[int, ...], lead: tuple[int, ...] = ()) -> Masks:
    """A mask as booleans (P,), or several of them (*lead, P).

    Args:
        value: One of the forms that the module's docstring lists.
        sizes: The number of choices of each component; P is their sum.
        lead: Leading dimensions.

    Raises:
        ValueError: It has another shape, other numbers than 0 and 1, or allows nothing; one line.
    """
    if isinstance(value, tuple) and any(part is None or np.ndim(part) for part in value):
        value = _joined(value, sizes, lead)
    array = np.asarray(value)
    shape = (*lead, sum(sizes))
    if array.shape != shape:
        raise ValueError(f"it has the shape {array.shape}, not {shape}")
    if array.dtype != np.bool_:
        fits = (array == 0) | (array == 1) if array.dtype.kind in "iuf" else np.zeros((), np.bool_)
        if not fits.all():
            found = f"{array[~fits][0]}" if fits.shape else f"the type {array.dtype}"
            raise ValueError(f"it has other values than 0 and 1: {found}")
        array = array == 1
    starts = np.cumsum((0, *sizes[:-1]))
    some = np.logical_or.reduceat(array, starts, axis=-1)
    if not some.all():
        place = int(np.argwhere(~some)[0][-1])
        which = f" in component {place} of {len(sizes)}" if len(sizes) > 1 else ""
        raise ValueError(f"it allows no action{which}")
    return array


def _joined(parts: tuple[Any, ...], sizes: tuple[int, ...], lead: tuple[int, ...]) -> Masks:
    """The masks of the components side by side."""
    if len(parts) != len(sizes):
        raise ValueError(f"it has {len(parts)} arrays, not {len(sizes)}")
    arrays = [
        np.ones((*lead, size), np.bool_) if part is None else np.asarray(part)
        for part, size in zip(parts, sizes, strict=True)
    ]
    for place, (array, size) in enumerate(zip(arrays, sizes, strict=True)):
        if array.shape != (*lead, size):
            raise ValueError(f"its array {place} has the shape {array.shape}, not {(*lead, size)}")
    return np.concatenate(arrays, axis=-1)


def decide(
    setting: MaskSetting, offered: Iterable[MaskSource], space: spaces.Space[Any], name: str
) -> FoundMasks:
    """What is used of the masks that an environment offers.

    Args:
        setting: What is asked for.
        offered: The conventions that it has.
        space: The action space of one environment.
        name: Name for messages.

    Raises:
        EnvError: It does not have what is asked for by name, or its actions take no mask.
    """
    has = tuple(offered)
    places = " and ".join(_PLACES[source] for source in has)
    maskable = choices(space) is not None
    if setting is not None and setting != "auto":
        if setting not in has:
            instead = f"; it has {places}" if has else ' and no other masks; give "auto" or None'
            raise EnvError(f"masks={setting!r}: {name} has no {_PLACES[setting]}{instead}")
        if not maskable:
            raise EnvError(
                f"masks={setting!r}: masks are for Discrete and MultiDiscrete actions, {name} has"
                f" {type(space).__name__} actions"
            )
        return FoundMasks(setting)
    wanted = setting is not None and maskable
    if not has or wanted:
        return FoundMasks(has[0] if has else None, wanted=wanted)
    why = "masks is None"
    if not maskable:
        why = f"they are for Discrete and MultiDiscrete actions, not {type(space).__name__}"
    return FoundMasks(
        None, f"{name} offers action masks ({places}) that are not used: {why}", wanted=False
    )


class MaskReader:
    """Reads the masks of one environment.

    Args:
        env: The environment.
        setting: The convention to follow.
        name: Name for messages.

    Attributes:
        found: What was found; None before the first reset.
        source: The convention that is followed.
    """

    def __init__(self, env: AnyEnv, setting: MaskSetting, name: str) -> None:
        self._env = env
        self._setting = setting
        self._name = name
        self._sizes = choices(env.action_space) or ()
        self.found: FoundMasks | None = None
        self.source: MaskSource | None = None

    def offered(self, info: Mapping[str, Any]) -> list[MaskSource]:
        """The conventions that the environment has, given the info of its first reset."""
        env = self._env
        method = env.has_wrapper_attr(_METHOD) and callable(env.get_wrapper_attr(_METHOD))
        return _offered(method, MASK in info, env.observation_space)

    def read(self, obs: Any, info: Mapping[str, Any], when: str) -> Masks | None:
        """The mask (P,) that belongs to an observation, first to that of a reset; None: no mask.

        Raises:
            EnvError: The convention that is asked for is not there.
            EnvFault: There is no mask, or an unfit one; one line.
        """
        env = self._env
        if self.found is None:
            offered = self.offered(info)
            self.found = decide(self._setting, offered, env.action_space, self._name)
            self.source = self.found.source
        if self.source is None:
            self.found.require_none(info, self._name, when)
            return None
        try:
            if self.source == "action_masks":
                given = env.get_wrapper_attr(_METHOD)()
            else:
                given = (info if self.source == "info" else obs)[MASK]
        except KeyError:
            raise _missing(self._name, self.source, when) from None
        except Exception as error:
            raise EnvFault(
                f"{self._name}: action_masks() raised {named(error)} at {when}"
            ) from error
        try:
            return as_masks(given, self._sizes)
        except ValueError as error:
            raise _unfit(self._name, when, error) from error


class VectorMasks:
    """Reads the masks of a vector environment that somebody else made.

    Gymnasium's own ask their environments for `action_masks()`; another one may have such a method
    itself, which gives the masks of all its environments (N, P).

    Args:
        envs: The vector environment.
        setting: The convention to follow.
        name: Name for messages.

    Attributes:
        found: What was found; None before the first reset or step.
    """

    def __init__(self, envs: AnyVectorEnv, setting: MaskSetting, name: str) -> None:
        self._envs = envs
        self._setting = setting
        self._name = name
        self._sizes = choices(envs.single_action_space) or ()
        self._masks = np.ones((envs.num_envs, sum(self._sizes)), np.bool_)
        self._ask: Callable[[], Any] | None = None
        self.found: FoundMasks | None = None

    def read(
        self, observations: Any, infos: Mapping[str, Any], when: str, rows: NDArray[np.bool_]
    ) -> Masks | None:
        """Masks (N, P) after a reset or step; None: there are none.

        Args:
            observations: What the vector environment shows.
            infos: Its infos.
            when: For messages.
            rows: Environments that have a new mask; the others keep theirs.

        Raises:
            EnvError: The convention that is asked for is not there.
            EnvFault: A mask is missing or unfit; one line.
        """
        if self.found is None:
            self._ask = _asking(self._envs)
            space = self._envs.single_observation_space
            offered = _offered(self._ask is not None, MASK in infos, space)
            self.found = decide(self._setting, offered, self._envs.single_action_space, self._name)
        if self.found.source is None:
            self.found.require_none(infos, self._name, when)
            return None
        given = self._given(self.found.source, observations, infos, when, rows)
        places = np.flatnonzero(rows)
        if isinstance(given, np.ndarray) and given.dtype != object:
            with suppress(ValueError, IndexError):  # below it is found out which one is unfit
                self._masks[rows] = as_masks(given[rows], self._sizes, (len(places),))
                return self._masks.copy()
        for row in places:
            try:
                self._masks[row] = as_masks(given[row], self._sizes)
            except (ValueError, IndexError) as error:
                raise _unfit(f"environment {row} of {self._name}", when, error) from error
        return self._masks.copy()

    def free(self, rows: NDArray[np.bool_]) -> None:
        """Allow everything in environments whose next step only resets."""
        self._masks[rows] = True

    def _given(
        self,
        source: MaskSource,
        observations: Any,
        infos: Mapping[str, Any],
        when: str,
        rows: NDArray[np.bool_],
    ) -> Any:
        """The masks of all environments, unchecked; those of other rows may be anything."""
        if source == "action_masks" and self._ask is not None:
            return self._ask()
        if source == "observation":
            masks = observations[MASK]
            return np.concatenate(masks, axis=-1) if isinstance(masks, tuple) else masks
        present = np.asarray(infos.get(f"_{MASK}", np.full(len(rows), MASK in infos)), np.bool_)
        if not present[rows].all():
            row = int(np.flatnonzero(rows & ~present)[0])
            raise _missing(f"environment {row} of {self._name}", source, when)
        return infos.get(MASK)


def _asking(envs: AnyVectorEnv) -> Callable[[], Any] | None:
    """What asks all environments for `action_masks()`, if they or a wrapper have that method."""
    inner: Any = envs.unwrapped
    layer: Any = envs
    while layer is not None:  # the outermost counts
        own: Callable[[], Any] | None = getattr(layer, _METHOD, None)
        if own is not None and (layer is inner or hasattr(type(layer), _METHOD)):
            return own
        layer = None if layer is inner else layer.env
    # A worker of AsyncVectorEnv would end if it were asked for what is not there.
    known = isinstance(inner, SyncVectorEnv | AsyncVectorEnv)
    if known and all(inner.call("has_wrapper_attr", _METHOD)):
        return lambda: inner.call(_METHOD)
    return None


def _offered(method: bool, info: bool, space: spaces.Space[Any]) -> list[MaskSource]:
    """The conventions that there are, given whether method and info have masks."""
    there = (method, info, isinstance(space, spaces.Dict) and MASK in space.spaces)
    return [source for source, has in zip(SOURCES, there, strict=True) if has]


def _missing(name: str, source: MaskSource, when: str) -> EnvFault:
    return EnvFault(
        f"{name} gave no {_PLACES[source]} at {when}: it is needed at every reset and step"
    )


def _unfit(name: str, when: str, error: Exception) -> EnvFault:
    return EnvFault(f"{name} gave an unfit action mask at {when}: {one_line(error)}")
