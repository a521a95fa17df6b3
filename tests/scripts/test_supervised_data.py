"""Every format is read, and nothing in a file is believed or run."""

from __future__ import annotations

import gzip
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from scripts.supervised.data import Dataset, load
from scripts.supervised.errors import SupervisedError

Bytes = NDArray[np.uint8]


def images(count: int, *shape: int) -> Bytes:
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


def idx(array: Bytes) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def save_idx(folder: Path, packed: bool) -> tuple[Bytes, Bytes]:
    x, y = images(7, 4, 5), np.arange(7, dtype=np.uint8)
    parts = {
        "train-images-idx3-ubyte": x[:4],
        "train-labels-idx1-ubyte": np.array([0, 1, 5, 6], dtype=np.uint8),
        "t10k-images-idx3-ubyte": x[4:],
        "t10k-labels-idx1-ubyte": y[4:],
    }
    for name, array in parts.items():
        data = idx(array)
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)
    return x, y


def refused(path: Path, why: str, problem: str = "convnet") -> None:
    with pytest.raises(SupervisedError) as caught:
        load(path, problem)
    message = str(caught.value)
    assert why in message
    assert "\n" not in message


def test_npz_is_read_as_it_is(tmp_path: Path) -> None:
    data = load(save_npz(tmp_path / "a.npz"), "autoencoder")
    assert np.array_equal(data.x_train[..., 0], images(6, 4, 5))
    assert np.array_equal(data.x_test[..., 0], images(3, 4, 5))
    assert data.y_test.tolist() == [2, 1, 0]
    assert (data.name, data.classes) == ("a.npz", 3)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"y_test": None}, "no array y_test"),
        ({"x_train": np.zeros((6, 4, 5))}, "must be uint8 images, got float64"),
        ({"x_train": images(6, 3, 4, 5)}, "must have shape"),
        ({"x_test": images(3, 9, 9)}, "training images have shape (4, 5, 1)"),
        ({"y_train": np.arange(5)}, "must be 6 integers"),
        ({"y_train": np.array([0, 1, 2, 0, 1, -1])}, "must lie in 0..999, got -1..2"),
        ({"y_test": np.array([2, 1, 3])}, "label 3, unknown in training"),
        ({"y_train": np.array([None] * 6)}, "not a .npz file of plain arrays"),
    ],
)
def test_npz_with_something_wrong_is_refused(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    refused(save_npz(tmp_path / "a.npz", **changes), why)


@pytest.mark.parametrize("method", [9, 12, 14, 97], ids=["deflate64", "bzip2", "lzma", "unknown"])
def test_oddly_compressed_npz_is_refused(tmp_path: Path, method: int) -> None:
    packed = save_npz(tmp_path / "a.npz")
    patch_headers(packed, method, flags=0)
    refused(packed, f"x_train.npy is compressed with zip method {method}")
    refused(packed, "write it with numpy.savez or numpy.savez_compressed")


def patch_headers(path: Path, method: int, flags: int) -> None:
    """Write flags and compression method into every local and central header of a zip file."""
    data = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(magic)
        while at >= 0:
            data[at + offset : at + offset + 4] = flags.to_bytes(2, "little") + method.to_bytes(
                2, "little"
            )
            at = data.find(magic, at + 4)
    path.write_bytes(data)


def test_encrypted_npz_is_refused(tmp_path: Path) -> None:
    file = save_npz(tmp_path / "a.npz")
    patch_headers(file, 0, flags=0)
    assert load(file, "convnet").classes == 3  # so the headers are still good ones
    patch_headers(file, 0, flags=1)
    refused(file, "x_train.npy is encrypted; write it with numpy.savez")


def test_a_member_that_is_no_array_is_refused(tmp_path: Path) -> None:
    file = save_npz(tmp_path / "a.npz", y_test=None)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("y_test", b"0 1 2")
    refused(file, "y_test is not an array; numpy.savez writes them")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["p.npz", "p", "train-images-idx3-ubyte"])
def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    refused(tmp_path / name, "not a regular file; need a file or a folder")


def test_what_is_no_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK nonsense")
    refused(tmp_path / "a.npz", "not a .npz file")
    refused(tmp_path / "b.npz", "cannot read: No such file")
    refused(tmp_path / "c", "no such file or folder")
    refused(tmp_path, "holds neither idx files")
    (tmp_path / "d.txt").write_text("x")
    refused(tmp_path / "d.txt", "not a .npz file, an idx file")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("by_file", [False, True])
def test_idx_files_are_read(tmp_path: Path, packed: bool, by_file: bool) -> None:
    x, y = save_idx(tmp_path, packed)
    suffix = ".gz" if packed else ""
    path = tmp_path / f"train-images-idx3-ubyte{suffix}" if by_file else tmp_path
    data = load(path, "autoencoder")
    assert np.array_equal(data.x_train[..., 0], x[:4])
    assert np.array_equal(data.x_test[..., 0], x[4:])
    assert data.y_train.tolist() == [0, 1, 5, 6]
    assert data.y_test.tolist() == y[4:].tolist()


def test_damaged_idx_files_are_refused(tmp_path: Path) -> None:
    save_idx(tmp_path, packed=False)
    file = tmp_path / "t10k-labels-idx1-ubyte"
    good = file.read_bytes()
    file.write_bytes(good[:-1])
    refused(tmp_path, "do not fit an idx file of shape [3]")
    file.write_bytes(b"\x00\x00\x0d" + good[3:])
    refused(tmp_path, "not an idx file of unsigned bytes")
    file.unlink()
    refused(tmp_path, "t10k-labels-idx1-ubyte (or with .gz) is missing")
    (tmp_path / f"{file.name}.gz").write_bytes(gzip.compress(good)[:-9])
    refused(tmp_path, "truncated gzip file")


