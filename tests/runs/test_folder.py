"""The folder of a run: names, configuration, command lines, versions, and the path that it has."""

from __future__ import annotations

import errno
import json
import os
import platform
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from acktr.config import Config, ConfigError, merge, preset
from acktr.runs.folder import RunError, RunFolder, new_folder, run_path, versions


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


def config(**changes: Any) -> Config:
    return merge(preset("CartPole-v1")[0], changes)


def full(*_: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


class TestRunFolder:
    def test_layout(self, folder: RunFolder) -> None:
        names = [path.relative_to(folder.path).as_posix() for path in (folder.last, folder.best)]
        assert names == ["checkpoints/last", "checkpoints/best"]
        files = [folder.config, folder.versions, folder.command, folder.monitor, folder.progress]
        assert [path.name for path in [*files, folder.evaluations, folder.curve]] == [
            *("config.json", "versions.json", "command.txt", "monitor.csv", "progress.csv"),
            *("eval.csv", "curve.png"),
        ]

    def test_refuses_an_existing_run(self, tmp_path: Path) -> None:
        folder = RunFolder.create(tmp_path / "a" / "b")
        folder.write_config({"env": "X"})
        folder.progress.write_text("timesteps,updates\n64,1\n")
        with pytest.raises(RunError) as caught:
            RunFolder.create(tmp_path / "a" / "b")
        assert str(caught.value) == (
            f"{tmp_path}/a/b already holds a run; continue a run with --resume PATH "
            "or choose another --run-dir or --seed"
        )

    def test_refuses_anything_else_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "x").write_text("x")
        with pytest.raises(RunError, match=r"mine is not empty; .*--run-dir"):
            RunFolder.create(tmp_path / "mine")
        for path in (tmp_path / "mine" / "x", tmp_path / "mine" / "x" / "run"):
            with pytest.raises(RunError, match=r"cannot create the run folder: (File|Not a dir)"):
                RunFolder.create(path)
        assert [p.name for p in tmp_path.rglob("*")] == ["mine", "x"]

    def test_accepts_an_empty_folder_once(self, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        RunFolder.create(tmp_path / "run").curve.touch()
        with pytest.raises(RunError):
            RunFolder.create(tmp_path / "run")

    def test_replaces_what_a_killed_start_left(self, tmp_path: Path) -> None:
        """Whatever it had come to, and nothing that is not from a start."""
        folder = RunFolder.create(tmp_path / "run")
        assert folder.unborn
        folder.write_config({"env": "X"})
        for name in (".protocol.json.tmp-0123abcd", "events.out.tfevents.1.host.1.0"):
            (folder.path / name).touch()
        folder.monitor.write_text('#{"t_start": 0}\nr,l,t,step\n')
        half = folder.last.with_name("last.tmp-0123abcd")
        half.mkdir()
        (half / "state.json").touch()
        assert folder.unborn
        RunFolder.create(folder.path)
        assert [path.name for path in folder.path.rglob("*")] == ["checkpoints"]

    @pytest.mark.parametrize(
        "name",
        [
            *("curve.png", "thesis.txt", ".thesis.txt.tmp-0123abcd", "config.json.tmp-0123abcd"),
            *("folder/x", "checkpoints/last/x", "checkpoints/best/x", "checkpoints/last.old/x"),
        ],
    )
    def test_keeps_everything_else(self, tmp_path: Path, name: str) -> None:
        folder = RunFolder.create(tmp_path / "run")
        (folder.path / name).parent.mkdir(exist_ok=True)
        (folder.path / name).touch()
        assert not folder.unborn
        with pytest.raises(RunError, match="is not empty"):
            RunFolder.create(folder.path)
        assert (folder.path / name).exists()

    def test_keeps_links(self, tmp_path: Path) -> None:
        folder = RunFolder.create(tmp_path / "run")
        (tmp_path / "mine.json").touch()
        folder.config.symlink_to(tmp_path / "mine.json")
        assert not folder.unborn

    def test_removes_nothing_of_who_has_the_lock(self, tmp_path: Path) -> None:
        """Two that start the same run at once: the second is refused, the first one stays."""
        with ExitStack() as held, new_folder(tmp_path / "a" / "run", held) as folder:
            folder.write_config({"env": "X"})
            with (
                ExitStack() as other,
                pytest.raises(RunError, match="another process is training this run"),
                new_folder(folder.path, other),
            ):
                pass
            assert folder.config.exists()

    def test_open_needs_a_config(self, tmp_path: Path) -> None:
        folder = RunFolder.create(tmp_path / "run")
        for path in (tmp_path / "run", tmp_path / "missing"):
            with pytest.raises(RunError, match="not a run folder"):
                RunFolder.open(path)
        config = {"env": "CartPole-v1", "hidden": [64, 64], "lr": 0.25, "kl": None}
        folder.write_config(config)
        assert RunFolder.open(tmp_path / "run").read_config() == config

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            (b"{", "not valid JSON"),
            (b"\xff\xfe", "not valid JSON"),
            (b"[" * 100_000, "not valid JSON"),
            (b"[1]", "must hold a JSON object"),
            (b'"' + b"x" * (1 << 20) + b'"', "at most 1048576 are allowed"),
        ],
    )
    def test_garbage_config(self, folder: RunFolder, content: bytes, why: str) -> None:
        folder.config.write_bytes(content)
        with pytest.raises(RunError, match=why) as caught:
            folder.read_config()
        assert "\n" not in str(caught.value) and "config.json" in str(caught.value)

    def test_command_keeps_every_start(self, folder: RunFolder) -> None:
        folder.write_command(["acktr", "train", "--env", "a b"])
        folder.write_command(["acktr", "train", "--resume", "x"])
        assert folder.command.read_text() == ("acktr train --env 'a b'\nacktr train --resume x\n")

    def test_unwritable(self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"config\.json: cannot write: No space left"):
            folder.write_config({})
        assert [path.name for path in folder.path.iterdir()] == ["checkpoints"]


def test_versions(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "ale-py":
            raise metadata.PackageNotFoundError(name)
        return "9.9" if name == "acktr" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    folder.write_json(folder.versions, versions())
    found = json.loads(folder.versions.read_text())
    assert found == versions()
    assert found["ale-py"] is None and found["acktr"] == "9.9"
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert found["torch_threads"] == torch.get_num_threads()
    assert set(found) >= {"gymnasium", "mujoco", "numpy", "platform", "cpu_count", "git_commit"}


def test_label_takes_the_place_of_the_algorithm() -> None:
    path = run_path(Path("runs"), config(seed=3), "acktr-v.2_x")
    assert path == Path("runs/CartPole-v1/acktr-v.2_x/seed3")


@pytest.mark.parametrize("label", ["", ".", "..", "../x", "a/b", "-x", "a b", "x" * 81, "é", "a\n"])
def test_label_must_be_the_name_of_a_folder(label: str) -> None:
    with pytest.raises(ConfigError, match="label must be"):
        run_path(Path("runs"), config(), label)


def test_run_path_has_no_special_characters() -> None:
    path = run_path(Path("runs"), config(env="mod:ns/Env-v0", seed=3))
    assert path == Path("runs/mod_ns_Env-v0/acktr/seed3")
