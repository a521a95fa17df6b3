"""Runs of ``learn`` are those of the command line; settings by keyword; what agents say."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import typing
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from acktr import A2C, ACKTR, TRPO, Config, ConfigError, preset
from acktr.callbacks import StopAt
from acktr.config import Settings, merge, to_dict
from acktr.envs import PixelSettings
from acktr.interrupts import Stopped
from acktr.runs.checkpoint import CheckpointError, load_checkpoint
from acktr.runs.folder import RunError
from tests.envs.test_pixels import Gray
from tests.envs.test_record import Solvable
from tests.tools.command_line import SMALL, call, table
from tests.tools.toys import SpacesEnv

FAST: Any = {"num_envs": 4, "num_steps": 32, "eval_episodes": 2}
RUN = Path("CartPole-v1/acktr/seed0")


def timeless(path: Path) -> list[dict[str, str]]:
    """The rows of a table without what a clock says."""
    return [
        {k: v for k, v in row.items() if k != "t" and not k.startswith("time/")}
        for row in table(path)
    ]


def test_a_run_is_that_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same rows, settings, checkpoints and curve, and the run can be gone on with by either."""
    monkeypatch.chdir(tmp_path)
    words = ("--total-timesteps", "1024", "--eval-freq", "512", "--checkpoint-freq", "512")
    assert call(capsys, "train", "CartPole-v1", *SMALL, *words)[0] == 0
    agent = ACKTR("CartPole-v1", seed=0, device="cpu", checkpoint_freq=512, **FAST)
    assert agent.learn(1024, run_dir="mine", eval_freq=512) is agent
    assert capsys.readouterr().err == ""
    theirs, ours = Path("runs") / RUN, Path("mine") / RUN
    for name in ("monitor.csv", "progress.csv", "eval.csv"):
        assert timeless(ours / name) == timeless(theirs / name) != []
    one, two = ((run / "config.json").read_text() for run in (ours, theirs))
    assert one == two
    for name in ("last", "best"):
        networks = [
            load_checkpoint(run / "checkpoints" / name)[0]["network"] for run in (ours, theirs)
        ]
        for key, tensor in networks[0].items():
            np.testing.assert_array_equal(tensor, networks[1][key])
    files = {p.name.split(".")[0] for p in ours.iterdir()}
    assert files == {p.name.split(".")[0] for p in theirs.iterdir()}
    facts = [json.loads((run / "protocol.json").read_text()) for run in (ours, theirs)]
    assert facts[0]["environment"] == facts[1]["environment"]
    assert facts[0]["torch_threads"] == facts[1]["torch_threads"] == 1
    assert agent.logger is not None and agent.logger.path == ours

    agent.learn(128, run_dir="mine")
    assert [row["timesteps"] for row in table(ours / "eval.csv")] == ["512", "1024", "1152"]
    code, _, err = call(capsys, "train", "--resume", str(ours), "--total-timesteps", "1280")
    assert code == 0, err
    assert [int(row["timesteps"]) for row in table(ours / "progress.csv")] == [
        *range(128, 1281, 128)
    ]
    assert ACKTR.load(ours).num_timesteps == 1280
    with pytest.raises(RunError, match="already holds a run"):
        ACKTR("CartPole-v1", seed=0, **FAST).learn(128, run_dir="mine")


class Corridor(SpacesEnv):
    """An environment that only this program can make."""

    def __init__(self) -> None:
        box = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
        super().__init__(box, gymnasium.spaces.Discrete(2))


def test_a_run_of_ones_own_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[float] = []

    def told(stats: Any) -> dict[str, float]:
        seen.append(stats.metrics.get("rollout/ep_rew_mean", 0.0))
        return {"own/number": 2.5}

    agent = A2C(Corridor, seed=1, **FAST, record=())
    agent.learn(256, told, run_dir=tmp_path, label="mine", progress_bar=True, tensorboard=False)
    run = tmp_path / "Corridor" / "mine" / "seed1"
    assert "done: Corridor, 256 steps" in capsys.readouterr().err
    assert [row["own/number"] for row in table(run / "progress.csv")] == ["2.5", "2.5"]
    assert len(seen) == 2 and not list(run.glob("events*"))
    code, _, err = call(capsys, "train", "--resume", str(run), "--total-timesteps", "512")
    assert code == 2 and "give it in Python: A2C.load(path, env=...)" in err
    assert A2C.load(run, env=Corridor).num_timesteps == 256


