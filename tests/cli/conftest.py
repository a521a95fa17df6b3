from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from acktr.cli.main import main
from tests.tools.command_line import RUN, TRAIN


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 1,024 steps, stopped where it was told to end."""
    runs = tmp_path_factory.mktemp("trained")
    argv = [*TRAIN, "--total-timesteps", "1024", "--checkpoint-freq", "512"]
    assert main([*argv, "--eval-freq", "512", "--run-dir", str(runs)]) == 0
    return runs / "CartPole-v1/acktr/seed0"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path) -> Path:
    """A working directory with a copy of the run in it."""
    shutil.copytree(trained, tmp_path / RUN)
    monkeypatch.chdir(tmp_path)
    return tmp_path
