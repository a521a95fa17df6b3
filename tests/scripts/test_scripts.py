"""The scripts run."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import gymnasium
import pytest
from gymnasium.envs.classic_control import CartPoleEnv

from acktr.cli.main import main
from acktr.report.archives import read_archive
from scripts import collect as collecting
from scripts import mask_cost, random_returns
from scripts.common import on_files


class Blind(CartPoleEnv):
    metadata: ClassVar = {"render_modes": []}


def collect(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.collect", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_collect_copies_the_small_files(tmp_path: Path) -> None:
    where = str(tmp_path / "runs")
    command = ["train", "--env", "CartPole-v1", "--total-timesteps", "3000", "--run-dir", where]
    assert main(command) == 0
    run = tmp_path / "runs" / "CartPole-v1" / "acktr" / "seed0"
    done = collect(str(run), "--out", str(tmp_path / "runs.zip"))
    assert done.returncode == 0, done.stderr
    copy = read_archive(tmp_path / "runs.zip")
    target = "CartPole-v1/acktr/seed0"
    assert copy[f"{target}/monitor.csv"] == (run / "monitor.csv").read_bytes()
    assert not any("checkpoints" in name for name in copy)
    assert where.encode() not in copy[f"{target}/command.txt"]


def test_random_returns(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        sys.executable,
        "-m",
        "scripts.random_returns",
        "CartPole-v1",
        "--episodes",
        "30",
        "--seed",
        "3",
    ]
    one = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    random_returns.work(command[3:])
    assert capsys.readouterr().out == one
    (row,) = csv.DictReader(one.splitlines())
    assert (row["env"], row["episodes"]) == ("CartPole-v1", "30")
    assert 15 < float(row["mean"]) < 35  # about 22
    assert float(row["standard_error"]) == pytest.approx(float(row["std"]) / 30**0.5, rel=1e-2)
    assert on_files("random_returns", lambda: random_returns.work(["CartPol-v1"])) == 2
    assert "did you mean 'CartPole-v1'?" in capsys.readouterr().err


def test_random_returns_draw_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = gymnasium.envs.registration.EnvSpec("Blind-v0", Blind, max_episode_steps=10)
    monkeypatch.setitem(gymnasium.registry, "Blind-v0", spec)
    random_returns.work(["Blind-v0", "--episodes", "2"])
    assert "Blind-v0,2," in capsys.readouterr().out


def test_collect_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert collecting.main([str(tmp_path), "--out", str(tmp_path / "out.zip")]) == 2
    assert capsys.readouterr().err.startswith(f"collect: error: {tmp_path}: no run in it")
    argv = [str(tmp_path / "none"), "--compact", "--out", str(tmp_path / "out.zip")]
    assert collecting.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("collect: error: ") and error.count("\n") == 1
    assert "no such folder" in error
    assert not (tmp_path / "out.zip").exists()


def test_mask_cost(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_cost, "PARTS", {"vectors": mask_cost.PARTS["vectors"]})
    mask_cost.work(["--rounds", "1", "--steps", "16"])
    *_, row = capsys.readouterr().out.splitlines()
    assert row.startswith("| vectors | ")
    assert all(float(cell) > 0 for cell in row.split("|")[2:6])
