"""Runs from pictures that are stopped and resumed equal those that were not, bit for bit."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from acktr.config import Config
from acktr.environments import training_envs
from acktr.envs import EnvError, PixelSettings, rendering
from acktr.runs.checkpoint import load_checkpoint, save_checkpoint
from acktr.train import Trainer
from tests.test_resume import config, require_killed_is_the_same, require_same_halves, rows

HOPPER = "Pixels/Hopper-v5"


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "")
    try:
        rendering.choose_backend()
    except EnvError:
        pytest.skip("no EGL and no OSMesa here")


def small(algo: str, **changes: Any) -> Config:
    pixels = PixelSettings(size=16, frame_stack=2, frame_skip=4)
    return config(HOPPER, algo, num_envs=2, num_steps=8, pixels=pixels, **changes)


@pytest.mark.parametrize("algo", ["acktr", pytest.param("a2c", marks=pytest.mark.slow)])
def test_pictures_go_on(algo: str, tmp_path: Path) -> None:
    require_same_halves(tmp_path, small(algo), small(algo, env_workers=2), 6)


def test_another_renderer_starts_new_episodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = small("a2c")
    with closing(training_envs(chosen)) as envs:
        trainer = Trainer(chosen, envs)
        rows(trainer, 2)
        save_checkpoint(tmp_path / "half", trainer.state_dict(), {})
    monkeypatch.setattr("acktr.envs.pixels.drawn_by", lambda: "another driver")
    with closing(training_envs(chosen)) as envs:
        trainer = Trainer(chosen, envs)
        trainer.load_state_dict(load_checkpoint(tmp_path / "half")[0])
        trainer.begin()
        assert trainer.restarts == 1
        assert trainer.restarted is not None
        assert "environments start new episodes: environment 0 of" in trainer.restarted
        assert "here another driver draws" in trainer.restarted
        assert rows(trainer, 1)[0][1]["rollout/restarts"] == 1


@pytest.mark.slow
def test_killed_processes_leave_the_same_files(tmp_path: Path) -> None:
    settings = "--num-envs 4 --num-steps 32 --total-timesteps 2560 --checkpoint-freq 256"
    require_killed_is_the_same(HOPPER, f"{settings} --pixels.size 36", tmp_path)
