"""Readers of the file formats that image sets come in; nothing read is trusted."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acktr.files import read_limited
from scripts.supervised.cifar_pickle import read_batch
from scripts.supervised.errors import SupervisedError

Arrays = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]
"""x_train, y_train, x_test, y_test."""

_CAP = 4 << 30
_BATCH_CAP = 1 << 28
_ENCRYPTED = 1
"""Bit of a zip member's flags."""
_NPZ_FIELDS = ("x_train", "y_train", "x_test", "y_test")
_IDX = (
    r"train-images[-.]idx3-ubyte(\.gz)?",
    r"train-labels[-.]idx1-ubyte(\.gz)?",
    r"t10k-images[-.]idx3-ubyte(\.gz)?",
    r"t10k-labels[-.]idx1-ubyte(\.gz)?",
)
_PICKLES = (r"data_batch_\d+", r"test_batch")
_BINARIES = (r"data_batch_\d+\.bin", r"test_batch\.bin")
_RECORD = 1 + 3 * 32 * 32


def read(path: Path) -> Arrays:
    """Read a .npz file, an idx folder (or one of its files) or a folder of CIFAR-10 batches.

    Raises:
        SupervisedError: It is none of these, or damaged.
        OSError: A file cannot be read or is too large.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.exists() and not path.is_file():
        raise SupervisedError(f"{path}: not a regular file; need a file or a folder")
    if path.suffix == ".npz":
        return _read_npz(path)
    if any(re.fullmatch(pattern, path.name) for pattern in _IDX):
        return _read_idx(path.parent)
    if not path.exists():
        raise SupervisedError(f"{path}: no such file or folder")
    raise SupervisedError(f"{path}: not a .npz file, an idx file or a folder of image batches")


def _read_folder(folder: Path) -> Arrays:
    if _named(folder, _IDX[0]):
        return _read_idx(folder)
    for patterns, reader in ((_BINARIES, _read_binary), (_PICKLES, read_batch)):
        train, test = (_named(folder, pattern) for pattern in patterns)
        if train and test:
            parts = [reader(file, read_limited(file, _BATCH_CAP)) for file in train]
            x_test, y_test = reader(test[0], read_limited(test[0], _BATCH_CAP))
            return (
                _planes_last(np.concatenate([x for x, _ in parts])),
                np.concatenate([y for _, y in parts]),
                _planes_last(x_test),
                y_test,
            )
    raise SupervisedError(
        f"{folder}: holds neither idx files (train-images-idx3-ubyte ...) "
        "nor CIFAR-10 batches (data_batch_1 ..., test_batch, with or without .bin)"
    )


def _named(folder: Path, pattern: str) -> list[Path]:
    return sorted(file for file in folder.iterdir() if re.fullmatch(pattern, file.name))


def _read_npz(path: Path) -> Arrays:
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive.infolist())
            if sum(member.file_size for member in archive.infolist()) > _CAP:
                raise SupervisedError(f"{path}: more than {_CAP >> 30} GiB when unpacked")
        with np.load(path, allow_pickle=False) as content:
            missing = [name for name in _NPZ_FIELDS if name not in content]
            if missing:
                raise SupervisedError(
                    f"{path}: no array {missing[0]}; {', '.join(_NPZ_FIELDS)} are needed"
                )
            arrays = [content[name] for name in _NPZ_FIELDS]
    except (SupervisedError, OSError, MemoryError):
        raise
    except Exception as error:  # a hostile archive can raise anything
        why = " ".join(str(error).split()) or type(error).__name__
        raise SupervisedError(f"{path}: not a .npz file of plain arrays: {why[:200]}") from error
    for name, array in zip(_NPZ_FIELDS, arrays, strict=True):
        if not isinstance(array, np.ndarray):
            raise SupervisedError(f"{path}: {name} is not an array; numpy.savez writes them")
    return arrays[0], arrays[1], arrays[2], arrays[3]


def _check_members(path: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    """Refuse what numpy does not write; zipfile cannot read all of it."""
    for member in members:
        if member.flag_bits & _ENCRYPTED:
            raise SupervisedError(
                f"{path}: {member.filename} is encrypted; write it with numpy.savez"
            )
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise SupervisedError(
                f"{path}: {member.filename} is compressed with zip method {member.compress_type};"
                " write it with numpy.savez or numpy.savez_compressed"
            )


def _read_idx(folder: Path) -> Arrays:
    found = []
    for pattern in _IDX:
        files = _named(folder, pattern)
        if not files:
            plain = pattern.replace("[-.]", "-").replace(r"(\.gz)?", "")
            raise SupervisedError(f"{folder}: {plain} (or with .gz) is missing")
        found.append(_idx_array(files[0]))
    return found[0], found[1], found[2], found[3]


def _idx_array(path: Path) -> NDArray[np.uint8]:
    """An array of unsigned bytes: 0, 0, 8, number of dimensions, sizes (big-endian), bytes."""
    data = read_limited(path, _CAP)
    if path.suffix == ".gz":
        data = _unpacked(path, data)
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise SupervisedError(f"{path}: not an idx file of unsigned bytes")
    head = 4 + 4 * data[3]
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, head, 4)]
    size = 1
    for length in shape:
        size *= length
    if data[3] == 0 or len(data) != head + size:
        raise SupervisedError(f"{path}: {len(data)} bytes do not fit an idx file of shape {shape}")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def _unpacked(path: Path, data: bytes) -> bytes:
    stream = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        unpacked = stream.decompress(data, _CAP)
    except zlib.error as error:
        raise SupervisedError(f"{path}: damaged gzip file: {error}") from error
    if not stream.eof:
        raise SupervisedError(f"{path}: truncated gzip file, or more than {_CAP >> 30} GiB in it")
    return unpacked


def _read_binary(path: Path, data: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    if not data or len(data) % _RECORD:
        raise SupervisedError(f"{path}: {len(data)} bytes; need a multiple of {_RECORD}")
    rows = np.frombuffer(data, np.uint8).reshape(-1, _RECORD)
    return rows[:, 1:], rows[:, 0].astype(np.int64)


def _planes_last(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Rows of red, green and blue plane -> images (N, 32, 32, 3)."""
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
