"""Labelled images from a file or folder, or a small built-in set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acktr.files import reason
from scripts.supervised import formats
from scripts.supervised.errors import SupervisedError

_FIELDS = ("x_train", "y_train", "x_test", "y_test")
_MAX_CLASSES = 1000


@dataclass(frozen=True)
class Dataset:
    """Images with labels, split into training and test part."""

    name: str
    """File or folder name, or ``built-in``."""
    x_train: NDArray[np.uint8]
    """Training images (N, H, W, C), 0 to 255."""
    y_train: NDArray[np.int64]
    """Training labels (N,), from 0."""
    x_test: NDArray[np.uint8]
    """Test images (M, H, W, C)."""
    y_test: NDArray[np.int64]
    """Test labels (M,)."""

    @property
    def built_in(self) -> bool:
        """Whether this is the small synthetic set."""
        return self.name == "built-in"

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.y_train.max()) + 1

    def digest(self) -> str:
        """SHA-256 of all images and labels."""
        found = hashlib.sha256()
        for field in _FIELDS:
            array = np.ascontiguousarray(getattr(self, field))
            found.update(f"{field}{array.shape}".encode())
            found.update(array.data)
        return found.hexdigest()


def load(path: Path | None, problem: str) -> Dataset:
    """Images of a path, or the built-in ones of a problem if there is none.

    Known are .npz files with x_train, y_train, x_test and y_test, folders with the four files of
    the idx format (or one of these files), and folders with CIFAR-10's Python or binary batches.

    Raises:
        SupervisedError: The path cannot be read or holds something else; one line.
    """
    if path is None:
        return _built_in_bumps() if problem == "autoencoder" else _built_in_gratings()
    try:
        arrays = formats.read(path)
    except OSError as error:
        raise SupervisedError(f"{path}: cannot read: {reason(error)}") from error
    except MemoryError as error:
        raise SupervisedError(f"{path}: too large for this machine's memory") from error
    return _checked(path, arrays)


def _checked(path: Path, arrays: tuple[NDArray[Any], ...]) -> Dataset:
    x_train, y_train, x_test, y_test = arrays
    images = [_images(path, name, x) for name, x in (("x_train", x_train), ("x_test", x_test))]
    if images[0].shape[1:] != images[1].shape[1:]:
        raise SupervisedError(
            f"{path}: training images have shape {images[0].shape[1:]}, "
            f"test images {images[1].shape[1:]}"
        )
    labels = [
        _labels(path, name, y, len(x))
        for (name, y), x in zip((("y_train", y_train), ("y_test", y_test)), images, strict=True)
    ]
    if labels[1].max() > labels[0].max():
        raise SupervisedError(f"{path}: y_test has label {labels[1].max()}, unknown in training")
    return Dataset(path.name, images[0], labels[0], images[1], labels[1])


def _images(path: Path, name: str, x: NDArray[Any]) -> NDArray[np.uint8]:
    """Images as uint8 (N, H, W, C)."""
    if x.dtype != np.uint8:
        raise SupervisedError(f"{path}: {name} must be uint8 images, got {x.dtype}")
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or x.shape[3] not in (1, 3) or x.size == 0:
        raise SupervisedError(
            f"{path}: {name} must have shape (N, height, width) or (N, height, width, 1 or 3), "
            f"got {x.shape}"
        )
    return np.ascontiguousarray(x, dtype=np.uint8)


def _labels(path: Path, name: str, y: NDArray[Any], count: int) -> NDArray[np.int64]:
    if y.dtype.kind not in "iu" or y.shape not in ((count,), (count, 1)):
        raise SupervisedError(
            f"{path}: {name} must be {count} integers, got {y.dtype} of shape {y.shape}"
        )
    if y.min() < 0 or y.max() >= _MAX_CLASSES:
        raise SupervisedError(
            f"{path}: {name} must lie in 0..{_MAX_CLASSES - 1}, got {y.min()}..{y.max()}"
        )
    return y.reshape(count).astype(np.int64)


def _built_in_bumps() -> Dataset:
    """640 images (8, 8, 1): two soft bumps at random places, labelled by the quadrant of one."""
    rng = np.random.default_rng(0)
    centres = rng.uniform(0, 7, (640, 2, 2))
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(8), indexing="ij"), axis=-1)
    distance = np.square(grid[None, None] - centres[:, :, None, None]).sum(-1)
    pictures = np.exp(-distance / 3.0).max(axis=1)[..., None]
    labels = (centres[:, 0, 0] > 3.5) * 2 + (centres[:, 0, 1] > 3.5)
    return _split(pictures, labels)


def _built_in_gratings() -> Dataset:
    """640 images (16, 16, 3): noisy gratings, labelled by one of four orientations."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 640)
    angle = labels * np.pi / 4
    rows, columns = np.meshgrid(np.arange(16), np.arange(16), indexing="ij")
    along = np.cos(angle)[:, None, None] * rows[None] + np.sin(angle)[:, None, None] * columns[None]
    phase = rng.uniform(0, 2 * np.pi, (640, 1, 1, 3))
    wave = 0.5 + 0.25 * np.sin(along[..., None] * 1.3 + phase)
    return _split(wave + rng.normal(0, 0.15, wave.shape), labels)


def _split(pictures: NDArray[np.float64], labels: NDArray[Any]) -> Dataset:
    x = np.clip(np.round(pictures * 255), 0, 255).astype(np.uint8)
    y = labels.astype(np.int64)
    return Dataset("built-in", x[:512], y[:512], x[512:], y[512:])