def test_the_protocol_tells_what_is_seen(tmp_path: Path) -> None:
    """Not the pictures of the defaults; see acktr.envs.describe."""
    small = {"num_envs": 2, "num_steps": 8, "eval_episodes": 1}
    chosen = merge(preset("Pixels/PixelGray-v0")[0], small)
    seen = PixelSettings(size=20, frame_skip=3)
    gymnasium.register("PixelGray-v0", entry_point=Gray, max_episode_steps=9)
    try:
        agent = ACKTR("Pixels/PixelGray-v0", config=dataclasses.replace(chosen, pixels=seen))
        agent.learn(16, run_dir=tmp_path)
    finally:
        del gymnasium.registry["PixelGray-v0"]
    (path,) = tmp_path.rglob("protocol.json")
    told = json.loads(path.read_text())["environment"]
    assert (told["size"], told["frame_skip"], told["rendered"]) == (20, 3, [40, 60, 3])


def test_a_resumed_run_keeps_its_schedule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It began where ``learn`` was called, at update 3."""
    rates = {}
    for name, stops in (("straight", ()), ("split", (6,))):
        agent = ACKTR("CartPole-v1", seed=0, **FAST)
        agent.learn(3 * 128)

        def stop(stats: Any, stops: Any = stops) -> None:
            if stats.updates in stops:
                os.kill(os.getpid(), signal.SIGINT)

        try:
            agent.learn(6 * 128, stop, run_dir=tmp_path / name)
        except Stopped:
            assert call(capsys, "train", "--resume", str(tmp_path / name / RUN))[0] == 0
        rows = table(tmp_path / name / RUN / "progress.csv")
        rates[name] = [row["train/learning_rate"] for row in rows]
    assert rates["split"] == rates["straight"] and len(rates["split"]) == 6
    falling = [0.25 * (1 - update / 6 / 1.1) for update in range(6)]
    assert [float(rate) for rate in rates["split"]] == pytest.approx(falling, rel=1e-6)


def test_environments_of_evaluations_alone_are_not_found_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = ACKTR("CartPole-v1", seed=0, **FAST)
    agent.learn(128, run_dir=tmp_path, eval_env="CartPole-v0")
    code, _, err = call(
        capsys, "train", "--resume", str(tmp_path / RUN), "--total-timesteps", "512"
    )
    assert code == 2 and "evaluated in an eval_env of its own" in err


def test_an_evaluation_in_its_own_environment_begins_new_episodes() -> None:
    """Else a transition would go from one episode to another."""
    env = gymnasium.make("CartPole-v1")
    inner: Any = env.unwrapped
    with ACKTR(env, seed=0, num_steps=32) as agent:
        agent.learn(32)
        agent.evaluate("CartPole-v1", episodes=1)
        now = agent.trainer.collector.observations.now
        kept = now.copy()
        agent.evaluate(env, episodes=1)
        now = agent.trainer.collector.observations.now
        assert not np.array_equal(now, kept)
        assert np.array_equal(now[0], np.asarray(inner.state, np.float32))
        agent.learn(32)
        agent.evaluate(agent.envs, episodes=1)
        now = agent.trainer.collector.observations.now
        assert np.array_equal(now[0], np.asarray(inner.state, np.float32))


def test_what_a_program_alone_knows_is_not_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = ACKTR("CartPole-v1", seed=0, learning_rate=lambda left: 0.1 * left, **FAST)
    agent.learn(128, run_dir=tmp_path)
    code, _, err = call(capsys, "train", "--resume", str(tmp_path / RUN))
    assert code == 2 and "trained with a learning_rate function" in err


def test_a_vector_environment_needs_another_to_evaluate_in(tmp_path: Path) -> None:
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    makers = [lambda: gymnasium.make("CartPole-v1")] * 2
    envs = gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=mode)
    agent = ACKTR(envs, seed=0, num_steps=8, eval_episodes=1)
    with pytest.raises(ValueError, match="needs others"):
        agent.learn(16, run_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    agent.learn(16, run_dir=tmp_path, eval_env="CartPole-v1")
    assert len(table(tmp_path / "SyncVectorEnv/acktr/seed0/eval.csv")) == 1


def test_stops(tmp_path: Path) -> None:
    """A callback ends the run with its evaluation; a signal saves it; an error comes out."""
    agent = ACKTR("CartPole-v1", seed=0, **FAST)
    agent.learn(10_000, StopAt(0.0, episodes=1), run_dir=tmp_path)
    assert agent.num_timesteps == 128
    assert [row["timesteps"] for row in table(tmp_path / RUN / "eval.csv")] == ["128"]
    handler = signal.getsignal(signal.SIGINT)

    def stop(stats: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped, match=None) as stopped:
        agent.learn(10_000, stop, run_dir=tmp_path)
    assert "checkpoint at step 256; continue with: acktr train --resume" in stopped.value.note
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    assert load_checkpoint(tmp_path / RUN / "checkpoints/last")[0]["timesteps"] == 256

    def fail(stats: Any) -> None:
        raise ArithmeticError("mine")

    with pytest.raises(ArithmeticError, match="mine"):
        agent.learn(10_000, fail, run_dir=tmp_path)
    assert load_checkpoint(tmp_path / RUN / "checkpoints/last")[0]["timesteps"] == 384


def test_an_update_that_a_callback_fails_at_is_in_the_logs(tmp_path: Path) -> None:
    """As the checkpoint is of it: another call would warn of a gap, which the tables had."""
    with ACKTR("CartPole-v1", seed=0, tensorboard_log=tmp_path / "logs", **FAST) as agent:
        seen: list[int] = []

        def mine(stats: Any) -> dict[str, float]:
            return {"mine/half": stats.timesteps / 2}

        def fail(stats: Any) -> None:
            seen.append(len(stats.episodes))
            if len(seen) == 2:
                raise ArithmeticError("mine")

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ArithmeticError, match="mine"):
                agent.learn(512, [mine, fail], run_dir=tmp_path)
            agent.learn(256, [mine, fail], run_dir=tmp_path)
        for folder in (tmp_path / RUN, tmp_path / "logs" / "acktr_1"):
            rows = table(folder / "progress.csv")
            assert [int(row["timesteps"]) for row in rows] == [128, 256, 384, 512]
            assert [float(row["mine/half"]) for row in rows] == [64, 128, 192, 256]
            assert len(table(folder / "monitor.csv")) == sum(seen)


def test_a_run_is_of_one_environment(tmp_path: Path) -> None:
    """Its files would tell of the last one alone, and its best agent be another's."""
    with ACKTR("CartPole-v1", seed=0, **FAST) as agent:
        agent.learn(128, run_dir=tmp_path)
        agent.learn(128, run_dir=tmp_path, eval_freq=128)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
        agent.set_env("CartPole-v1", env_kwargs={"sutton_barto_reward": True}, num_envs=2)
        with pytest.raises(RunError, match=r"num_envs is 4 in this run and 2 now: give another la"):
            agent.learn(128, run_dir=tmp_path)
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
        agent.learn(128, run_dir=tmp_path, label="second")
        agent.set_env("CartPole-v1", num_envs=4)
        agent.learn(128, run_dir=tmp_path, label="third")
        agent.set_env("CartPole-v1", num_envs=4)  # the same again
        agent.learn(128, run_dir=tmp_path, label="third")
    assert agent.num_timesteps == 640


