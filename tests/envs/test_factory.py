"""Construction by id: errors, warnings, descriptions, seeds."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from acktr.envs import EnvError, describe, env_seeds, is_atari, make_single, make_vec


def message(env_id: str) -> str:
    with pytest.raises(EnvError) as caught:
        make_vec(env_id, 1)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("env_id", "parts"),
    [
        ("PongNoFramskip-v4", ["did you mean 'PongNoFrameskip-v4'"]),
        ("pongnoframeskip-v4", ["did you mean 'PongNoFrameskip-v4'"]),
        ("Pong-v4", ["random number of frames", "'PongNoFrameskip-v4'", "'ALE/Pong-v5'"]),
        ("Breakout-v5", ["did you mean 'ALE/Breakout-v5'"]),
        ("HalfCheeta-v5", ["did you mean 'HalfCheetah-v5'"]),
        ("HalfCheetah-v9", ["v9", "did you mean 'HalfCheetah-v5'"]),
        ("HalfCheetah-v3", ["HalfCheetah-v5 or HalfCheetah-v4"]),
        ("Pusher-v2", ["Pusher-v5 or Pusher-v4"]),
        ("nosuchmodule:Foo-v0", ["cannot import module 'nosuchmodule'"]),
        ("json:Foo-v0", ["unknown environment 'Foo-v0'"]),
        ("json:JSONEncoder", ["gymnasium.register('JSONEncoder-v0', JSONEncoder) in json and w"]),
        ("a:b:Foo-v0", ["module:Id-v0"]),
        (":Foo-v0", ["module:Id-v0"]),
        ("NoNamespace/Foo-v0", ["Namespace NoNamespace not found"]),
        ("not an id", ["Malformed"]),
        ("", ["environment id must be"]),
        ("GymV21Environment-v0", ["package that is missing", "shimmy"]),
    ],
)
def test_refused_ids(env_id: str, parts: list[str]) -> None:
    text = message(env_id)
    for part in parts:
        assert part in text


def test_missing_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "Box2D", None)
    for name in list(sys.modules):
        if name.startswith("gymnasium.envs.box2d"):
            monkeypatch.delitem(sys.modules, name)
    assert "Box2D is not installed" in message("LunarLander-v3")


def test_is_atari() -> None:
    assert is_atari("ALE/Pong-v5")
    assert is_atari("PongNoFrameskip-v4")
    assert is_atari("ale_py:ALE/Pong-v5")
    assert not is_atari("HalfCheetah-v5")
    with pytest.raises(EnvError):
        is_atari("NoSuchGame-v0")


def test_module_ids_and_unversioned_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_envs_module.py").write_text(
        "import gymnasium\n"
        "from tests.tools.toys import CountingEnv\n"
        "gymnasium.register('Mine-v7', entry_point=CountingEnv, kwargs={'truncate_at': 2})\n"
    )
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    vec = make_vec("my_envs_module:Mine-v7", 2)
    vec.reset()
    vec.step(np.zeros(2, np.int64))
    assert vec.step(np.zeros(2, np.int64))[3].all()
    vec.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert describe("my_envs_module:Mine")["env_id"] == "Mine-v7"
    assert "ZeroDivisionError" in message("broken_module:Mine-v7")


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "HalfCheetah-v4", "Hopper-v4"])
def test_mujoco_says_nothing(
    env_id: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo 4 writes MUJOCO_LOG.TXT into the working directory
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vec = make_vec(env_id, 2)
        obs, _ = vec.reset(seed=0)
        vec.step(np.zeros(vec.action_space.shape, np.float32))
        vec.close()
        vec.close()
    assert np.isfinite(obs).all()
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_mujoco_messages_other_than_deprecations_are_kept() -> None:
    mujoco = pytest.importorskip("mujoco")
    from acktr.envs.registry import lookup
    from acktr.envs.single import _forward, quiet_mujoco

    before = mujoco.get_mju_user_warning()
    with quiet_mujoco(lookup("HalfCheetah-v5")):
        assert mujoco.get_mju_user_warning() is not before
    assert mujoco.get_mju_user_warning() is before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _forward("attribute 'x' is deprecated and will be removed")
    with pytest.warns(RuntimeWarning, match="nan in QACC"):
        _forward("nan in QACC")


@pytest.mark.parametrize("make", [make_single, lambda env_id: make_vec(env_id, 2)])
def test_mujoco_that_cannot_be_imported_is_told(
    make: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> Any:
        assert name == "mujoco"
        raise RuntimeError("invalid value for environment variable MUJOCO_GL: foo")

    monkeypatch.setattr("acktr.envs.single.importlib.import_module", fail)
    why = "^MuJoCo cannot be imported: invalid value .* MUJOCO_GL: foo; unset it or try egl$"
    with pytest.raises(EnvError, match=why):
        make("HalfCheetah-v5")


@pytest.mark.parametrize("env_id", ["CartPole-v1", "HalfCheetah-v5", "ALE/Pong-v5"])
def test_description_is_json(env_id: str) -> None:
    facts = describe(env_id)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["env_id"] == env_id
    assert facts["autoreset_mode"] == "SameStep"
    assert all(isinstance(v, str | int | float | bool | None) for v in facts.values())


def test_description_of_time_limit() -> None:
    assert describe("CartPole-v1")["max_episode_steps"] == 500
    assert describe("HalfCheetah-v4")["max_episode_steps"] == 1000


@pytest.mark.parametrize("env_id", ["CartPole-v1", "HalfCheetah-v5"])
def test_seeds(env_id: str) -> None:
    vec = make_vec(env_id, 3, seed=7)
    first, again = vec.reset()[0], vec.reset()[0]
    np.testing.assert_array_equal(first, vec.reset(seed=7)[0])
    assert (first != again).any()
    assert (first != vec.reset(seed=8)[0]).any(axis=1).all()
    single = make_single(env_id, render_mode=None)
    np.testing.assert_array_equal(single.reset(seed=env_seeds(7, 3)[1])[0], first[1])
    single.close()
    vec.close()


def test_env_seeds_are_distinct_between_runs_and_nested() -> None:
    seeds = [s for run in range(50) for s in env_seeds(run, 32)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**31 for s in seeds)
    assert env_seeds(3, 8) == env_seeds(3, 32)[:8]


def test_render_modes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(EnvError, match="cannot render 'nosuch'; it offers"):
            make_vec("CartPole-v1", 1, render_mode="nosuch")
        with pytest.raises(EnvError, match="HalfCheetah-v5"):
            make_single("HalfCheetah-v5", render_mode="nosuch")


def test_what_cannot_be_rendered_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pygame", None)
    env = make_single("CartPole-v1")
    env.reset(seed=0)
    with pytest.raises(EnvError, match=r"CartPole-v1 cannot be rendered: .*pygame"):
        env.render()
    env.close()


class Undrawn(gymnasium.Env[Any, Any]):
    """An environment that takes no render_mode."""

    observation_space = gymnasium.spaces.Discrete(2)
    action_space = gymnasium.spaces.Discrete(2)


class UndrawnOfSize(Undrawn):
    """One with another argument."""

    def __init__(self, size: int = 3) -> None:
        self.size = size


@pytest.mark.parametrize("maker", [Undrawn, UndrawnOfSize])
def test_what_takes_no_render_mode_is_told_what_to_write(maker: type[Undrawn]) -> None:
    gymnasium.register("toys/Undrawn-v0", maker)
    try:
        with pytest.raises(EnvError, match=r"no render_mode: write def __init__\(self, render_mod"):
            make_single("toys/Undrawn-v0")
        with pytest.raises(EnvError, match="toys/Undrawn-v0 could not be made: TypeError"):
            make_single("toys/Undrawn-v0", env_kwargs={"weight": 3})
    finally:
        del gymnasium.registry["toys/Undrawn-v0"]
