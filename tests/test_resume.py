"""A run that is stopped and resumed equals the one that was not, bit for bit."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acktr.config import Config, preset
from acktr.envs import AtariSettings
from acktr.runs.checkpoint import load_checkpoint, save_checkpoint
from acktr.train import Trainer, training_envs

linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are for Linux")


def config(env: str, algo: str = "acktr", **changes: Any) -> Config:
    chosen, _ = preset(env, algo)
    return dataclasses.replace(chosen, **{"num_steps": 16, "num_envs": 4, "seed": 5, **changes})


def numbers(tree: Any) -> list[Any]:
    """The leaves of a state, without what the clock says."""
    if isinstance(tree, dict):
        items = sorted((key, each) for key, each in tree.items() if key != "seconds")
        return [leaf for key, each in items for leaf in (key, *numbers(each))]
    if isinstance(tree, list | tuple):
        return [leaf for each in tree for leaf in numbers(each)]
    if isinstance(tree, torch.Tensor | np.ndarray):
        array = np.asarray(tree)
        return [array.dtype.str, array.shape, array.tobytes()]
    return [tree]


def rows(trainer: Trainer, updates: int) -> list[Any]:
    """What so many updates report, without what the clock says."""
    found: list[Any] = []
    for stats in trainer.run(1_000_000):
        metrics = {k: v for k, v in stats.metrics.items() if not k.startswith("time/")}
        episodes = [(each.reward, each.length, each.info) for each in stats.episodes]
        found.append((stats.timesteps, metrics, episodes))
        if len(found) == updates:
            break
    return found


def require_same_halves(tmp_path: Path, first: Config, second: Config, updates: int) -> None:
    """Train, save, and go on in new objects; all must be as without the break."""
    with closing(training_envs(first)) as envs:
        straight = Trainer(first, envs)
        before, state = rows(straight, updates), straight.state_dict()
        assert state["collector"]["unsaved"] is None
        save_checkpoint(tmp_path / "half", state, {})
        after, end = rows(straight, updates), straight.state_dict()
    with closing(training_envs(second)) as envs:
        resumed = Trainer(second, envs)
        resumed.load_state_dict(load_checkpoint(tmp_path / "half")[0])
        assert numbers(resumed.state_dict()) == numbers(state)
        assert rows(resumed, updates) == after
        assert numbers(resumed.state_dict()) == numbers(end)
    assert sum(len(episodes) for *_, episodes in before + after) > 0


@linux
@pytest.mark.parametrize(
    ("env", "algo", "workers", "updates"),
    [
        ("CartPole-v1", "acktr", (1, 2), 6),
        ("CartPole-v1", "trpo", (1, 1), 6),
        ("Pendulum-v1", "a2c", (2, 1), 9),
        ("Hopper-v5", "acktr", (1, 1), 4),
        ("Ant-v5", "a2c", (2, 2), 6),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(
    env: str, algo: str, workers: tuple[int, int], updates: int, tmp_path: Path
) -> None:
    first, second = (config(env, algo, env_workers=number) for number in workers)
    require_same_halves(tmp_path, first, second, updates)


def test_atari_resumes(tmp_path: Path) -> None:
    atari = AtariSettings(reseed_steps=60, max_frames=400, screen_size=36)
    chosen = config("BreakoutNoFrameskip-v4", "a2c", num_envs=2, num_steps=30, atari=atari)
    require_same_halves(tmp_path, chosen, chosen, 4)


@pytest.mark.slow
@pytest.mark.parametrize("sticky", [0.0, 0.25])
@pytest.mark.parametrize(
    "game", ["Breakout", "Pong", "Qbert", "SpaceInvaders", "Seaquest", "BeamRider"]
)
def test_six_atari_games_resume(game: str, sticky: float, tmp_path: Path) -> None:
    atari = AtariSettings(reseed_steps=300, max_frames=4000, sticky=sticky)
    chosen = config(f"{game}NoFrameskip-v4", num_steps=20, atari=atari)
    require_same_halves(tmp_path, chosen, chosen, 30)


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["acktr", "a2c", "trpo"])
@pytest.mark.parametrize("env", ["Ant-v5", "HalfCheetah-v5", "Humanoid-v5", "Walker2d-v5"])
def test_mujoco_resumes_with_each_algorithm(env: str, algo: str, tmp_path: Path) -> None:
    chosen = config(env, algo, env_workers=2)
    require_same_halves(tmp_path, chosen, chosen, 70)
