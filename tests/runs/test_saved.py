"""Agents that are read from disk: which file is meant, what is checked, where they go on."""

from __future__ import annotations

import copy
import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from acktr.config import Config, ConfigError, merge, preset, to_dict
from acktr.environments import training_envs
from acktr.interrupts import Interrupts
from acktr.runs.checkpoint import (
    CheckpointError,
    checkpoint_path,
    load_checkpoint,
    save_checkpoint,
    set_aside,
)
from acktr.runs.folder import RunError, RunFolder, run_path
from acktr.runs.saved import SavedAgent, find_agent, find_checkpoint, play, read_agent, run_meta
from acktr.runs.start import start
from acktr.train import Trainer


def config() -> Config:
    small = {"num_envs": 2, "num_steps": 8, "total_timesteps": 32, "device": "cpu"}
    small |= {"eval_episodes": 1, "checkpoint_freq": 32, "algo": "a2c"}
    return merge(preset("CartPole-v1", "a2c")[0], small)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("saved") / "runs"
    threads = torch.get_num_threads()
    start(config(), runs, "test", Interrupts(), ["acktr"], lambda folder, config: None)
    torch.set_num_threads(threads)
    return run_path(runs, config())


@pytest.fixture
def agent(run: Path) -> SavedAgent:
    return find_agent(run, "last")


def test_what_a_checkpoint_says_beside_its_state(run: Path) -> None:
    state, meta = load_checkpoint(RunFolder(run).last)
    wanted = {"format": "acktr-run", "config": to_dict(config()), "timesteps": 32, "score": None}
    assert run_meta(config(), state, None) == {**wanted, "seconds": state["seconds"]}
    assert meta.keys() == run_meta(config(), state, None).keys() and meta["format"] == "acktr-run"


def test_an_agent_goes_on_in_another_environment_without_the_settings_of_its_own(
    agent: SavedAgent,
) -> None:
    own = dataclasses.replace(
        agent.config, env_kwargs={"sutton_barto_reward": True}, wrappers=("a:B",)
    )
    agent = dataclasses.replace(agent, config=own)
    assert agent.place(None) == ("CartPole-v1", own)
    assert agent.place("CartPole-v1") == ("CartPole-v1", own)
    there = dataclasses.replace(own, env="CartPole-v0", env_kwargs={}, wrappers=())
    assert agent.place("CartPole-v0") == ("CartPole-v0", there)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("timesteps", 2**53, "timesteps must be a count, not 9007199254740992"),
        ("timesteps", True, "timesteps must be a count, not True"),
        ("updates", -1, "updates must be a count, not -1"),
        ("seconds", float("inf"), "seconds must be a duration, not inf"),
        ("seconds", -1.0, "seconds must be a duration, not -1.0"),
        ("seconds", "1", "seconds must be a duration, not '1'"),
        ("network", None, "it holds no state of the network"),
        ("learner", [], "it holds no state of the learner"),
        ("collector", 1, "it holds no state of the collector"),
    ],
)
def test_a_state_that_no_trainer_has_is_refused(
    name: str, value: Any, said: str, run: Path, tmp_path: Path
) -> None:
    state, meta = load_checkpoint(RunFolder(run).last)
    save_checkpoint(tmp_path / "a", {**state, name: value}, meta)
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{tmp_path}/a: {said}')}$"):
        read_agent(tmp_path / "a")


def test_counts_and_durations_at_their_bounds_are_taken(run: Path, tmp_path: Path) -> None:
    state, meta = load_checkpoint(RunFolder(run).last)
    state |= {"timesteps": 2**53 - 1, "updates": 0, "seconds": 0}
    save_checkpoint(tmp_path / "a", state, {**meta, "score": 1.5, "env_origin": 3})
    found = read_agent(tmp_path / "a")
    assert (found.timesteps, found.score, found.env_origin) == (2**53 - 1, 1.5, None)
    for score in (float("nan"), 1, "1"):
        save_checkpoint(tmp_path / "a", state, {**meta, "score": score})
        assert read_agent(tmp_path / "a").score is None


def test_a_configuration_that_is_none_is_named(run: Path, tmp_path: Path) -> None:
    state, meta = load_checkpoint(RunFolder(run).last)
    save_checkpoint(tmp_path / "a", state, {**meta, "config": {**meta["config"], "gamma": 2}})
    with pytest.raises(CheckpointError, match=r"a: no usable configuration in it \(.*gamma must"):
        read_agent(tmp_path / "a")


