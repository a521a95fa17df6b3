"""What an agent's vector environment lets one do, and what it keeps for itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium
import pytest
from gymnasium.vector import SyncVectorEnv, VectorEnv
from gymnasium.wrappers.vector import NormalizeObservation, NormalizeReward

from acktr import ACKTR, EnvError
from acktr.envs import EnvWarning, make_vec
from tests.tools.toys import CountingEnv

SETTINGS: Any = {"num_steps": 4, "hidden": (4,), "seed": 0}


@pytest.mark.parametrize(
    ("wrapper", "what"), [(NormalizeObservation, "observation"), (NormalizeReward, "reward")]
)
def test_statistics_of_a_vector_are_told(wrapper: Any, what: str) -> None:
    """They are in no file, and not where the agent is evaluated."""
    envs = wrapper(gymnasium.make_vec("CartPole-v1", 2, vectorization_mode="sync"))
    said = rf"{wrapper.__name__} are not the agent's, .* normalize_{what}=True has the agent do it"
    with pytest.warns(EnvWarning, match=said) as told:
        agent = ACKTR(envs, **SETTINGS)
    assert len(told) == 1 and told[0].filename == __file__
    agent.close()
    envs.close()


class Levels(CountingEnv):
    """An environment with a level that a program raises."""

    level = 0

    def raised(self, by: int) -> int:
        return self.level + by


def test_environments_are_reached_as_in_gymnasium() -> None:
    with ACKTR(Levels, num_envs=2, env_workers=1, **SETTINGS) as agent:
        envs: Any = agent.envs
        envs.set_attr("level", [1, 2])
        assert envs.get_attr("level") == (1, 2)
        assert envs.call("raised", 3) == (4, 5)
        agent.learn(16)
        assert envs.turns == 9  # a reset and eight steps: nobody else has played


def test_environments_that_are_elsewhere_are_not_reached() -> None:
    with ACKTR("CartPole-v1", num_envs=2, env_workers=2, **SETTINGS) as agent:
        envs: Any = agent.envs
        with pytest.raises(EnvError, match="set env_workers to 1"):
            envs.call("render")


def test_a_vector_without_such_methods_says_so() -> None:
    class Plain(VectorEnv[Any, Any, Any]):
        metadata = SyncVectorEnv([CountingEnv]).metadata

        def __init__(self) -> None:
            inside = SyncVectorEnv([CountingEnv] * 2)
            self.num_envs = 2
            self.observation_space, self.action_space = (
                inside.observation_space,
                inside.action_space,
            )
            self.single_observation_space = inside.single_observation_space
            self.single_action_space = inside.single_action_space

    with ACKTR(Plain(), **SETTINGS) as agent:
        envs: Any = agent.envs
        with pytest.raises(AttributeError, match="Plain has no set_attr"):
            envs.set_attr("level", 1)


@pytest.mark.parametrize("env", ["CartPole-v1", partial(CountingEnv)])
def test_a_reset_by_call_is_noticed(env: Any) -> None:
    """Learning does not go on from the observation of before."""
    with ACKTR(env, num_envs=2, env_workers=1, **SETTINGS) as agent:
        agent.learn(8)
        envs: Any = agent.envs
        envs.call("reset")
        with pytest.warns(UserWarning, match="new episodes"):
            agent.learn(8)


@pytest.mark.parametrize("record", [[], (), ["count"], ("count",), "count"])
def test_what_is_recorded_is_a_tuple(record: Any) -> None:
    keys = (record,) if isinstance(record, str) else tuple(record)
    with ACKTR(CountingEnv, record=record, **SETTINGS) as agent:
        assert agent.config.record == keys
    envs = make_vec("CartPole-v1", 2, 0, record=[*keys])  # type: ignore[arg-type]
    assert ACKTR(envs, record=record, **SETTINGS).config.record == keys
    envs.close()
