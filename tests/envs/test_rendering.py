"""Rendering of MuJoCo environments: the backend, and the camera that follows the robot."""

from __future__ import annotations

import os
from typing import Any

import gymnasium
import numpy as np
import pytest

from acktr.envs import EnvError, make_single, rendering

MOVING = ("Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "Swimmer", "Walker2d")
FIXED = ("InvertedDoublePendulum-v5", "InvertedPendulum-v5", "Pusher-v5", "Reacher-v5")


def robot_pixels(env: gymnasium.Env[Any, Any]) -> int:
    """How many pixels differ from the background, the same picture without the robot."""
    inner: Any = env.unwrapped
    robot = inner.model.geom_bodyid > 0
    before = inner.model.geom_rgba.copy()
    picture = np.asarray(env.render(), int)
    inner.model.geom_rgba[robot, 3] = 0.0
    background = np.asarray(env.render(), int)
    inner.model.geom_rgba[:] = before
    return int((np.abs(picture - background).max(axis=2) > 30).sum())


def move(env: gymnasium.Env[Any, Any], distance: float) -> None:
    """Put the robot further along x."""
    inner: Any = env.unwrapped
    position = inner.data.qpos.copy()
    position[0] += distance
    inner.set_state(position, inner.data.qvel.copy())


@pytest.mark.parametrize("env_id", [*(f"{name}-v5" for name in MOVING), "HalfCheetah-v4"])
def test_the_camera_follows_the_robot(env_id: str, drawn: None) -> None:
    env = make_single(env_id)
    env.reset(seed=0)
    near = robot_pixels(env)
    assert near > 1000
    move(env, 20.0)
    assert robot_pixels(env) > near / 2
    env.close()


@pytest.mark.parametrize("env_id", FIXED)
def test_robots_that_stay_are_in_the_picture(env_id: str, drawn: None) -> None:
    env = make_single(env_id)
    env.reset(seed=0)
    assert robot_pixels(env) > 500
    env.close()


def test_a_camera_of_the_users_own_is_kept(drawn: None) -> None:
    """It stands still, so that the robot leaves the picture: that is what the others would show."""
    gymnasium.register(
        "toys/StillCheetah-v0",
        entry_point="gymnasium.envs.mujoco.half_cheetah_v5:HalfCheetahEnv",
        kwargs={"camera_id": -1},
    )
    env = make_single("toys/StillCheetah-v0")
    env.reset(seed=0)
    assert robot_pixels(env) > 1000
    move(env, 20.0)
    assert robot_pixels(env) == 0
    env.close()
    del gymnasium.registry["toys/StillCheetah-v0"]


@pytest.mark.parametrize(
    ("given", "working", "tried", "chosen"),
    [
        ("", {"egl", "osmesa"}, ["egl"], "egl"),
        ("", {"osmesa"}, ["egl", "osmesa"], "osmesa"),
        ("", set(), ["egl", "osmesa"], None),
        ("glfw", {"glfw", "egl"}, ["glfw"], "glfw"),
        ("glfw", {"egl"}, ["glfw"], None),
    ],
)
def test_choice_of_the_backend(
    given: str,
    working: set[str],
    tried: list[str],
    chosen: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attempts: list[str] = []

    def works(backend: str) -> bool:
        attempts.append(backend)
        return backend in working

    monkeypatch.setenv("MUJOCO_GL", given)
    monkeypatch.setattr(rendering, "_works", works)
    if chosen is None:
        with pytest.raises(EnvError, match="unset it" if given else "apt install"):
            rendering.choose_backend()
        assert os.environ["MUJOCO_GL"] == given
    else:
        assert rendering.choose_backend() == chosen
        assert os.environ["MUJOCO_GL"] == chosen
    assert attempts == tried


def test_nonsense_does_not_work() -> None:
    assert not rendering._works("nonsense")
