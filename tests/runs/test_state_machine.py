"""Saves, kills, power cuts, damage and resumes in any order: the last good checkpoint is there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from acktr.runs import checkpoint
from acktr.runs.checkpoint import (
    CheckpointError,
    load_checkpoint,
    older_checkpoints,
    save_checkpoint,
    set_aside,
)

CALLS = ("fsync", "mkdir", "rename", "rmdir", "unlink")
OLDER = 2


class Disk(RuleBasedStateMachine):
    """A folder with checkpoints, of which the model knows the numbers and which are damaged.

    A power cut leaves the files that were not synced empty.
    """

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp())
        self.last = self.home / "disk" / "last"
        self.last.parent.mkdir()
        self.saved = 0
        self.kept: list[int] = []
        """Sound ones, the newest first."""
        self.synced: set[tuple[int, int]] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.home)

    @rule(older=st.integers(0, OLDER))
    def save(self, older: int) -> None:
        self.saved += 1
        stay = self._staying(older)
        self._write(older)
        found = self._sound()
        assert found[0] == self.saved
        assert stay <= set(found)
        names = {path.name for path in self.last.parent.iterdir()}
        assert not any(".tmp" in name or name == "last.old" for name in names)
        assert len({name for name in names if "damaged" not in name}) <= 1 + OLDER
        self.kept = found

    @rule(older=st.integers(0, OLDER), call=st.integers(0, 30), power=st.booleans())
    def killed_while_saving(self, older: int, call: int, power: bool) -> None:
        self.saved += 1
        left, stay = self.home / "left", self._staying(older)
        calls = 0

        def before() -> None:
            nonlocal calls
            if calls == call:
                with mock.patch.multiple(os, **REAL):
                    self._copy(left, power)
            calls += 1

        self._write(older, before)
        if left.exists():
            shutil.rmtree(self.last.parent)
            left.rename(self.last.parent)
        found = self._sound()
        assert found[:1] in ([self.saved], self.kept[:1])
        assert stay <= set(found)
        self.kept = found

    @precondition(lambda self: self.kept)
    @rule(which=st.integers(0, OLDER), name=st.sampled_from(["state.json", "state.safetensors"]))
    def damaged(self, which: int, name: str) -> None:
        paths = [path for path in self._paths() if self._number(path) is not None]
        path = paths[which % len(paths)]
        number = self._number(path)
        actual = path if path.exists() else path.with_name("last.old")
        data = bytearray((actual / name).read_bytes())
        data[len(data) // 2] ^= 4
        (actual / name).write_bytes(data)
        self.kept.remove(number)  # type: ignore[arg-type]

    @rule()
    def resumed(self) -> None:
        """What is damaged is put aside, as far as the first sound one."""
        for path in self._paths():
            if self._number(path) is not None:
                break
            set_aside(path)

    @invariant()
    def the_last_good_one_is_there(self) -> None:
        assert self._sound() == self.kept

    def _write(self, older: int, before: Callable[[], None] = lambda: None) -> None:
        """Save a checkpoint; something is done before each change of the disk."""

        def watched(name: str) -> Any:
            def call(*args: Any, **more: Any) -> Any:
                before()
                if name != "fsync":
                    return REAL[name](*args, **more)
                self.synced.add(_identity(os.fstat(args[0])))  # waiting for a disk proves nothing
                return None

            return call

        weights = torch.full((3,), float(self.saved))
        with mock.patch.multiple(os, **{name: watched(name) for name in CALLS}):
            save_checkpoint(self.last, {"w": weights}, {"number": self.saved}, older)

    def _staying(self, older: int) -> set[int]:
        """Those that a save must not remove: damaged ones have places too."""
        damaged = sum(self._number(path) is None for path in self._paths() if path.exists())
        return set(self.kept[: max(0, older - damaged)])

    def _paths(self) -> list[Path]:
        return [self.last, *older_checkpoints(self.last, OLDER)]

    def _number(self, path: Path) -> int | None:
        try:
            state, meta = load_checkpoint(path)
        except CheckpointError:
            return None
        number = int(meta["number"])
        assert torch.equal(state["w"], torch.full((3,), float(number)))
        return number

    def _sound(self) -> list[int]:
        numbers = [self._number(path) for path in self._paths()]
        found = list(dict.fromkeys(number for number in numbers if number is not None))
        assert found == sorted(found, reverse=True)
        return found

    def _copy(self, left: Path, power: bool) -> None:
        """The disk as it is now; after a power cut without what was not synced."""
        shutil.copytree(self.last.parent, left)
        for path in left.rglob("*"):
            original = self.last.parent / path.relative_to(left)
            if path.is_file() and power and _identity(original.stat()) not in self.synced:
                path.write_bytes(b"")
            self.synced.add(_identity(path.stat()))


def _identity(file: os.stat_result) -> tuple[int, int]:
    """A file and its contents: numbers of files are used again."""
    return file.st_ino, file.st_mtime_ns


REAL = {name: getattr(os, name) for name in CALLS}

TestDisk = Disk.TestCase
TestDisk.settings = settings(
    max_examples=12, stateful_step_count=10, deadline=None, phases=[Phase.explicit, Phase.generate]
)


def test_the_machine_sees_files_that_are_not_synced() -> None:
    """Without fsync of the files a power cut must lose a checkpoint, or the machine is blind."""

    def unsynced(path: Path, data: bytes) -> None:
        path.write_bytes(data)

    disk = Disk()
    try:
        disk.save(OLDER)
        with mock.patch.object(checkpoint, "write_synced", unsynced):
            lost = False
            for call in range(12):
                try:
                    disk.killed_while_saving(OLDER, call, power=True)
                    disk.the_last_good_one_is_there()
                except (AssertionError, IndexError):
                    lost = True
                    break
        assert lost
    finally:
        disk.teardown()
