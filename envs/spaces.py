"""Which observation and action spaces are supported, and checks of actions against them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from acktr.envs.errors import EnvError, EnvFault
from acktr.envs.nested import inner_spaces, is_nested, parts

OBSERVATIONS = (
    "Box (numbers, or pictures), Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple of these"
)
ACTIONS = "Discrete, Box (float, 1-D or more), MultiDiscrete (1-D) and MultiBinary (1-D)"
SpaceFacts = Mapping[str, Mapping[str, str]]
"""What is kept of an environment's spaces: of each its text for people, and a hash of it all."""


def check_spaces(observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    """Check that a single environment's spaces are supported.

    Raises:
        EnvError: one line with the space and what is supported.
    """
    for what, space, problem, supported in (
        ("observation", observation_space, _observation_problem(observation_space), OBSERVATIONS),
        ("action", action_space, _action_problem(action_space), ACTIONS),
    ):
        if problem is not None:
            raise EnvError(
                f"unsupported {what} space {_show(space)}: {problem}; supported are {supported}"
            )


def check_actions(actions: Any, space: spaces.Space[Any], num_envs: int) -> NDArray[Any]:
    """Check a batch of actions and return it in the dtype that the environments expect.

    Box actions must be finite; they are not clipped to the bounds.

    Args:
        actions: array of shape (num_envs, *action shape).
        space: a supported action space of a single environment.
        num_envs: number of environments.

    Raises:
        EnvFault: wrong shape or dtype, a value out of range, or not finite.
    """
    array = np.asarray(actions)
    shape = (num_envs, *(space.shape or ()))
    if array.shape != shape:
        raise EnvFault(f"actions must have shape {shape} for {_show(space)}, got {array.shape}")
    if isinstance(space, spaces.Box):
        if array.dtype.kind != "f":
            raise EnvFault(f"actions for {_show(space)} must be floats, got {array.dtype}")
        _report_bad(np.isfinite(array), array, space, "a finite number")
        return array.astype(space.dtype, copy=False)
    kinds = "iub" if isinstance(space, spaces.MultiBinary) else "iu"
    start, limit = integers(space) or (0, 0)
    if array.dtype.kind not in kinds:
        raise EnvFault(f"actions for {_show(space)} must be integers, got {array.dtype}")
    _report_bad((array >= start) & (array < limit), array, space, "in range")
    return array.astype(space.dtype, copy=False)


def integers(space: spaces.Space[Any]) -> tuple[Any, Any] | None:
    """The least integers of a space, and those above the largest; None for a Box."""
    if isinstance(space, spaces.Discrete):
        return space.start, space.start + space.n
    if isinstance(space, spaces.MultiDiscrete):
        return space.start, space.start + space.nvec
    return (0, 2) if isinstance(space, spaces.MultiBinary) else None


def bounds(space: spaces.Space[Any]) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """The bounds of a Box; None for other spaces, and where its type alone keeps to them."""
    if not isinstance(space, spaces.Box):
        return None
    low, high = np.asarray(space.low), np.asarray(space.high)
    least: Any = -np.inf
    most: Any = np.inf
    if space.dtype.kind in "iu":
        least, most = np.iinfo(space.dtype).min, np.iinfo(space.dtype).max
    free = space.dtype.kind == "b" or ((low <= least) & (high >= most)).all()
    return None if free else (low, high)


def space_facts(
    observation_space: spaces.Space[Any], action_space: spaces.Space[Any]
) -> dict[str, dict[str, str]]:
    """What is kept of a single environment's spaces, as JSON values of a bounded size.

    Spaces are the same if kind, shape, type, numbers of choices, first choices and bounds are, of
    all parts in their order, in which networks take them.
    """
    return {
        kind: {"text": _show(space), "sha256": _hash(json.dumps(_canonical(space)).encode())}
        for kind, space in (("observation", observation_space), ("action", action_space))
    }


def space_difference(ours: SpaceFacts | None, theirs: SpaceFacts) -> str | None:
    """A line that says which space of an environment is another than an agent's; None if none.

    Args:
        ours: The agent's; None where an earlier version did not write them.
        theirs: The environment's.
    """
    if ours is None:
        return None
    for kind in ("observation", "action"):
        our, their = ours[kind], theirs[kind]
        if our["sha256"] != their["sha256"]:
            unseen = ", with other numbers or parts" if our["text"] == their["text"] else ""
            return (
                f"the agent's {kind} space is {our['text']}, the environment's"
                f" {their['text']}{unseen}"
            )
    return None


def _canonical(space: spaces.Space[Any]) -> list[Any]:
    """A space as JSON values that are equal for equal spaces alone."""
    if is_nested(space):
        kind = "Dict" if isinstance(space, spaces.Dict) else "Tuple"
        return [kind, [[str(key), _canonical(part)] for key, part in inner_spaces(space)]]
    kinds = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
    kind = next((each.__name__ for each in kinds if isinstance(space, each)), repr(space))
    ends = (space.low, space.high) if isinstance(space, spaces.Box) else integers(space) or ()
    return [kind, list(space.shape or ()), str(space.dtype), *map(_number_hash, ends)]


def _number_hash(values: Any) -> str:
    """The hash of numbers, whatever the machine's order of bytes and the sign of zeros."""
    array = np.asarray(values)
    array = np.where(array == 0, np.zeros((), array.dtype), array)
    return _hash(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _report_bad(
    good: NDArray[np.bool_], array: NDArray[Any], space: spaces.Space[Any], wanted: str
) -> None:
    if good.all():
        return
    where = tuple(int(i) for i in np.argwhere(~good)[0])
    raise EnvFault(
        f"action {array[where]} of environment {where[0]} is not {wanted} for {_show(space)}"
    )


def _observation_problem(space: spaces.Space[Any]) -> str | None:
    if not is_nested(space):
        return _part_problem(space)
    inside = parts(space)
    if not inside:
        return "it has no parts"
    for name, part in inside.items():
        if problem := _part_problem(part):
            return f"part {name!r} is {_show(part)}: {problem}"
    return _names_problem(space)


def _names_problem(space: spaces.Space[Any]) -> str | None:
    """What is wrong with the keys of a Dict space; checkpoints keep ``$`` for themselves."""
    inner = list(space.spaces) if isinstance(space, spaces.Tuple) else []
    if isinstance(space, spaces.Dict):
        inner = list(space.spaces.values())
        for key in space.spaces:
            if not isinstance(key, str) or not key or key.startswith("$") or "/" in key:
                return f"key {key!r} is not a text without / that begins with another sign than $"
    return next(filter(None, map(_names_problem, inner)), None)


def _part_problem(space: spaces.Space[Any]) -> str | None:
    if isinstance(space, spaces.Discrete):
        return None
    if not isinstance(space, spaces.Box | spaces.MultiDiscrete | spaces.MultiBinary):
        return "this kind is not supported"
    if np.dtype(space.dtype).kind not in "fiub":
        return f"its dtype {space.dtype} is not a number"
    if 0 in space.shape:
        return "it has no elements"
    return None


def _action_problem(space: spaces.Space[Any]) -> str | None:
    if isinstance(space, spaces.Box):
        return _box_action_problem(space)
    if isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
        return None if len(space.shape) == 1 and space.shape[0] else "it is not 1-D"
    return None if isinstance(space, spaces.Discrete) else "this kind is not supported"


def _box_action_problem(space: spaces.Box) -> str | None:
    if np.dtype(space.dtype).kind != "f":
        return f"its dtype {space.dtype} is not a float"
    if not space.shape or 0 in space.shape:
        return "it has no axes or no elements"
    if np.isnan(space.low).any() or np.isnan(space.high).any():
        return "a bound is NaN"
    if (space.low > space.high).any():
        return "a lower bound is above its upper bound"
    return None


def _show(space: object) -> str:
    text = " ".join(repr(space).split())
    return text if len(text) <= 200 else text[:197] + "..."
