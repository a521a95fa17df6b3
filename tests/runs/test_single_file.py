"""Checkpoints in one file: round trips, damage, and files that somebody made to do harm."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from acktr.runs.checkpoint import (
    CheckpointError,
    checkpoint_exists,
    load_checkpoint,
    save_checkpoint,
)

STATE = {"w": torch.arange(6.0).reshape(2, 3), "deep": [{"n": np.arange(3)}, 7, "text", None]}
META = {"format": "test"}


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path: Path, files: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files:
            archive.writestr(name, data)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "a.zip", STATE, META)
    return tmp_path / "a.zip"


def test_round_trip(saved: Path) -> None:
    assert os.listdir(saved.parent) == ["a.zip"]
    assert checkpoint_exists(saved)
    state, meta = load_checkpoint(saved)
    assert torch.equal(state["w"], STATE["w"])  # type: ignore[arg-type]
    np.testing.assert_array_equal(state["deep"][0]["n"], np.arange(3))
    assert state["deep"][1:] == [7, "text", None]
    assert meta == META


def test_the_members_are_the_files_of_a_folder(saved: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "folder", STATE, META)
    inside = members(saved)
    assert set(inside) == {path.name for path in (tmp_path / "folder").iterdir()}
    for name, data in inside.items():
        assert (tmp_path / "folder" / name).read_bytes() == data


def test_an_older_one_is_replaced_and_nothing_else(saved: Path, tmp_path: Path) -> None:
    save_checkpoint(saved, {"w": torch.ones(1)}, META)
    assert torch.equal(load_checkpoint(saved)[0]["w"], torch.ones(1))
    (tmp_path / "text.zip").write_text("mine")
    write(tmp_path / "photos.zip", [("photo.png", b"mine")])
    (tmp_path / "folder.zip").mkdir()
    os.mkfifo(tmp_path / "pipe.zip")
    for name in ("text", "photos", "folder", "pipe"):
        with pytest.raises(CheckpointError, match="something that is not a checkpoint has"):
            save_checkpoint(tmp_path / f"{name}.zip", STATE, META)
    assert (tmp_path / "text.zip").read_text() == "mine"
    assert members(tmp_path / "photos.zip") == {"photo.png": b"mine"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_keeps_the_old_one(
    saved: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CheckpointError, match=r"a\.zip: cannot write .*No space left"):
            save_checkpoint(saved, {"w": torch.ones(1)}, META)
    assert torch.equal(load_checkpoint(saved)[0]["w"], STATE["w"])  # type: ignore[arg-type]
    assert os.listdir(saved.parent) == ["a.zip"]


def test_every_damaged_byte_is_noticed(saved: Path) -> None:
    """Or it changes nothing that is read, as the dates in zip headers."""
    good = saved.read_bytes()
    noticed = 0
    for place in range(0, len(good), 11):
        saved.write_bytes(good[:place] + bytes([good[place] ^ 0x41]) + good[place + 1 :])
        try:
            state, meta = load_checkpoint(saved)
        except CheckpointError as error:
            assert "\n" not in str(error)
            noticed += 1
        else:
            assert torch.equal(state["w"], STATE["w"]) and meta == META  # type: ignore[arg-type]
    assert noticed > len(good) // 11 * 0.8
    for length in range(0, len(good), 97):
        saved.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match="damaged or not from this program"):
            load_checkpoint(saved)


def resigned(files: dict[str, bytes], **changes: bytes) -> list[tuple[str, bytes]]:
    """Members with others in place of some, and a manifest that fits them."""
    content = {**files, **{name.replace("_", "."): data for name, data in changes.items()}}
    manifest = json.loads(content.pop("manifest.json"))
    manifest["files"] = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in content.items()
    }
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    return [*content.items(), ("manifest.json", text.encode())]


def lying(files: dict[str, bytes], name: str, size: int) -> bytes:
    """A file whose directory and header claim another size for a member than it has."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, data in files.items():
            archive.writestr(member, data)
    raw = bytearray(buffer.getvalue())
    place = raw.rindex(b"PK\x01\x02", 0, raw.rindex(name.encode()))
    raw[place + 20 : place + 28] = struct.pack("<II", size, size)
    return bytes(raw)


def many(files: dict[str, bytes], count: int) -> bytes:
    """A file with a great number of members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, data in files.items():
            archive.writestr(member, data)
        for number in range(count):
            archive.writestr(f"{number}", b"")
    return buffer.getvalue()


def widened(data: bytes) -> bytes:
    """A file that says that a directory for 64-bit sizes has other numbers."""
    return data[:-22] + b"PK\x06\x07" + bytes(16) + data[-22:]


HOSTILE: dict[str, tuple[Callable[[dict[str, bytes]], list[tuple[str, bytes]] | bytes], str]] = {
    "climbing name": (lambda f: [*f.items(), ("../evil", b"x")], "number of members"),
    "climbing name instead": (
        lambda f: [*list(f.items())[:-1], ("../manifest.json", f["manifest.json"])],
        "other members",
    ),
    "absolute name": (
        lambda f: [*list(f.items())[:-1], ("/manifest.json", f["manifest.json"])],
        "other members",
    ),
    "name twice": (
        lambda f: [("meta.json", b"{}"), *[i for i in f.items() if i[0] != "state.json"]],
        "other members",
    ),
    "missing member": (lambda f: list(f.items())[1:], "number of members"),
    "another content": (
        lambda f: [(n, b"{}" if n == "meta.json" else d) for n, d in f.items()],
        "differs from its size or SHA-256",
    ),
    "great number": (lambda f: many(f, 500), "number of members"),
    "great number elsewhere": (lambda f: widened(many(f, 0)), "zip file without"),
    "larger than it is": (lambda f: lying(f, "state.safetensors", 3 << 30), "is too large"),
    "no state": (lambda f: resigned(f, state_json=b"[]"), "state.json: not valid"),
    "unknown tag": (lambda f: resigned(f, state_json=b'{"$os": "rm"}'), "not valid"),
    "no tensors": (lambda f: resigned(f, state_safetensors=b"\xff" * 16), "not valid"),
    "deep": (lambda f: resigned(f, meta_json=b"[" * 200_000 + b"]" * 200_000), "not valid"),
    "format": (
        lambda f: [
            (n, d.replace(b"acktr-checkpoint", b"other") if n == "manifest.json" else d)
            for n, d in f.items()
        ],
        r"a\.zip/manifest\.json: not a checkpoint manifest",
    ),
    "nothing": (lambda f: b"", "zip file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_in_one_line(saved: Path, case: str) -> None:
    make, line = HOSTILE[case]
    content = make(members(saved))
    if isinstance(content, bytes):
        saved.write_bytes(content)
    else:
        write(saved, content)
    before = set(saved.parent.rglob("*"))
    with pytest.raises(CheckpointError, match=line) as caught:
        load_checkpoint(saved)
    assert "\n" not in str(caught.value)
    assert set(saved.parent.rglob("*")) == before


def test_nothing_is_unpacked_that_was_compressed(saved: Path) -> None:
    """What would be 32 MiB costs no memory."""
    files = members(saved)
    files["state.safetensors"] = bytes(1 << 25)
    write(saved, list(files.items()), zipfile.ZIP_DEFLATED)
    assert saved.stat().st_size < 1 << 18
    del files
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="is compressed or encrypted"):
        load_checkpoint(saved)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_what_does_not_fit_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    with pytest.raises(CheckpointError, match="do not fit into one file: give a folder"):
        save_checkpoint(tmp_path / "a.zip", {"w": torch.zeros(1000)}, META)
    assert not list(tmp_path.iterdir())