def test_warnings_of_a_quiet_run_are_pythons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, *rest: Any) -> None:
        if path.name == "last" and rest[1]["timesteps"] == 128:
            raise CheckpointError("no space left")

    monkeypatch.setattr("acktr.runs.session.save_checkpoint", broken)
    agent = ACKTR("CartPole-v1", seed=0, checkpoint_freq=128, **FAST)
    with pytest.warns(UserWarning, match="no space left; training goes on"):
        agent.learn(256, run_dir=tmp_path)


@pytest.mark.parametrize("name", ["label", "eval_freq", "eval_env"])
def test_what_is_for_a_run_needs_one(name: str) -> None:
    arguments: Any = {name: "CartPole-v1" if name != "eval_freq" else 10}
    with pytest.raises(ValueError, match=f"{name} is for the run folder.*run_dir is needed"):
        ACKTR("CartPole-v1", **FAST).learn(10, **arguments)


def test_settings_by_keyword_are_those_of_the_configuration() -> None:
    agent = ACKTR("CartPole-v1", gamma=0.9, num_steps=16, hidden=(8, 4), activation="relu")
    assert (agent.config.gamma, agent.config.num_steps) == (0.9, 16)
    network = agent.config.network
    assert network.hidden == network.critic_hidden == (8, 4)
    assert network.activation == network.critic_activation == "relu"
    expected = dataclasses.replace(preset("CartPole-v1")[0], gamma=0.9, num_steps=16)
    assert dataclasses.replace(agent.config, network=expected.network) == expected
    assert TRPO("CartPole-v1", config=Config.for_env("CartPole-v1", "trpo"), gamma=0.5).config == (
        dataclasses.replace(preset("CartPole-v1", "trpo")[0], gamma=0.5)
    )
    fields = {field.name for field in dataclasses.fields(Config)}
    assert {*typing.get_type_hints(Settings)} - fields == {"hidden", "activation", "memory"}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"n_steps": 5}, "unknown argument n_steps; write num_steps"),
        ({"policy_kwargs": {}}, r"write hidden=\(64, 64\), or network="),
        ({"gama": 1}, "did you mean gamma?"),
        ({"precison": 1}, "did you mean precision?"),
        (
            {"log_std_init": 1},
            r"give it in config=, such as dataclasses\.replace\(Config\.for_env\(env\), \.\.\.\)$",
        ),
        ({"purple": 1}, "there are num_steps, "),
        ({"gamma": 2}, "gamma must be"),
        ({"hidden": (0,)}, "each of network.hidden"),
        ({"hidden": "wide"}, "network.hidden must be a list of integers"),
    ],
)
def test_unfit_settings_get_one_line(arguments: Any, line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        ACKTR("CartPole-v1", **arguments)
    assert "\n" not in str(caught.value)


def test_for_env_is_the_preset() -> None:
    assert Config.for_env("Hopper-v5", preset="paper") == preset("Hopper-v5", "acktr", "paper")[0]
    assert to_dict(Config.for_env("CartPole-v1")) != to_dict(Config(env="CartPole-v1"))
    with pytest.raises(ConfigError, match="algo must be one of"):
        Config.for_env("CartPole-v1", "ppo")


def test_an_agent_says_what_it_is() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ACKTR("CartPole-v1", device="cpu", hidden=(4,), **FAST) as agent:
            assert agent.learn(128) is agent
            assert repr(agent) == (
                "<ACKTR in 4 x CartPole-v1, step 128, 55 parameters, device cpu>"
            )
            assert agent.observation_space.shape == (4,)
            assert agent.action_space == gymnasium.spaces.Discrete(2)
            assert (agent.num_envs, agent.logger) == (4, None)


def test_success_has_its_tags(tmp_path: Path) -> None:
    """Those of Stable-Baselines3, in training and evaluation."""
    agent = ACKTR(Solvable, seed=0, **FAST)
    seen: list[Any] = []
    agent.learn(256, seen.append, run_dir=tmp_path)
    run = tmp_path / "Solvable" / "acktr" / "seed0"
    rates = [row["rollout/success_rate"] for row in table(run / "progress.csv")]
    assert [float(rate) for rate in rates] == pytest.approx(
        [stats.metrics["rollout/success_rate"] for stats in seen], rel=1e-8
    )
    assert 0.3 < float(rates[-1]) < 0.7
    assert table(run / "eval.csv")[0]["mean_is_success"] == "0"  # the first episode of each
    monitor = table(run / "monitor.csv")
    assert {row["is_success"] for row in monitor} == {"0", "1"}


@pytest.mark.parametrize("run_dir", [None, "runs"])
def test_another_environment_is_refused_while_learning(
    run_dir: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call would go on in the old one, which is closed, and be lost."""
    monkeypatch.chdir(tmp_path)
    with ACKTR("CartPole-v1", seed=0, **FAST) as agent:
        for _ in range(2):  # also after the first error
            with pytest.raises(RuntimeError, match="return False from the callback, then call"):
                agent.learn(256, lambda stats: agent.set_env("CartPole-v0"), run_dir=run_dir)
        assert agent.learn(128, lambda stats: False).num_timesteps == 384
        agent.set_env("CartPole-v0")
        assert agent.learn(128).num_timesteps == 512


@pytest.mark.parametrize("workers", [1, 2])
def test_a_closed_agent_can_be_saved_and_moved(workers: int, tmp_path: Path) -> None:
    """Without its episodes, which processes that have ended cannot give."""
    with ACKTR("CartPole-v1", seed=0, env_workers=workers, **FAST) as agent:
        agent.learn(128)
    with pytest.raises(ValueError, match="environments are closed: go on in others with set_env"):
        agent.learn(128)
    agent.save(tmp_path / "agent.zip")
    with ACKTR.load(tmp_path / "agent.zip") as other:
        with pytest.warns(UserWarning, match="new episodes: the environments were closed before"):
            other.learn(128)
        assert other.num_timesteps == 256
    agent.set_env("CartPole-v1")
    with agent, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert agent.learn(128).num_timesteps == 256
