"""The problems of the race: an autoencoder, a conv net and a causal character transformer."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from acktr.kfac import BernoulliLoss, CategoricalLoss
from scripts.common import ScriptError
from scripts.supervised.problems import autoencoder, batches, convnet, load

Pair = tuple[Tensor, Tensor]
"""Inputs and targets."""
Loss = BernoulliLoss | CategoricalLoss

PROBLEMS = ("autoencoder", "convnet", "transformer")
MEASURED = 2000
"""Images of each split that losses are measured on, evenly spread."""
_WINDOWS = 200
"""The same for windows of text."""
_WIDTHS, _SMALL_WIDTHS = (500, 250, 100, 30), (64, 32, 8)
_BATCH, _SMALL_BATCH = {"autoencoder": 500, "convnet": 128, "transformer": 32}, 64
_LENGTH = 64
_TEST_PART = 10
"""The last 1/k of a text is its test part."""


class Problem(Protocol):
    """A network, its data and its loss."""

    name: str
    source: str
    """Name of the data's file, or ``built-in``."""
    data: str
    """SHA-256 of the data."""
    batch: int
    loss: Loss
    """The objective, as K-FAC wants it."""
    train: Pair
    """What training losses are measured on."""
    test: Pair

    @abstractmethod
    def network(self) -> nn.Module:
        """A new network from the global random generator."""

    @abstractmethod
    def stream(self, seed: int) -> Iterator[Pair]:
        """Batches without end."""


class Images:
    """Images for the autoencoder 784-500-250-100-30, or for the conv net of scripts.supervised."""

    def __init__(self, name: str, path: Path | None) -> None:
        images = load(path, name)
        self.name, self.data, self.source = name, images.digest(), images.name
        self.batch = _SMALL_BATCH if images.built_in else _BATCH[name]
        if len(images.x_train) < self.batch:
            raise ScriptError(f"{images.name}: less than a batch of {self.batch} training images")
        self._widths = _SMALL_WIDTHS if images.built_in else _WIDTHS
        self._images, self._classes = torch.tensor(images.x_train), images.classes
        self._labels = torch.tensor(images.y_train)
        self.loss: Loss = BernoulliLoss() if name == "autoencoder" else CategoricalLoss()
        pixels = self._images.float().div_(255).flatten(0, 2)
        self._mean, self._std = pixels.mean(0), pixels.std(0).clamp_min(1e-3)
        self.train = self._spread(self._images, self._labels)
        self.test = self._spread(torch.tensor(images.x_test), torch.tensor(images.y_test))

    def network(self) -> nn.Module:
        """ReLU layers with a linear code, or three convolutions and two dense layers."""
        height, width, channels = self._images.shape[1:]
        if self.name == "autoencoder":
            return autoencoder(channels * height * width, self._widths)
        return convnet(channels, height, width, self._classes)

    def stream(self, seed: int) -> Iterator[Pair]:
        """A permutation of all training images per epoch, in batches."""
        for index in batches(len(self._images), self.batch, seed):
            yield self._pair(self._images[index], self._labels[index])

    def _spread(self, images: Tensor, labels: Tensor) -> Pair:
        count = min(MEASURED, len(images))
        index = torch.arange(count) * len(images) // count
        return self._pair(images[index], labels[index])

    def _pair(self, images: Tensor, labels: Tensor) -> Pair:
        values = images.float().div_(255)
        if self.name == "autoencoder":
            flat = values.flatten(1)
            return flat, flat
        return ((values - self._mean) / self._std).permute(0, 3, 1, 2).contiguous(), labels


class Characters(nn.Module):
    """A causal transformer over characters, of torch's own encoder layers without dropout."""

    def __init__(self, symbols: int, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.symbols = nn.Embedding(symbols, width)
        self.places = nn.Embedding(_LENGTH, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, symbols)

    def forward(self, text: Tensor) -> Tensor:
        """Logits (N, T, symbols) of the next character at every place of (N, T)."""
        length = text.shape[1]
        hidden = self.symbols(text) + self.places(torch.arange(length).expand_as(text))
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        logits: Tensor = self.head(self.encoder(hidden, mask=mask, is_causal=True))
        return logits


class Text:
    """The next character in windows of a text, which its last tenth tests."""

    def __init__(self, path: Path | None) -> None:
        text = _documentation() if path is None else _read(path)
        alphabet = sorted(set(text))
        number = {symbol: at for at, symbol in enumerate(alphabet)}
        codes = torch.tensor([number[symbol] for symbol in text])
        if len(codes) < 2 * _TEST_PART * (_LENGTH + 1):
            raise ScriptError(f"{path}: a text needs {2 * _TEST_PART * (_LENGTH + 1)} characters")
        self.name, self.source = "transformer", "built-in" if path is None else path.name
        self.data = hashlib.sha256(text.encode()).hexdigest()
        self.batch = _BATCH[self.name]
        self.loss: Loss = CategoricalLoss()
        cut = len(codes) - len(codes) // _TEST_PART
        self._codes, self._symbols = codes[:cut], len(alphabet)
        self.train, self.test = _spread_windows(codes[:cut]), _spread_windows(codes[cut:])

    def network(self) -> nn.Module:
        """Two encoder layers of width 64 on windows of 64 characters."""
        return Characters(self._symbols)

    def stream(self, seed: int) -> Iterator[Pair]:
        """Windows that begin anywhere."""
        generator = torch.Generator().manual_seed(seed)
        last = len(self._codes) - _LENGTH - 1
        while True:
            yield _windows(self._codes, torch.randint(last, (self.batch,), generator=generator))


def make(name: str, path: Path | None) -> Problem:
    """The problem of a name with the data of a file, or with what is built in.

    Raises:
        ScriptError: The file cannot be read or holds something else; one line.
    """
    return Text(path) if name == "transformer" else Images(name, path)


@torch.no_grad()
def measured(problem: Problem, network: nn.Module, pair: Pair) -> float:
    """The loss on a pair of inputs and targets."""
    parts = zip(*(torch.split(part, 500) for part in pair), strict=True)
    total = sum(float(problem.loss(network(x), y)) * len(x) for x, y in parts)
    return total / len(pair[0])


def objective(problem: Problem, output: Tensor, targets: Tensor) -> Tensor:
    """The loss by torch's own functions, which every optimizer but K-FAC is given."""
    if isinstance(problem.loss, BernoulliLoss):
        total = functional.binary_cross_entropy_with_logits(output, targets, reduction="sum")
        return total / len(output)
    return functional.cross_entropy(output.flatten(0, -2), targets.flatten())


def _windows(codes: Tensor, starts: Tensor) -> Pair:
    rows = codes[starts[:, None] + torch.arange(_LENGTH + 1)]
    return rows[:, :-1], rows[:, 1:]


def _spread_windows(codes: Tensor) -> Pair:
    last = len(codes) - _LENGTH - 1
    count = min(_WINDOWS, last)
    return _windows(codes, torch.arange(count) * last // count)


def _documentation() -> str:
    """The texts of Python's own ``help()``, some 470,000 characters."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ScriptError(f"{path}: cannot read as text: {error}") from error
