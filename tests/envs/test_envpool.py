"""EnvPool as a backend: the promises of `envs`, and one-line errors."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from acktr import ACKTR
from acktr.envs import EnvError, EnvFault, describe, make_vec
from acktr.envs import workers as number
from acktr.envs.envpool_backend import SAME
from acktr.presets import preset
from tests.tools.command_line import call, table
from tests.tools.envpool import actions_for, limit, make


@pytest.fixture
def envpool() -> None:
    pytest.importorskip("envpool")


def play(vec: Any, steps: int) -> list[bytes]:
    """Everything that a vector environment returns, in bytes."""
    found = [vec.reset()[0]]
    for actions in actions_for(vec, steps):
        *arrays, infos = vec.step(actions)
        found += arrays
        if "episode" in infos:
            found += [infos["final_obs"], infos["_final_obs"], infos["episode"]["r"]]
    vec.close()
    return [array.tobytes() for array in found]


@pytest.mark.usefixtures("envpool")
@pytest.mark.parametrize("env_id", sorted(SAME))
def test_spaces_and_types_are_those_of_gymnasium(env_id: str) -> None:
    ours, theirs = make(env_id, 2), make_vec(env_id, 2)
    for name in ("single_observation_space", "single_action_space"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert ours.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"]
    assert ours.spec.id == env_id
    actions = np.zeros((2, *ours.single_action_space.shape), np.float32)
    for vec in (ours, theirs):
        obs = vec.reset()[0]
        results = vec.step(actions)
        assert obs.dtype == results[0].dtype == ours.single_observation_space.dtype
        assert [array.dtype for array in results[1:4]] == [np.float64, np.bool_, np.bool_]
        assert results[4] == {}
        vec.close()
        vec.close()
    with pytest.raises(EnvFault, match=f"{env_id} is closed"):
        ours.step(actions)


@pytest.mark.usefixtures("envpool")
def test_ends_of_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment 1 falls at step 3 under full force; the others reach their limits."""
    force = np.array([[0.0], [3.0], [0.0]], np.float32)
    for steps in (3, 4):
        limit(monkeypatch, "InvertedPendulum-v5", steps)
        vec = make("InvertedPendulum-v5", 3, seed=1)
        vec.reset()
        for _ in range(2):
            _, _, terminated, truncated, infos = vec.step(force)
            assert not (terminated | truncated).any()
            assert infos == {}
        obs, rewards, terminated, truncated, infos = vec.step(force)
        assert terminated.tolist() == [False, True, False]  # also in the very step of the limit
        assert truncated.tolist() == [steps == 3] * 3
        ended = [steps == 3, True, steps == 3]
        assert infos["_final_obs"].tolist() == infos["_episode"].tolist() == ended
        assert rewards.tolist() == [1.0, 0.0, 1.0]
        assert infos["episode"]["r"].tolist() == [3.0 * ended[0], 2.0, 3.0 * ended[2]]
        assert infos["episode"]["l"].tolist() == [3 * ended[0], 3, 3 * ended[2]]
        assert abs(infos["final_obs"][1, 1]) > 0.2  # fallen
        assert (infos["final_obs"].any(1) == ended).all()
        assert (np.abs(obs[ended]) <= 0.01).all()  # a new episode already
        after = vec.step(force)
        assert (after[0][1] != obs[1]).all()  # no step is wasted
        assert after[3].tolist() == [steps == 4, False, steps == 4]
        vec.close()