def test_which_checkpoint_a_name_means(run: Path, tmp_path: Path) -> None:
    last = RunFolder(run).last
    assert find_checkpoint(run) == last and find_checkpoint(last) == last
    state, meta = load_checkpoint(last)
    one = tmp_path / "one"
    assert find_checkpoint(one) == one
    save_checkpoint(tmp_path / "one.zip", state, meta)
    assert find_checkpoint(one) == tmp_path / "one.zip"
    save_checkpoint(one, state, meta)
    assert find_checkpoint(one) == one
    assert find_checkpoint(tmp_path / "one.zip") == tmp_path / "one.zip"


def test_a_folder_with_a_configuration_is_a_run(run: Path, tmp_path: Path) -> None:
    """Also where a checkpoint lies in it, which alone would be the one that is meant."""
    shutil.copytree(run, tmp_path / "run")
    state, meta = load_checkpoint(RunFolder(run).last)
    for path in (tmp_path / "run", tmp_path / "alone"):
        save_checkpoint(tmp_path / "new", {**state, "timesteps": 7}, meta)
        path.mkdir(exist_ok=True)
        for file in (tmp_path / "new").iterdir():
            shutil.copy(file, path / file.name)
    assert find_agent(tmp_path / "run", "last").timesteps == 32
    assert find_agent(tmp_path / "alone", "last").timesteps == 7
    assert find_agent(run, "last", "a:network").network == "a:network"
    assert find_agent(run, "last").network is None
    with pytest.raises(RunError, match="no such folder; a run folder or a checkpoint is needed"):
        find_agent(tmp_path / "none", "last")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "best", ignore_errors=True)
    with pytest.raises(RunError, match="no best checkpoint yet; use --checkpoint last"):
        find_agent(tmp_path / "run", "best")


def test_episodes_that_do_not_fit_begin_anew_and_say_why(agent: SavedAgent) -> None:
    state = copy.deepcopy(agent.state)
    assert state["collector"]["envs"] is not None
    state["collector"]["returns"] = "nothing"
    envs = training_envs(agent.config)
    try:
        trainer = Trainer(agent.config, envs)
        dataclasses.replace(agent, state=state).restore(trainer)
        assert trainer.timesteps == 32
        with pytest.raises(CheckpointError, match=r"^a: "):
            dataclasses.replace(agent, path=Path("a"), state={**state, "network": {}}).restore(
                trainer
            )
    finally:
        envs.close()


def test_playing_is_told_the_episodes_asked_for_by_seed(agent: SavedAgent) -> None:
    asked: dict[str, Any] = {"num_envs": 2, "deterministic": False, "device": "cpu"}
    found = [play(agent, 3, seed=seed, **asked) for seed in (0, 0, 1)]
    assert [len(each.returns) for each in found] == [3, 3, 3]
    assert found[0] == found[1] != found[2]
    alone = play(agent, 3, seed=0, **{**asked, "num_envs": 0})
    assert len(alone.returns) == 3
    greedy = play(agent, 3, seed=0, **{**asked, "deterministic": True})
    assert greedy != found[0]
    with pytest.raises(ConfigError, match="device"):
        play(agent, 1, seed=0, **{**asked, "device": "nowhere"})
    elsewhere = dataclasses.replace(agent, env_origin="made by a function")
    with pytest.raises(CheckpointError, match="was made by a function, which no file can bring"):
        play(elsewhere, 1, seed=0, **asked)


@pytest.mark.parametrize("given", [None, 5, b"agent"])
def test_what_is_no_path_is_refused_in_a_line(given: object) -> None:
    with pytest.raises(TypeError) as caught:
        checkpoint_path(given)
    assert str(caught.value) == (
        f"an agent is saved to a path and loaded from one, got {type(given).__name__}: write"
        " 'agent.zip' for one file (its bytes: Path('agent.zip').read_bytes()), 'agent' for a"
        " folder"
    )


def test_a_damaged_checkpoint_is_set_aside_in_place_of_an_older_one(tmp_path: Path) -> None:
    for number in range(2):
        save_checkpoint(tmp_path / "last", {"number": number}, {})
        set_aside(tmp_path / "last")
        assert [path.name for path in tmp_path.iterdir()] == ["last.damaged"]
    assert load_checkpoint(tmp_path / "last.damaged")[0] == {"number": 1}
    set_aside(tmp_path / "last")
    assert load_checkpoint(tmp_path / "last.damaged")[0] == {"number": 1}


def test_one_file_is_written_into_folders_that_are_missing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a" / "b" / "agent.zip", {"n": 1}, {})
    assert load_checkpoint(tmp_path / "a" / "b" / "agent.zip")[0] == {"n": 1}
