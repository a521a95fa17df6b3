"""Trees of tensors, arrays and plain values as bytes, and back; reading them runs no code.

The tree itself is JSON, in which a path stands where a tensor or an array was; those go to a
safetensors file under their paths. What is read may be hostile: sizes, counts, depth and digits are
bounded before anything of that size is made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

import numpy as np
import safetensors.torch
import torch

from acktr.files import DEEPEST, MOST_VALUES, parse_json

_HEADER_CAP = 16 << 20
_MOST_BITS = 256
_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool}
    | {torch.int64, torch.int32, torch.int16, torch.int8}
    | {torch.uint64, torch.uint32, torch.uint16, torch.uint8}
)


def encode(
    tree: Mapping[str, object], name: str, indent: int | None = None
) -> tuple[bytes, dict[str, torch.Tensor]]:
    """The JSON of a tree, and its tensors by path, which begin with ``name``.

    Raises:
        TypeError: It holds something else, or more than can be read back; the message names where.
    """
    tensors: dict[str, torch.Tensor] = {}
    data = json.dumps(_encode(tree, name, tensors, DEEPEST), indent=indent).encode()
    if data.count(b",") + data.count(b"[") + data.count(b"{") >= MOST_VALUES:
        raise TypeError(f"{name}: more than {MOST_VALUES} values; use arrays for many numbers")
    return data, tensors


def decode(data: bytes, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The tree of :func:`encode`; takes what it uses out of ``tensors``.

    Raises:
        Exception: Of any kind, for bytes that ``encode`` did not write.
    """
    tree = _decode(parse_json(data), tensors)
    if not isinstance(tree, dict):
        raise ValueError("not an object")
    return tree


def encode_tensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A safetensors file."""
    data: bytes = safetensors.torch.save(dict(tensors))
    return data


def decode_tensors(data: bytes) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file, on the CPU.

    Raises:
        Exception: Of any kind, for other bytes.
    """
    if int.from_bytes(data[:8], "little") > _HEADER_CAP:
        raise ValueError("header too large")
    # Clones lie in torch's own aligned memory: products of unaligned ones may round differently.
    return {name: value.clone() for name, value in safetensors.torch.load(data).items()}


def non_finite(tree: object, without: frozenset[str] = frozenset(), path: str = "") -> str | None:
    """Where a tree holds NaN or Inf; None if nowhere.

    Args:
        tree: A tree as :func:`encode` takes it.
        without: Paths that are not looked at.
        path: Where it is in a larger one.
    """
    if isinstance(tree, Mapping):
        inner: Iterator[tuple[Any, object]] = iter(tree.items())
    elif isinstance(tree, list | tuple):
        inner = enumerate(tree)
    else:
        return None if _finite(tree) else path
    places = ((f"{path}/{key}" if path else str(key), value) for key, value in inner)
    found = (non_finite(value, without, place) for place, value in places if place not in without)
    return next((place for place in found if place is not None), None)


def _finite(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, np.ndarray):
        return value.dtype.kind != "f" or bool(np.isfinite(value).all())
    return not isinstance(value, float | np.floating) or math.isfinite(value)


def _encode(node: object, path: str, tensors: dict[str, torch.Tensor], deepest: int) -> object:
    """The tree as JSON values; where a tensor or array was stands the path that names it."""
    if isinstance(node, Mapping | list | tuple) and deepest == 0:
        raise TypeError(f"{path:.200}: more than {DEEPEST} dicts and lists within each other")
    if isinstance(node, Mapping):
        for key in node:
            if type(key) is not str or key.startswith("$"):
                raise TypeError(f"{path}: key {key!r:.80} must be a str without $ at its beginning")
        # Quoted, so that the paths of two tensors never are the same.
        names = {key: quote(key, safe="", errors="surrogatepass") for key in node}
        return {
            key: _encode(node[key], f"{path}/{names[key]}", tensors, deepest - 1) for key in node
        }
    if isinstance(node, list | tuple):
        numbered = enumerate(node)
        return [_encode(item, f"{path}/{place}", tensors, deepest - 1) for place, item in numbered]
    if isinstance(node, torch.Tensor):
        tensors[path] = _plain(node, path)
        return {"$tensor": path}
    if isinstance(node, np.ndarray):
        tensors[path] = _from_array(node, path)
        return {"$array": path}
    value = node.item() if isinstance(node, np.bool_ | np.integer | np.floating) else node
    if type(value) is int and value.bit_length() > _MOST_BITS:
        raise TypeError(f"{path}: an integer of more than {_MOST_BITS} bits cannot be saved")
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{path}: a {type(node).__name__} cannot be saved")


def _from_array(array: np.ndarray[Any, Any], path: str) -> torch.Tensor:
    try:
        native = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
        return _plain(torch.from_numpy(native), path)
    except (TypeError, ValueError):
        raise TypeError(f"{path}: an array of {array.dtype} cannot be saved") from None


def _plain(tensor: torch.Tensor, path: str) -> torch.Tensor:
    """A contiguous CPU copy that shares memory with nothing."""
    if tensor.layout != torch.strided or tensor.dtype not in _DTYPES or tensor.is_meta:
        raise TypeError(f"{path}: a {tensor.layout} {tensor.dtype} tensor cannot be saved")
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _decode(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Inverse of ``_encode``; takes what it uses out of ``tensors``, so nothing is used twice."""
    if isinstance(node, list):
        return [_decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    if node.keys() == {"$tensor"}:
        return tensors.pop(node["$tensor"])
    if node.keys() == {"$array"}:
        return tensors.pop(node["$array"]).numpy()
    if node.keys() == {"$tuple"}:  # as earlier versions wrote
        return _decode(node["$tuple"], tensors)
    if any(key.startswith("$") for key in node):
        raise ValueError("an unknown tag")
    return {key: _decode(value, tensors) for key, value in node.items()}