@pytest.mark.usefixtures("envpool")
@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Hopper-v5"])
def test_seeds_and_threads(env_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, env_id, 37)
    wanted = play(make(env_id, 5, seed=3), 120)
    for threads in (2, 5, 9):
        vec = make(env_id, 5, seed=3, threads=threads)
        assert number(vec) == min(threads, 5)
        assert play(vec, 120) == wanted
    assert play(make(env_id, 5, seed=4), 120)[0] != wanted[0]
    vec = make(env_id, 5, seed=9)
    first = vec.reset()[0]
    assert vec.reset()[0].tobytes() != first.tobytes()
    assert vec.reset(seed=3)[0].tobytes() == wanted[0]
    assert make(env_id, 2, seed=3).reset()[0].tobytes() == wanted[0][: len(wanted[0]) // 5 * 2]
    vec.close()


@pytest.mark.usefixtures("envpool")
def test_all_usable_cores_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acktr.envs.envpool_backend.usable_cores", lambda: 3)
    for num_envs, threads in ((8, 3), (2, 2)):
        vec = make_vec("Hopper-v5", num_envs, env_workers="auto", env_backend="envpool")
        assert number(vec) == threads
        vec.close()


@pytest.mark.usefixtures("envpool")
def test_reset_of_some(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, "HalfCheetah-v5", 10)
    vec = make("HalfCheetah-v5", 3)
    mask = np.array([False, True, False])
    vec.reset(options={"reset_mask": mask})  # the first one is for all
    for _ in range(4):
        obs = vec.step(np.ones((3, 6), np.float32))[0]
    again = vec.reset(options={"reset_mask": mask})[0]
    assert ((again == obs).all(1) == ~mask).all()
    ends = [vec.step(np.ones((3, 6), np.float32))[3].tolist() for _ in range(10)]
    assert ends[5] == [True, False, True]
    assert ends[9] == [False, True, False]
    with pytest.raises(EnvError, match="cannot seed some"):
        vec.reset(seed=1, options={"reset_mask": mask})
    with pytest.raises(EnvError, match="reset_mask must be 3 booleans"):
        vec.reset(options={"reset_mask": ~mask[:2]})
    with pytest.raises(EnvError, match=r"reset options \['x'\]"):
        vec.reset(options={"x": 1})
    vec.close()


class Broken:
    """In place of a pool: its step raises, or gives NaN."""

    def __init__(self, pool: Any, error: BaseException | None) -> None:
        self._pool, self._error = pool, error
        self.reset = pool.reset

    def step(self, actions: Any) -> Any:
        if self._error is not None:
            raise self._error
        obs, *rest = self._pool.step(actions)
        obs = obs.copy()
        obs[1, 2] = np.nan
        return obs, *rest


@pytest.mark.usefixtures("envpool")
def test_faults_name_the_environment() -> None:
    vec = make("Hopper-v5", 2)
    vec.reset()
    inner = vec.unwrapped
    pool, inner._pool = inner._pool, Broken(inner._pool, None)
    with pytest.raises(EnvFault, match=r"environment 1 of Hopper-v5 .*observation at step 1"):
        vec.step(np.zeros((2, 3), np.float32))
    inner._pool = Broken(pool, RuntimeError("no\nmemory"))
    with pytest.raises(EnvFault, match="Hopper-v5 failed at step 2: RuntimeError: no memory"):
        vec.step(np.zeros((2, 3), np.float32))
    vec.close()


@pytest.mark.usefixtures("envpool")
def test_an_interrupted_step_cuts_the_episodes() -> None:
    vec = make("Hopper-v5", 2)
    vec.reset()
    zeros = np.zeros((2, 3), np.float32)
    last = vec.step(zeros)[0]
    vec.unwrapped._pool = Broken(vec.unwrapped._pool, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        vec.step(zeros)
    obs, rewards, terminated, truncated, infos = vec.step(zeros)
    assert not rewards.any()
    assert not terminated.any()
    assert truncated.all()
    np.testing.assert_array_equal(infos["final_obs"], last)
    assert infos["episode"]["l"].tolist() == [2, 2]
    assert (obs != last).all()
    assert not vec.step(zeros)[3].any()
    vec.close()


@pytest.mark.usefixtures("envpool")
def test_training_and_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ("train", "--env", "Hopper-v5", "--env-backend", "envpool", "--num-steps", "64")
    options = ("--total-timesteps", "1024", "--eval-episodes", "1", "--device", "cpu")
    assert call(capsys, *argv, *options)[0] == 0
    run = Path("runs/Hopper-v5/acktr/seed0")
    assert json.loads((run / "config.json").read_text())["env_backend"] == "envpool"
    facts = json.loads((run / "protocol.json").read_text())["environment"]
    assert facts["kind"] == "envpool"
    assert "mujoco" not in facts
    rows = len(table(run / "monitor.csv"))
    assert call(capsys, "train", "--resume", str(run), "--total-timesteps", "2048")[0] == 0
    assert len(table(run / "monitor.csv")) > rows > 5
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"env_backend": "gymnasium"}))
    code, _, err = call(capsys, "train", "--resume", str(run), "--total-timesteps", "4096")
    assert code == 2
    assert "env_backend is 'gymnasium' but the checkpoint was trained with 'envpool'" in err