def save_pickles(folder: Path, protocol: int) -> tuple[Bytes, list[int]]:
    rows, labels = images(6, 3072), [3, 1, 9, 0, 2, 1]
    parts = {"data_batch_1": slice(0, 2), "data_batch_2": slice(2, 4), "test_batch": slice(4, 6)}
    for name, part in parts.items():
        batch = {b"data": rows[part], b"labels": labels[part], b"batch_label": b"x"}
        (folder / name).write_bytes(pickle.dumps(batch, protocol))
    return rows, labels


def check_cifar(data: Dataset, rows: Bytes, labels: list[int]) -> None:
    """Pixel (row, column) of a colour is element colour * 1024 + row * 32 + column of a row."""
    assert data.x_train.shape == (4, 32, 32, 3)
    for image, colour, row, column in ((0, 0, 0, 1), (3, 2, 31, 0), (1, 1, 5, 7)):
        element = rows[image, colour * 1024 + row * 32 + column]
        assert data.x_train[image, row, column, colour] == element
    assert np.array_equal(data.x_test[1, :, :, 2].ravel(), rows[5, 2048:])
    assert (data.y_train.tolist(), data.y_test.tolist()) == (labels[:4], labels[4:])


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_cifar_pickles_are_read(tmp_path: Path, protocol: int) -> None:
    rows, labels = save_pickles(tmp_path, protocol)
    check_cifar(load(tmp_path, "convnet"), rows, labels)


def test_a_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    """Opcodes as cPickle of Python 2 writes them: byte strings, numpy.core, labels as integers."""
    rows, labels = save_pickles(tmp_path, 2)
    for name, start in (("data_batch_1", 0), ("data_batch_2", 2), ("test_batch", 4)):
        raw = rows[start : start + 2].tobytes()
        (tmp_path / name).write_bytes(
            b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\n"
            b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02M\x00\x0c\x86"
            b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
            b"K\x00tb\x89T" + len(raw).to_bytes(4, "little") + raw + b"tbU\x06labels](K"
            + bytes([labels[start]]) + b"K" + bytes([labels[start + 1]]) + b"eu."
        )  # fmt: skip
    check_cifar(load(tmp_path, "convnet"), rows, labels)


def test_cifar_binaries_are_read(tmp_path: Path) -> None:
    rows, labels = images(6, 3072), [3, 1, 9, 0, 2, 1]
    records = np.concatenate([np.array(labels, dtype=np.uint8)[:, None], rows], axis=1)
    (tmp_path / "data_batch_1.bin").write_bytes(records[:2].tobytes())
    (tmp_path / "data_batch_2.bin").write_bytes(records[2:4].tobytes())
    (tmp_path / "test_batch.bin").write_bytes(records[4:].tobytes())
    check_cifar(load(tmp_path, "convnet"), rows, labels)
    (tmp_path / "test_batch.bin").write_bytes(records[4:].tobytes()[:-1])
    refused(tmp_path, "need a multiple of 3073")


class Evil:
    """Makes a folder when it is unpickled by an ordinary reader."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    save_pickles(tmp_path, 2)
    trap = tmp_path / "trap"
    harmful = pickle.dumps({b"data": Evil(trap), b"labels": [1]}, protocol)
    (tmp_path / "data_batch_2").write_bytes(harmful)
    refused(tmp_path, f"{os.name}.mkdir, only NumPy arrays are allowed")
    assert not trap.exists()
    pickle.loads(harmful)  # noqa: S301
    assert trap.exists()  # so the pickle was a working one


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {b"labels": [1]},
        {b"data": np.zeros((2, 3072), dtype=object), b"labels": [1, 1]},
        {b"data": np.zeros((2, 3072), dtype=np.int16), b"labels": [1, 1]},
        {b"data": np.zeros((2, 3071), dtype=np.uint8), b"labels": [1, 1]},
        {b"data": np.zeros((2, 3072), dtype=np.uint8), b"labels": [1]},
        {b"data": np.zeros((2, 3072), dtype=np.uint8), b"labels": [1, 10]},
        {b"data": np.zeros((2, 3072), dtype=np.uint8), b"labels": [1, "x"]},
    ],
)
def test_other_pickles_are_refused(tmp_path: Path, content: object) -> None:
    save_pickles(tmp_path, 2)
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content, 2))
    refused(tmp_path, "test_batch: not a CIFAR-10 batch")


def test_a_truncated_pickle_is_refused(tmp_path: Path) -> None:
    save_pickles(tmp_path, 2)
    file = tmp_path / "test_batch"
    file.write_bytes(file.read_bytes()[:-100])
    refused(tmp_path, "test_batch: not a CIFAR-10 batch")


@pytest.mark.parametrize("problem", ["autoencoder", "convnet"])
def test_the_built_in_data_is_the_same_everywhere(problem: str) -> None:
    first, again = load(None, problem), load(None, problem)
    assert first.digest() == again.digest()
    assert first.built_in
    assert len(first.x_train) == 512
    assert len(first.x_test) == 128
    assert first.classes == 4
    assert first.x_train.std() > 20
