"""What changes nothing of an agent is told in one line that says what to write."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from acktr import ACKTR, ConfigError


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