@pytest.mark.usefixtures("envpool")
def test_agents() -> None:
    config = dataclasses.replace(preset("Hopper-v5")[0], num_steps=4, env_backend="envpool")
    agent = ACKTR("Hopper-v5", config)
    assert type(agent.envs.unwrapped).__name__ == "EnvPoolEnvs"
    agent.learn(64)
    agent.close()


def test_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "envpool", None)
    code, _, err = call(capsys, "train", "--env", "Hopper-v5", "--env-backend", "envpool")
    assert code == 2
    assert err.splitlines() == [
        "acktr: error: env_backend 'envpool' needs a package that is missing:"
        " pip install 'acktr[envpool]' (Linux)"
    ]
    assert not list(tmp_path.iterdir())


def test_a_package_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "envpool.py").write_text("raise ImportError('libGL.so:\\nno such file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "envpool", raising=False)
    message = r"^the package envpool cannot be imported: libGL.so: no such file$"
    with pytest.raises(EnvError, match=message):
        make("Hopper-v5", 2)


def test_another_version_is_no_substitute(monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.SimpleNamespace(list_all_envs=lambda: ["Hopper-v4", "Ant-v4", "Pong-v5"])
    monkeypatch.setitem(sys.modules, "envpool", old)
    with pytest.raises(EnvError) as caught:
        make("Hopper-v5", 2)
    assert str(caught.value) == "the installed EnvPool has no Hopper-v5; it has Ant-v4, Hopper-v4"


def test_a_package_that_makes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    box = gymnasium.spaces.Box(-1.0, 1.0, (2,))
    pool = types.SimpleNamespace(observation_space=box, action_space=box)
    other = types.SimpleNamespace(list_all_envs=lambda: ["Hopper-v5"])
    monkeypatch.setitem(sys.modules, "envpool", other)
    with pytest.raises(EnvError, match=r"Hopper-v5 could not be made by EnvPool: .*make_gymnasium"):
        make("Hopper-v5", 2)
    other.make_gymnasium = lambda *args, **settings: pool
    with pytest.raises(EnvError, match=r"EnvPool has the space Box.* where Gymnasium has Box"):
        make("Hopper-v5", 2)


@pytest.mark.parametrize(
    "env_id", ["PongNoFrameskip-v4", "ALE/Pong-v5", "CartPole-v1", "Humanoid-v5", "Pusher-v4"]
)
def test_other_environments_are_refused(env_id: str) -> None:
    with pytest.raises(EnvError) as caught:
        make(env_id, 2)
    message = str(caught.value)
    assert message.startswith(f"env_backend 'envpool' is not for {env_id}, only for")
    assert "\n" not in message
    assert "HalfCheetah-v5" in message


def test_other_versions_of_known_names_are_refused() -> None:
    spec = gymnasium.registry["Hopper-v5"]
    changed = dataclasses.replace(spec, kwargs={"frame_skip": 2})
    try:
        gymnasium.registry["Hopper-v5"] = changed
        with pytest.raises(EnvError, match="'envpool' is not for Hopper-v5"):
            make("Hopper-v5", 2)
    finally:
        gymnasium.registry["Hopper-v5"] = spec


def test_bad_arguments() -> None:
    with pytest.raises(EnvError, match="env_backend must be gymnasium or envpool, got 'x'"):
        make_vec("Hopper-v5", 2, env_backend="x")  # type: ignore[arg-type]
    with pytest.raises(EnvError, match="does not render"):
        make_vec("Hopper-v5", 2, env_backend="envpool", render_mode="rgb_array")
    with pytest.raises(EnvError, match="env_workers must be 'auto' or an integer"):
        make("Hopper-v5", 2, threads=0)


def test_description() -> None:
    facts = describe("Hopper-v5", env_backend="envpool")
    assert (facts["kind"], facts["max_episode_steps"]) == ("envpool", 1000)
    assert describe("Hopper-v5")["kind"] == "gymnasium"
