"""Checkpoints on disks that fail, fill up or lose power."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from acktr.runs.checkpoint import (
    CheckpointError,
    checkpoint_exists,
    load_checkpoint,
    older_checkpoints,
    save_checkpoint,
)

SYSCALLS = ("fsync", "rename", "mkdir", "unlink", "rmdir")


def around_syscalls(patch: pytest.MonkeyPatch, before: Callable[[str], None]) -> None:
    for name in SYSCALLS:
        real = getattr(os, name)

        def wrapped(*args: Any, _name: str = name, _real: Any = real, **kwargs: Any) -> Any:
            before(_name)
            return _real(*args, **kwargs)

        patch.setattr(os, name, wrapped)


def version_of(folder: Path) -> int:
    state, meta = load_checkpoint(folder)
    assert torch.equal(state["w"], torch.full((4,), float(meta["k"])))
    return int(meta["k"])


def save_version(folder: Path, k: int, older: int = 0) -> None:
    save_checkpoint(folder, {"w": torch.full((4,), float(k))}, {"k": k}, older)


def test_a_crash_at_any_point_leaves_a_checkpoint(tmp_path: Path) -> None:
    """The disk as it is before each system call holds version 1 or 2, and can be saved onto."""
    work, shots = tmp_path / "work", tmp_path / "shots"
    shots.mkdir()
    save_version(work / "last", 0)
    shutil.copytree(work / "last", work / "last.old")  # left by an earlier crash
    save_version(work / "last", 1)
    shutil.copytree(work / "last", work / "last.old")
    taken: list[str] = []

    def snapshot(name: str) -> None:
        with pytest.MonkeyPatch.context() as inner:
            for call in SYSCALLS:
                inner.setattr(os, call, REAL[call])
            shutil.copytree(work, shots / str(len(taken)))
        taken.append(name)

    with pytest.MonkeyPatch.context() as patch:
        around_syscalls(patch, snapshot)
        save_version(work / "last", 2)
    assert taken.count("rename") == 4 and taken.count("fsync") >= 6
    seen = []
    for i in range(len(taken)):
        folder = shots / str(i) / "last"
        assert checkpoint_exists(folder)
        seen.append(version_of(folder))
        save_version(folder, 3)
        assert version_of(folder) == 3
        assert os.listdir(folder.parent) == ["last"]
    assert seen == sorted(seen) and set(seen) == {1, 2}


@pytest.mark.parametrize("left_aside", [False, True])
def test_a_crash_at_any_point_leaves_the_older_ones_too(tmp_path: Path, left_aside: bool) -> None:
    """At least three are sound, the newest first, and a later writer puts everything in order."""
    work, shots = tmp_path / "work", tmp_path / "shots"
    shots.mkdir()
    for k in range(4):
        save_version(work / "last", k, 2)
    assert sorted(os.listdir(work)) == ["last", "last-1", "last-2"]
    if left_aside:  # by an earlier crash
        shutil.rmtree(work / "last-1")
        (work / "last").rename(work / "last.old")
        save_checkpoint(work / "new", {"w": torch.full((4,), 4.0)}, {"k": 4})
        (work / "new").rename(work / "last")
    count = 0

    def snapshot(name: str) -> None:
        nonlocal count
        with pytest.MonkeyPatch.context() as inner:
            for call in SYSCALLS:
                inner.setattr(os, call, REAL[call])
            shutil.copytree(work, shots / str(count))
        count += 1

    with pytest.MonkeyPatch.context() as patch:
        around_syscalls(patch, snapshot)
        save_version(work / "last", 5, 2)
    for i in range(count):
        last = shots / str(i) / "last"
        kept = [last, *older_checkpoints(last, 2)]
        found = [version_of(path) for path in dict.fromkeys(kept)]
        if not last.exists():
            assert found.pop(1) == found[0]  # last.old twice: it stands for last
        assert found == sorted(set(found), reverse=True) and len(found) >= 3
        for k in (6, 7):
            save_version(last, k, 2)
        assert [version_of(path) for path in (last, *older_checkpoints(last, 2))] == [
            7,
            6,
            found[0],
        ]
        assert sorted(os.listdir(last.parent)) == ["last", "last-1", "last-2"]


REAL = {name: getattr(os, name) for name in SYSCALLS}


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
@pytest.mark.parametrize("nth", [0, 1, 2, 3, 4, 5])
def test_a_failing_disk_keeps_the_old_one(
    tmp_path: Path, exists: bool, call: str, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "last"
    if exists:
        save_version(folder, 1)
    count = 0

    def fail(name: str) -> None:
        nonlocal count
        if name == call:
            count += 1
            if count == nth + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    with pytest.MonkeyPatch.context() as patch:
        around_syscalls(patch, fail)
        try:
            save_version(folder, 2)
        except CheckpointError as error:
            assert str(error) == f"{folder}: cannot write the checkpoint: No space left on device"
            in_place = call == "fsync" and nth == 5  # everything was renamed already
            if exists or in_place:
                assert version_of(folder) == (2 if in_place else 1)
            else:
                assert not checkpoint_exists(folder)
        else:
            harmless = [("mkdir", 0), ("rename", 2)]  # the parent's, and moving the old one away
            assert count <= nth or (call, nth) in harmless
            assert version_of(folder) == 2
    assert not any(".tmp-" in name for name in os.listdir(tmp_path))
    save_version(folder, 3)
    assert os.listdir(tmp_path) == ["last"] and version_of(folder) == 3


def test_a_full_disk(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    folder = tmp_path / "last"
    save_version(folder, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            save_checkpoint(folder, {"w": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert version_of(folder) == 1
    assert os.listdir(tmp_path) == ["last"]


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint: (Not a|File exists)"):
        save_checkpoint(tmp_path / "file" / "last", {}, {})
    assert (tmp_path / "file").read_text() == "x"


def test_stale_temporaries_are_swept_and_others_kept(tmp_path: Path) -> None:
    for name in ("last.tmp-0123abcd", "last.tmp-mine", "best.tmp-0123abcd"):
        (tmp_path / name).mkdir()
    save_version(tmp_path / "last", 1)
    assert sorted(os.listdir(tmp_path)) == ["best.tmp-0123abcd", "last", "last.tmp-mine"]
