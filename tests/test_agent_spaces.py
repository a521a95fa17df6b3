"""A saved agent and another environment: of other spaces than its own it is refused."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import Space, spaces

from acktr import ACKTR, CheckpointError, EnvError
from acktr.envs import space_difference, space_facts
from acktr.runs.saved import read_agent
from tests.tools.toys import SpacesEnv

VECTOR = spaces.Box(-1.0, 1.0, (3,), np.float32)
CHOICE = spaces.Discrete(2)
PART = spaces.Box(-1.0, 1.0, (2,), np.float32)
OTHERS = [
    (VECTOR, spaces.MultiDiscrete([6, 4]), VECTOR, spaces.MultiDiscrete([4, 6])),
    (VECTOR, spaces.Discrete(8), VECTOR, spaces.MultiDiscrete([4, 4])),
    (VECTOR, spaces.Discrete(6), VECTOR, spaces.MultiBinary(6)),
    (VECTOR, spaces.Discrete(3), VECTOR, spaces.Discrete(3, start=5)),
    (VECTOR, spaces.Box(-1, 1, (2, 3)), VECTOR, spaces.Box(-1, 1, (3, 2))),
    (VECTOR, PART, VECTOR, spaces.Box(-5, 5, (2,))),
    (VECTOR, CHOICE, spaces.Box(0, 100, (3,)), CHOICE),
    (VECTOR, CHOICE, spaces.Box(-1, 1, (3,), np.float64), CHOICE),
    (  # in the order of its parts a network takes them
        spaces.Dict(OrderedDict(a=PART, b=PART)),
        CHOICE,
        spaces.Dict(OrderedDict(b=PART, a=PART)),
        CHOICE,
    ),
]


@pytest.mark.parametrize(("observation", "action", "seen", "taken"), OTHERS, ids=repr)
def test_other_spaces_are_refused_wherever_an_agent_meets_them(
    observation: Space[object],
    action: Space[object],
    seen: Space[object],
    taken: Space[object],
    tmp_path: Path,
) -> None:
    ours, theirs = partial(SpacesEnv, observation, action), partial(SpacesEnv, seen, taken)
    with ACKTR(ours, num_envs=2, num_steps=4, hidden=(4,), seed=0) as agent:
        with pytest.raises(EnvError, match=r"the agent's (action|observation) space is ") as told:
            agent.set_env(theirs)
        agent.save(tmp_path / "agent.zip")
    with pytest.raises(CheckpointError) as loaded:
        ACKTR.load(tmp_path / "agent.zip", env=theirs)
    assert str(loaded.value) == f"{tmp_path}/agent.zip: {told.value}"
    assert "\n" not in str(loaded.value)
    saved = read_agent(tmp_path / "agent.zip")
    with pytest.raises(CheckpointError) as played:
        saved.policy(seen, taken, torch.device("cpu"))
    assert str(played.value) == str(loaded.value)
    saved.state.pop("spaces")  # as before there was such an entry: shapes alone are compared
    saved.policy(observation, action, torch.device("cpu"))
    ACKTR.load(tmp_path / "agent.zip", env=ours).close()


def test_equal_spaces_are_described_alike() -> None:
    low = np.array([0.0, -1.0], np.float32)
    one, other = spaces.Box(low, 1.0), spaces.Box(np.array([-0.0, -1.0], np.float32), 1.0)
    facts = space_facts(one, CHOICE), space_facts(other, spaces.Discrete(2, seed=4))
    assert space_difference(*facts) is None
    large = space_facts(spaces.Box(0, 255, (84, 84, 4), np.uint8), spaces.MultiBinary(3))
    assert all(len(text) <= 200 for each in large.values() for text in each.values())


@pytest.mark.parametrize("spaces_there", [7, {}, {"observation": "x"}, {"observation": {}}])
def test_a_forged_description_ends_in_one_line(spaces_there: object, tmp_path: Path) -> None:
    with ACKTR("CartPole-v1", num_envs=2, num_steps=4, hidden=(4,), seed=0) as agent:
        agent.save(tmp_path / "agent")
        place = (agent.observation_space, agent.action_space, torch.device("cpu"))
    saved = read_agent(tmp_path / "agent")
    saved.state["spaces"] = spaces_there
    with pytest.raises(CheckpointError, match="does not fit"):
        saved.policy(*place)
