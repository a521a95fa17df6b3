"""Observations of Dict and Tuple spaces as arrays by name, and back.

The parts of such a space are named by the path to them, joined by slashes: ``camera``, ``0`` for
the first of a tuple, ``robot/arm`` for what lies deeper. A space of another kind is its own only
part, named by the empty text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
from gymnasium import spaces

from acktr.envs.vector import Array

Arrays = Array | dict[str, Array]
"""Observations by part: one array, or for Dict and Tuple spaces an array for each name."""

Part = TypeVar("Part")

_NESTED = (spaces.Dict, spaces.Tuple)


def is_nested(space: spaces.Space[Any]) -> bool:
    """Whether observations have parts: of Dict and Tuple spaces."""
    return isinstance(space, _NESTED)


def inner_spaces(space: spaces.Space[Any]) -> Iterable[tuple[Any, spaces.Space[Any]]]:
    """The spaces right inside of a Dict or Tuple space, with their keys, in its order."""
    if isinstance(space, spaces.Dict):
        return space.spaces.items()
    return enumerate(space.spaces) if isinstance(space, spaces.Tuple) else ()


def parts(space: spaces.Space[Any], path: str = "") -> dict[str, spaces.Space[Any]]:
    """The spaces inside of a Dict or Tuple space, however deep, by name; else the space itself."""
    if not is_nested(space):
        return {path: space}
    found: dict[str, spaces.Space[Any]] = {}
    for key, inner in inner_spaces(space):
        found |= parts(inner, f"{path}/{key}" if path else str(key))
    return found


def flat(space: spaces.Space[Any], observations: Any) -> Arrays:
    """Observations, of one environment or many, as arrays by part; plain ones as they are."""
    if not is_nested(space):
        return np.asarray(observations)
    return {name: np.asarray(value) for name, value in _leaves(space, observations, "")}


def _leaves(space: spaces.Space[Any], value: Any, path: str) -> Iterable[tuple[str, Any]]:
    if not is_nested(space):
        yield path, value
        return
    for key, inner in inner_spaces(space):
        yield from _leaves(inner, value[key], f"{path}/{key}" if path else str(key))


def nested(space: spaces.Space[Any], values: Mapping[str, Part], path: str = "") -> Any:
    """The inverse of :func:`flat`: a dict, a tuple, or the only part of another space.

    Args:
        space: The space.
        values: Arrays, or anything else, by the names of its parts.
        path: Where the space lies in a larger one.
    """
    if not is_nested(space):
        return values[path]
    made = {
        key: nested(inner, values, f"{path}/{key}" if path else str(key))
        for key, inner in inner_spaces(space)
    }
    return tuple(made.values()) if isinstance(space, spaces.Tuple) else made


def final_rows(space: spaces.Space[Any], shown: Any, which: Array) -> Arrays:
    """Final observations of some environments, by part, in the types of the space.

    Args:
        space: The space of one environment.
        shown: ``infos["final_obs"]``: an observation for each environment, or all of them as one
            batch.
        which: Numbers of the environments.
    """
    if not is_nested(space):
        rows = np.stack([np.asarray(shown[env]) for env in which])
        return rows.astype(space.dtype, copy=False)
    if isinstance(shown, dict | tuple):
        found = {name: array[which] for name, array in _leaves(space, shown, "")}
    else:
        each = [dict(_leaves(space, shown[env], "")) for env in which]
        found = {name: np.stack([one[name] for one in each]) for name in each[0]}
    return {name: found[name].astype(p.dtype, copy=False) for name, p in parts(space).items()}


def batched(space: spaces.Space[Any], observation: Any) -> tuple[Any, bool]:
    """An observation, or a batch of them, as a batch; and whether it was one alone.

    Raises:
        ValueError: It has another structure or shape than the space.
    """
    try:
        values = dict(_leaves(space, observation, ""))
    except (KeyError, IndexError, TypeError) as error:
        wanted = ", ".join(repr(name) for name in parts(space))
        raise ValueError(f"the observation must have the parts {wanted} of its space") from error
    arrays = {name: np.asarray(value) for name, value in values.items()}
    single: set[bool] = set()
    for name, part in parts(space).items():
        shape, array = tuple(part.shape or ()), arrays[name]
        if array.shape != shape and (array.shape[1:] != shape or array.ndim != len(shape) + 1):
            what = f"observation part {name!r}" if name else "observation"
            batch = str(("N", *shape)).replace("'N'", "N")
            raise ValueError(f"{what} has shape {array.shape}; {shape} or {batch} is needed")
        single.add(array.shape == shape)
    if len(single) > 1:
        raise ValueError("some parts of the observation are one sample and others a batch")
    alone = single.pop()
    if alone:
        arrays = {name: array[None] for name, array in arrays.items()}
    return nested(space, arrays), alone


def dense_finals(space: spaces.Space[Any], shown: Any, mask: Array, like: Any) -> Any:
    """Final observations shaped as a batch of observations, zero where no episode ended."""
    ended = np.flatnonzero(mask)
    rows, batch = final_rows(space, shown, ended), flat(space, like)
    if isinstance(rows, dict) and isinstance(batch, dict):
        dense = {name: _placed(rows[name], ended, array) for name, array in batch.items()}
        return nested(space, dense)
    assert isinstance(rows, np.ndarray) and isinstance(batch, np.ndarray)
    return _placed(rows, ended, batch)


def _placed(rows: Array, places: Array, like: Array) -> Array:
    dense = np.zeros_like(like)
    dense[places] = rows
    return dense
