"""Pictures are read as they are, and what is no archive of them is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from scripts.common import ScriptError
from scripts.supervised.problems import (
    load,
)


def images(count: int, *shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)


def save_npz(path: Path, **changes: Any) -> Path:
    arrays: dict[str, Any] = {
        "x_train": images(6, 4, 5),
        "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": images(3, 4, 5),
        "y_test": np.array([2, 1, 0]),
    }
    arrays |= changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def refused(path: Path, why: str) -> None:
    with pytest.raises(ScriptError) as caught:
        load(path, "convnet")
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_npz_is_read_as_it_is(tmp_path: Path) -> None:
    data = load(save_npz(tmp_path / "a.npz"), "autoencoder")
    assert np.array_equal(data.x_train[..., 0], images(6, 4, 5))
    assert np.array_equal(data.x_test[..., 0], images(3, 4, 5))
    assert data.y_test.tolist() == [2, 1, 0]
    assert (data.name, data.classes) == ("a.npz", 3)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"y_test": None}, "y_test is not a file in the archive"),
        ({"x_train": np.zeros((6, 4, 5))}, "must be uint8 (N, height, width) or"),
        ({"x_train": images(6, 3, 4, 5)}, "got uint8 (6, 3, 4, 5), int64 (6,)"),
        ({"x_test": images(3, 9, 9)}, "alike in both parts"),
        ({"y_train": np.arange(5)}, "labels N integers in 0..999"),
        ({"y_train": np.array([0, 1, 2, 0, 1, -1])}, "labels N integers in 0..999"),
        ({"y_test": np.array([2, 1, 3])}, "label 3, unknown in training"),
        ({"y_train": np.array([None] * 6)}, "cannot read as .npz: Object arrays"),
    ],
)
def test_npz_with_something_wrong_is_refused(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    refused(save_npz(tmp_path / "a.npz", **changes), why)


def test_what_is_no_npz_is_refused(tmp_path: Path) -> None:
    whole = save_npz(tmp_path / "a.npz").read_bytes()
    np.save(tmp_path / "b.npy", images(6, 4, 5))
    refused(tmp_path / "b.npy", "cannot read as .npz: it is a single array")
    for name, content in {"c.npz": whole[:-100], "d.npz": b"text"}.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, f"{name}: cannot read as .npz: ")


@pytest.mark.parametrize("problem", ["autoencoder", "convnet"])
def test_the_built_in_data_is_the_same_everywhere(problem: str) -> None:
    data = load(None, problem)
    assert data.digest() == load(None, problem).digest()
    assert (data.built_in, len(data.x_train), len(data.x_test), data.classes) == (True, 512, 128, 4)
    assert data.x_train.std() > 20
