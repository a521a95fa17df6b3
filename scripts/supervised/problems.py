"""The two networks, their losses, and image sets as tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from acktr.kfac import BernoulliLoss, CategoricalLoss
from scripts.supervised.data import Dataset
from scripts.supervised.errors import SupervisedError
from scripts.supervised.settings import ProblemName

_CHANNELS = (32, 64, 64)
_DENSE = 128
_CHUNK = 2000
_MOST_PARAMETERS = 1 << 28
"""Of the largest network: 1 GiB in float32."""


@dataclass(frozen=True)
class Split:
    """Images and labels on the device."""

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
        chosen = torch.arange(count, device=split.images.device) * len(split) // count
        total = torch.zeros((), dtype=torch.float64, device=split.images.device)
        for index in torch.split(chosen, _CHUNK):
            inputs, targets = self.batch(split, index)
            total += self.objective(network(inputs), targets).double() * len(inputs)
        return float(total) / count


def make_problem(
    name: ProblemName, data: Dataset, widths: Sequence[int], device: torch.device
) -> Problem:
    """The problem with its data on a device.

    Raises:
        SupervisedError: The images are too small for the convnet, or the network is too large.
    """
    height, width = data.x_train.shape[1:3]
    if name == "convnet" and min(height, width) < 8:
        raise SupervisedError(f"convnet needs images of at least 8x8, got {height}x{width}")
    train = _split(data.x_train, data.y_train, device)
    pixels = train.images.float().div_(255)
    mean = pixels.mean((0, 2, 3)).reshape(-1, 1, 1)
    std = pixels.std((0, 2, 3)).clamp_min(1e-3).reshape(-1, 1, 1)
    test = _split(data.x_test, data.y_test, device)
    problem = Problem(name, train, test, mean, std, data.classes, tuple(widths))
    with torch.device("meta"):  # sizes alone: nothing is allocated and no random number drawn
        parameters = sum(p.numel() for p in problem.network().parameters())
    if parameters > _MOST_PARAMETERS:
        smaller = "smaller --widths or images" if name == "autoencoder" else "smaller images"
        raise SupervisedError(
            f"{name} would have {parameters:,} parameters, at most {_MOST_PARAMETERS:,} fit:"
            f" choose {smaller}"
        )
    return problem


def _split(images: NDArray[np.uint8], labels: NDArray[np.int64], device: torch.device) -> Split:
    x = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
    return Split(x.to(device), torch.tensor(labels).to(device))


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
