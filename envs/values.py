"""Values of plain Python and NumPy as trees that checkpoints and processes can hold, and back."""

from __future__ import annotations

import io
import json
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from acktr.envs.vector import Array

Tree = dict[str, Any]
"""What a checkpoint can hold: dicts, lists, arrays, numbers, text and None."""

_DEPTH = 16
"""Most levels of containers in each other."""
_DIGITS = 40
"""Most characters of a number in words: an integer of 128 bits has 39."""


def encoded(value: Any, depth: int = 0) -> Any:
    """A value of plain Python and NumPy, with its types, as a tree.

    Raises:
        TypeError: There is something else in it, or too many levels.
    """
    if depth > _DEPTH:
        raise TypeError(f"more than {_DEPTH} levels")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if type(value) in (int, float):
        return _number(value)
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        return {"scalar": np.array(value)} if isinstance(value, np.generic) else value.copy()
    if isinstance(value, Mapping):
        if any(type(key) is not str for key in value):
            raise TypeError("a dict with other keys than text")
        return {"dict": {escaped(key): encoded(value[key], depth + 1) for key in value}}
    for name, kind in _SEQUENCES.items():
        if type(value) is kind:
            return {name: [encoded(each, depth + 1) for each in value]}
    raise TypeError(f"a {type(value).__name__}, which is no number, text, array or container")


def _number(value: int | float) -> Any:
    """A number, in words where JSON or a checkpoint has no place for it."""
    fits = -(2**63) <= value < 2**63 if isinstance(value, int) else math.isfinite(value)
    return value if fits else {type(value).__name__: str(value)}


def decoded(node: Any, depth: int = 0) -> Any:
    """The value of a tree, which is not trusted.

    Raises:
        ValueError: No :func:`encoded` made it.
    """
    if depth > _DEPTH:
        raise ValueError(f"more than {_DEPTH} levels")
    if node is None or isinstance(node, bool | int | float | str):
        return node
    if isinstance(node, np.ndarray):
        return _checked(node).copy()
    if not isinstance(node, dict) or len(node) != 1:
        raise ValueError(f"a {type(node).__name__} that is no value")
    ((kind, inside),) = node.items()
    if kind == "dict" and isinstance(inside, dict):
        return {_unescaped(key): decoded(each, depth + 1) for key, each in inside.items()}
    if kind in _SEQUENCES and isinstance(inside, list):
        return _SEQUENCES[kind](decoded(each, depth + 1) for each in inside)
    if kind == "scalar" and isinstance(inside, np.ndarray) and inside.shape == ():
        return _checked(inside)[()]
    if isinstance(inside, str) and len(inside) <= _DIGITS and kind in _NUMBERS:
        return _NUMBERS[kind](inside)
    raise ValueError(f"an unknown kind of value {kind!s:.40}")


def _checked(array: Array) -> Array:
    if array.dtype.kind not in "biuf":
        raise ValueError(f"an array of {array.dtype}")
    return array


_NUMBERS: dict[str, Any] = {"int": int, "float": float}
_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "deque": deque}


def escaped(key: str) -> str:
    """A key that a checkpoint takes: it has no $ at its beginning."""
    return f"\\{key}" if key.startswith(("$", "\\")) else key


def _unescaped(key: str) -> str:
    return key.removeprefix("\\")


def require_like(value: Any, template: Any, where: str) -> None:
    """Raise ValueError unless a value can stand for another one of the same variable.

    Arrays must have its shape and kind of numbers, and those with a fraction be finite where its
    are; dicts must have its keys, and a number must be one. Anything can stand for None.
    """
    if isinstance(template, Mapping):
        if not isinstance(value, Mapping) or value.keys() != template.keys():
            raise ValueError(f"{where} has other entries than {', '.join(template)}")
        for key in template:
            require_like(value[key], template[key], key)
    elif _has_axes(template) and isinstance(value, np.ndarray):
        _require_array(value, template, where)
    elif _has_axes(template):  # MountainCar's state is an array or a tuple
        if not isinstance(value, tuple | list) or len(value) != len(template):
            raise ValueError(f"{where} is not {len(template)} numbers")
    elif template is not None:
        fits = _is_number(value) if _is_number(template) else isinstance(value, type(template))
        if not fits:
            raise ValueError(f"{where} is a {type(value).__name__}")
        if isinstance(template, np.ndarray):
            _require_array(np.asarray(value), template, where)


def _has_axes(value: Any) -> bool:
    """Whether something is an array of several numbers."""
    return isinstance(value, np.ndarray) and value.ndim > 0


def _is_number(value: Any) -> bool:
    """Whether something is one number; sums make NumPy's of arrays without axes."""
    return isinstance(value, bool | int | float | np.generic | np.ndarray) and np.ndim(value) == 0


def _require_array(value: Array, template: Array, where: str) -> None:
    if value.shape != template.shape or value.dtype.kind != template.dtype.kind:
        raise ValueError(
            f"{where} has the shape {value.shape} and the type {value.dtype}, not"
            f" {template.shape} and {template.dtype}"
        )
    if np.isfinite(template).all() and not np.isfinite(value).all():
        raise ValueError(f"{where} is not finite")


def to_bytes(state: Any) -> bytes:
    """A tree as bytes, for a process that trusts this one."""
    arrays: dict[str, Any] = {}
    text = json.dumps(_packed(state, arrays)).encode()
    file = io.BytesIO()
    arrays["tree"] = np.frombuffer(text, np.uint8)
    np.savez(file, **arrays)
    return file.getvalue()


def from_bytes(data: bytes) -> Any:
    """Inverse of :func:`to_bytes`."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return _unpacked(json.loads(arrays["tree"].tobytes()), arrays)


def _packed(state: Any, arrays: dict[str, Array]) -> Any:
    """A tree as JSON values, whose arrays are put into ``arrays`` by a name each."""
    if isinstance(state, dict):
        return {key: _packed(each, arrays) for key, each in state.items()}
    if isinstance(state, list):
        return [_packed(each, arrays) for each in state]
    if isinstance(state, np.ndarray):
        name = f"a{len(arrays)}"
        arrays[name] = state
        return {"$array": name}
    return state


def _unpacked(node: Any, arrays: Mapping[str, Array]) -> Any:
    """Inverse of :func:`_packed`."""
    if isinstance(node, list):
        return [_unpacked(each, arrays) for each in node]
    if not isinstance(node, dict):
        return node
    if node.keys() == {"$array"}:
        return arrays[node["$array"]]
    return {key: _unpacked(each, arrays) for key, each in node.items()}
