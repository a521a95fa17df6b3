"""CIFAR-10's Python batches, read without running anything that the pickle names.

Every name in the pickle is replaced by a function or class of this module that only stores what it
gets; NumPy itself sees no more than a checked shape and a byte string.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.supervised.errors import SupervisedError

_PIXELS = 3 * 32 * 32


class _Array:
    """Stands for a NumPy array; keeps its state."""

    def __init__(self, *_arguments: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Dtype:
    """Stands for a NumPy dtype; keeps its code."""

    def __init__(self, code: object = None, *_flags: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Byte order and flags do not matter for bytes."""


def _latin1(text: object, encoding: object = None) -> bytes:
    """Stands for ``_codecs.encode``, with which Python 3 writes bytes in old protocols."""
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("text that is not latin1")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """The stand-in for a name; nothing is ever imported."""
        stand_in = _ALLOWED.get((module_name, global_name))
        if stand_in is None:
            name = "".join(c if c.isprintable() else "?" for c in f"{module_name}.{global_name}")
            raise pickle.UnpicklingError(f"it names {name[:80]}, only NumPy arrays are allowed")
        return stand_in


def read_batch(path: Path, data: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Rows of pixels (N, 3072) and labels (N,) of one batch.

    Raises:
        SupervisedError: It is no such batch, or names anything but NumPy arrays.
    """
    try:
        content = _Reader(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a hostile pickle can raise anything
        why = " ".join(str(error).split()) or type(error).__name__
        raise SupervisedError(f"{path}: not a CIFAR-10 batch: {why[:200]}") from error
    if not isinstance(content, dict):
        raise SupervisedError(f"{path}: not a CIFAR-10 batch: no dictionary in it")
    rows = _rows(content.get(b"data", content.get("data")))
    labels = content.get(b"labels", content.get("labels"))
    if rows is None or len(rows) == 0:
        raise SupervisedError(
            f"{path}: not a CIFAR-10 batch: no uint8 data of shape (N, {_PIXELS})"
        )
    if not isinstance(labels, list) or len(labels) != len(rows):
        raise SupervisedError(f"{path}: not a CIFAR-10 batch: no list of {len(rows)} labels")
    if not all(type(label) is int and 0 <= label < 10 for label in labels):
        raise SupervisedError(f"{path}: not a CIFAR-10 batch: labels must be integers 0..9")
    return rows, np.array(labels, dtype=np.int64)


def _rows(array: object) -> NDArray[np.uint8] | None:
    """The array if its state is (version, shape, dtype, in Fortran order, bytes) and fits."""
    state = array.state if isinstance(array, _Array) else None
    if not isinstance(state, tuple) or len(state) != 5:
        return None
    _, shape, dtype, fortran, raw = state
    if not isinstance(dtype, _Dtype) or dtype.code not in ("u1", b"u1"):
        return None
    if not isinstance(raw, bytes) or len(raw) % _PIXELS or fortran is not False:
        return None
    if shape != (len(raw) // _PIXELS, _PIXELS):
        return None
    return np.frombuffer(raw, np.uint8).reshape(-1, _PIXELS)
