from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from acktr.files import is_label, read_limited, read_object, write_atomic


def test_reads_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_limited(path, 5) == b"12345"
    with pytest.raises(OSError, match="5 bytes; at most 4 are allowed"):
        read_limited(path, 4)


def test_reads_only_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            read_limited(path, 10)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b"{}" + b" " * 10_000, "10002 bytes; at most 10000 are allowed"),
    ],
)
def test_what_is_no_object_is_refused_in_one_line(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": [1]}')
    assert read_object(path) == {"a": [1]}
    path.write_bytes(content)
    limit = 10_000 if content[:2] == b"{}" else 1 << 20
    with pytest.raises(ValueError, match=why) as caught:
        read_object(path, limit)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_labels() -> None:
    assert all(map(is_label, ("a", "0", "sb3-a2c", "my.label_1", "x" * 80)))
    refused = ("", ".", "..", "-x", "_x", "a/b", "a b", "a\n", "\u00e4", "x" * 81)
    assert not any(map(is_label, refused))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]
