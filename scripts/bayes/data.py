"""Regression sets with their splits, standardised on the training parts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor

from acktr.envs import one_line
from scripts.common import ScriptError
from scripts.supervised.problems import DAMAGES

SMALL = ("boston", "concrete", "energy", "wine", "yacht")
LARGE = ("kin8nm", "naval", "power", "protein")
_FIELDS = ("X", "y", "train_idx", "test_idx")
LAYOUT = (
    "--data is a folder with NAME.npz for every set: X (rows, inputs) and y (rows) of numbers, and"
    " train_idx (splits, n) and test_idx (splits, m) of row numbers from 0; scripts/README.md says"
    " how to make it"
)


@dataclass(frozen=True)
class Splits:
    """S splits of one data set side by side, inputs and targets standardised on training parts."""

    name: str
    x_train: Tensor
    """Inputs (n, S, D)."""
    y_train: Tensor
    """Targets (n, S)."""
    x_test: Tensor
    """Inputs (m, S, D)."""
    y_test: Tensor
    """Targets (m, S)."""
    scale: Tensor
    """Standard deviation of the targets (S,), in their own units."""
    digest: str
    """SHA-256 of the whole set."""

    @property
    def data_size(self) -> int:
        """Training rows of one split."""
        return len(self.y_train)

    @property
    def count(self) -> int:
        """S."""
        return len(self.scale)

    @property
    def inputs(self) -> int:
        """D."""
        return self.x_train.shape[-1]


@dataclass(frozen=True)
class Raw:
    """A data set as it comes."""

    x: Tensor
    """Inputs (rows, D), float64."""
    y: Tensor
    """Targets (rows,), float64."""
    train: Tensor
    """Rows of training parts (splits, n)."""
    test: Tensor
    """Rows of test parts (splits, m)."""
    digest: str
    """SHA-256 of all of it."""


def read(folder: Path, name: str) -> Raw:
    """A data set of a folder.

    Raises:
        ScriptError: Its file is absent or damaged, or has another layout.
    """
    path = folder / f"{name}.npz"
    if not path.is_file():
        raise ScriptError(f"{path}: no such file; {LAYOUT}")
    try:
        opened = np.load(path, allow_pickle=False)
        if not isinstance(opened, NpzFile):
            raise ValueError("it is a single array")
        with opened as file:
            x, y, train, test = (np.ascontiguousarray(file[field]) for field in _FIELDS)
    except KeyError as error:
        raise ScriptError(f"{path}: {one_line(error)}; {LAYOUT}") from error
    except DAMAGES as error:
        raise ScriptError(f"{path}: cannot read as .npz: {one_line(error)}") from error
    rows = [part for part in (train, test) if part.dtype.kind in "iu" and part.ndim == 2]
    fit = x.dtype.kind == y.dtype.kind == "f" and x.ndim == 2 and y.shape == x.shape[:1]
    fit = fit and len(rows) == 2 and len(train) == len(test) and train.size > 0 and test.size > 0
    if not fit or not all(part.min() >= 0 and part.max() < len(y) for part in rows):
        raise ScriptError(f"{path}: its arrays do not fit together; {LAYOUT}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ScriptError(f"{path}: X and y must be finite")
    found = hashlib.sha256()
    for array in (x, y, train, test):
        found.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    inputs, targets = (torch.from_numpy(array).double() for array in (x, y))
    train_rows, test_rows = (torch.from_numpy(part.astype(np.int64)) for part in (train, test))
    return Raw(inputs, targets, train_rows, test_rows, found.hexdigest())


def load(folder: Path, name: str, splits: int | None = None) -> Splits:
    """The first splits of a data set, all if None; columns that are constant are left at 0.

    Raises:
        ScriptError: The file is none, or has fewer splits.
    """
    raw = read(folder, name)
    count = len(raw.train) if splits is None else splits
    if count > len(raw.train):
        raise ScriptError(f"{name} has {len(raw.train)} splits, not {count}")
    return standardised(name, raw, raw.train[:count], raw.test[:count])


def standardised(
    name: str, raw: Raw, train: Tensor, test: Tensor, *, known: bool = False
) -> Splits:
    """Splits of a set with these rows, (S, n) and (S, m).

    Args:
        name: Of the set.
        raw: The set.
        train: Rows of training parts.
        test: Rows of test parts.
        known: Whether inputs of all rows are known, as those of a pool: then they are standardised
            by all rows. A few rows alone may hardly vary in a column.
    """
    train, test = train.T, test.T
    x, y = raw.x[train], raw.y[train]
    y_mean, y_std = y.mean(0), y.std(0, correction=0)
    whole = raw.x if known else x
    x_mean, x_std = whole.mean(0), whole.std(0, correction=0)
    x_std = torch.where(x_std == 0, 1.0, x_std)
    inputs = ((part - x_mean) / x_std for part in (x, raw.x[test]))
    targets = ((part - y_mean) / y_std for part in (y, raw.y[test]))
    x_train, x_test = (part.float() for part in inputs)
    y_train, y_test = (part.float() for part in targets)
    return Splits(name, x_train, y_train, x_test, y_test, y_std.float(), raw.digest)
