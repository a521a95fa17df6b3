"""The two problems: images with labels, networks and losses."""

from __future__ import annotations

import hashlib
import itertools
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from acktr.envs import one_line
from acktr.kfac import BernoulliLoss, CategoricalLoss
from scripts.common import ScriptError
from scripts.supervised.settings import ProblemName

_FIELDS = ("x_train", "y_train", "x_test", "y_test")
_MAX_CLASSES = 1000
_CHANNELS = (32, 64, 64)
_DENSE = 128
_CHUNK = 2000
DAMAGES = (
    *(OSError, ValueError, EOFError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What NumPy and zipfile raise for a file that is no .npz, or a damaged or encrypted one."""


@dataclass(frozen=True)
class Dataset:
    """Images with labels, split into training and test part."""

    name: str
    """File name, or ``built-in``."""
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
    """Images of an .npz file with x_train, y_train, x_test and y_test, or the built-in ones.

    Raises:
        ScriptError: The file cannot be read or holds something else; one line.
    """
    if path is None:
        return _built_in_bumps() if problem == "autoencoder" else _built_in_gratings()
    if not path.is_file():
        raise ScriptError(f"{path}: cannot read: no such file")
    try:
        opened = np.load(path, allow_pickle=False)
        if not isinstance(opened, NpzFile):
            raise ValueError("it is a single array")
        with opened as file:
            x_train, y_train, x_test, y_test = (file[name] for name in _FIELDS)
    except KeyError as error:
        raise ScriptError(f"{path}: {one_line(error)}") from error
    except DAMAGES as error:
        raise ScriptError(f"{path}: cannot read as .npz: {one_line(error)}") from error
    x_train, x_test = (x[..., None] if x.ndim == 3 else x for x in (x_train, x_test))
    splits = ((x_train, y_train), (x_test, y_test))
    if not all(_fit(x, y) for x, y in splits) or x_train.shape[1:] != x_test.shape[1:]:
        described = ", ".join(f"{a.dtype} {a.shape}" for a in (x_train, y_train, x_test, y_test))
        raise ScriptError(
            f"{path}: images must be uint8 (N, height, width) or (N, height, width, 1 or 3), alike"
            f" in both parts, and labels N integers in 0..{_MAX_CLASSES - 1}; got {described}"
        )
    train, test = (y.reshape(-1).astype(np.int64) for y in (y_train, y_test))
    if test.max() > train.max():
        raise ScriptError(f"{path}: y_test has label {test.max()}, unknown in training")
    return Dataset(path.name, np.ascontiguousarray(x_train), train, x_test, test)


def _fit(x: NDArray[Any], y: NDArray[Any]) -> bool:
    """Whether these are images (N, H, W, C) and their labels."""
    images = x.dtype == np.uint8 and x.ndim == 4 and x.shape[3] in (1, 3) and x.size > 0
    labels = y.dtype.kind in "iu" and y.shape in ((len(x),), (len(x), 1))
    return images and labels and bool(y.min() >= 0 and y.max() < _MAX_CLASSES)


def _built_in_bumps() -> Dataset:
    """640 images (8, 8, 1): two soft bumps at random places, labelled by the quadrant of one."""
    rng = np.random.default_rng(0)
    centres = rng.uniform(0, 7, (640, 2, 2))
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(8), indexing="ij"), axis=-1)
    distance = np.square(grid[None, None] - centres[:, :, None, None]).sum(-1)
    pictures = np.exp(-distance / 3.0).max(axis=1)[..., None]
    labels = (centres[:, 0, 0] > 3.5) * 2 + (centres[:, 0, 1] > 3.5)
    return _divided(pictures, labels)


def _built_in_gratings() -> Dataset:
    """640 images (16, 16, 3): noisy gratings, labelled by one of four orientations."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 640)
    angle = labels * np.pi / 4
    rows, columns = np.meshgrid(np.arange(16), np.arange(16), indexing="ij")
    along = np.cos(angle)[:, None, None] * rows[None] + np.sin(angle)[:, None, None] * columns[None]
    phase = rng.uniform(0, 2 * np.pi, (640, 1, 1, 3))
    wave = 0.5 + 0.25 * np.sin(along[..., None] * 1.3 + phase)
    return _divided(wave + rng.normal(0, 0.15, wave.shape), labels)


def _divided(pictures: NDArray[np.float64], labels: NDArray[Any]) -> Dataset:
    x = np.clip(np.round(pictures * 255), 0, 255).astype(np.uint8)
    y = labels.astype(np.int64)
    return Dataset("built-in", x[:512], y[:512], x[512:], y[512:])


@dataclass(frozen=True)
class Split:
    """Images and labels."""

    images: Tensor
    """uint8, (N, C, H, W)."""
    labels: Tensor
    """int64, (N,)."""

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Problem:
    """A network to train on a data set."""

    name: ProblemName
    train: Split
    test: Split
    mean: Tensor
    """Channel means of the training images in [0, 1], (C, 1, 1)."""
    std: Tensor
    """Channel standard deviations, (C, 1, 1)."""
    classes: int
    widths: tuple[int, ...]
    """Layers of the encoder; not used by the convnet."""

    @property
    def loss(self) -> BernoulliLoss | CategoricalLoss:
        """The loss as K-FAC wants it; its value is that of :meth:`objective`."""
        return BernoulliLoss() if self.name == "autoencoder" else CategoricalLoss()

    def objective(self, output: Tensor, targets: Tensor) -> Tensor:
        """Mean over images of the summed binary, or of the categorical cross-entropy."""
        if self.name == "autoencoder":
            total = functional.binary_cross_entropy_with_logits(output, targets, reduction="sum")
            return total / len(output)
        return functional.cross_entropy(output, targets)

    def network(self) -> nn.Sequential:
        """A new network from the global random generator (torch's default initialisation)."""
        channels, height, width = self.train.images.shape[1:]
        if self.name == "autoencoder":
            return autoencoder(channels * height * width, self.widths)
        return convnet(channels, height, width, self.classes)

    def batch(self, split: Split, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some images."""
        images = split.images[index].float().div_(255)
        if self.name == "autoencoder":
            flat = images.flatten(1)
            return flat, flat
        return (images - self.mean) / self.std, split.labels[index]

    @torch.no_grad()
    def evaluate(self, network: nn.Module, split: Split, count: int | None = None) -> float:
        """Loss on a whole split, or on so many of its images, evenly spread over it."""
        count = len(split) if count is None else min(count, len(split))
        chosen = torch.arange(count) * len(split) // count
        total = torch.zeros((), dtype=torch.float64)
        for index in torch.split(chosen, _CHUNK):
            inputs, targets = self.batch(split, index)
            total += self.objective(network(inputs), targets).double() * len(inputs)
        return float(total) / count


def make_problem(name: ProblemName, data: Dataset, widths: Sequence[int]) -> Problem:
    """The problem with its data.

    Raises:
        ScriptError: The images are too small for the convnet.
    """
    height, width = data.x_train.shape[1:3]
    if name == "convnet" and min(height, width) < 8:
        raise ScriptError(f"convnet needs images of at least 8x8, got {height}x{width}")
    train, test = _split(data.x_train, data.y_train), _split(data.x_test, data.y_test)
    pixels = train.images.float().div_(255)
    mean = pixels.mean((0, 2, 3)).reshape(-1, 1, 1)
    std = pixels.std((0, 2, 3)).clamp_min(1e-3).reshape(-1, 1, 1)
    return Problem(name, train, test, mean, std, data.classes, tuple(widths))


def _split(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Split:
    return Split(torch.tensor(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))


def autoencoder(inputs: int, widths: Sequence[int]) -> nn.Sequential:
    """ReLU layers inputs-widths and back; linear code layer, logits as output."""
    sizes = [inputs, *widths, *reversed(widths[:-1]), inputs]
    linear_after = {len(widths) - 1, len(sizes) - 2}
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(before, after))
        if number not in linear_after:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def convnet(channels: int, height: int, width: int, classes: int) -> nn.Sequential:
    """Three 3x3 convolutions with ReLU and 2x2 max-pooling, a dense ReLU layer and logits."""
    layers: list[nn.Module] = []
    for after in _CHANNELS:
        layers += [nn.Conv2d(channels, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels, height, width = after, height // 2, width // 2
    layers += [nn.Flatten(), nn.Linear(channels * height * width, _DENSE), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(_DENSE, classes))


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices of batches without end: a permutation per epoch, without its incomplete rest."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]
