"""What changes nothing of an agent is told in one line that says what to write."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from acktr import ACKTR, ConfigError
from acktr.runs.folder import RunError
from tests.tools.networks import Small


@pytest.fixture(scope="module")
def agent() -> Iterator[ACKTR]:
    with ACKTR("CartPole-v1", num_envs=2, num_steps=8, hidden=(4,), env_workers=1) as made:
        yield made


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("env", "use set_env(...)"),
        ("envs", "use set_env(...)"),
        ("seed", "give it before: ACKTR(env, seed=...)"),
        ("device", "give it before: ACKTR(env, device=...)"),
        ("network", "give it before: ACKTR(env, network=...)"),
        ("num_envs", "give it before: ACKTR(env, num_envs=...)"),
    ],
)
def test_attributes_that_would_change_nothing(name: str, hint: str, agent: ACKTR) -> None:
    with pytest.raises(AttributeError, match=re.escape(hint)) as told:
        setattr(agent, name, 3)
    assert str(told.value).startswith(f"{name} cannot be set in an agent that is made")
    assert "\n" not in str(told.value)


def test_an_environment_that_is_named_has_no_arguments_and_wrappers() -> None:
    """Though it is the id of training: None alone means environments of that kind."""
    short: dict[str, Any] = {"max_episode_steps": 7}
    with ACKTR("Pendulum-v1", num_envs=2, num_steps=8, hidden=(4,), env_kwargs=short) as agent:
        assert agent.evaluate(episodes=1).lengths == (7,)
        assert agent.evaluate("Pendulum-v1", 1).lengths == (200,)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gamma", "settings stay those of training: a new agent with gamma= takes the weights"),
        ("seed", "settings stay those of training: a new agent with seed= takes the weights"),
        ("custom_objects", "write network=, auxiliary= or learning_rate="),
        ("purple", "there are env, device, num_envs"),
    ],
)
def test_arguments_that_load_does_not_have(
    name: str, hint: str, agent: ACKTR, tmp_path: Path
) -> None:
    agent.save(tmp_path / "agent")
    others: dict[str, Any] = {name: 1}
    with pytest.raises(ConfigError, match=re.escape(f"load() has no argument {name}; ")) as told:
        ACKTR.load(tmp_path / "agent", **others)
    assert hint in str(told.value) and "\n" not in str(told.value)


def test_a_folder_of_another_agent(agent: ACKTR, tmp_path: Path) -> None:
    """A program has no --resume and no --run-dir."""
    agent.learn(16, run_dir=tmp_path)
    assert agent.logger is not None
    folder = str(agent.logger.path)
    with (
        ACKTR("CartPole-v1", num_envs=2, num_steps=8, hidden=(4,), env_workers=1) as other,
        pytest.raises(RunError, match="already holds a run") as told,
    ):
        other.learn(16, run_dir=tmp_path)
    said = f"ACKTR.load({folder!r}) gives the agent of a run; a new one needs another run_dir=,"
    assert said in str(told.value) and "--" not in str(told.value)


class Alike(Small):
    """A network with the same weights, which may compute something else."""


def test_a_network_of_another_name_is_told_once(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_envs": 2, "num_steps": 8, "env_workers": 1}
    with ACKTR("CartPole-v1", network=Small, **settings) as agent:
        agent.save(tmp_path / "agent")
    with pytest.warns(UserWarning, match="trained with the network .*:Small, and .*:Alike") as told:
        ACKTR.load(tmp_path / "agent", network=Alike).close()
    assert len(told) == 1 and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = ACKTR.load(tmp_path / "agent", network=Small)
        again.close()
        ACKTR.load(tmp_path / "agent", network=again.trainer.network).close()
