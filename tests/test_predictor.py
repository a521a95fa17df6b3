"""Observations that the environment cannot show are refused, in every question about them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from acktr import A2C
from tests.tools.toys import SpacesEnv

BITS = spaces.Box(0, 1, (2,), np.bool_)
SINGLES = spaces.Box(-np.inf, np.inf, (2,), np.float32)
CASES: list[tuple[spaces.Space[Any], Any, Any, str]] = [
    (spaces.MultiDiscrete([3, 3]), [2, 0], [5, 0], "has 5, which is not in range for MultiDis"),
    (spaces.MultiDiscrete([3, 3]), [2, 0], [0.5, 0], "is of float64 and does not fit int64"),
    (spaces.MultiDiscrete([3, 3], start=[1, 1]), [3, 1], [1, 0], "has 0, which is not in range"),
    (spaces.Discrete(4), 3, 7, r"has 7, which is not in range for Discrete\(4\)"),
    (spaces.Discrete(4), 3.0, np.nan, "has NaN or Inf"),
    (spaces.MultiBinary(2), [1, 0], [7, 0], "has 7, which is not in range for MultiBinary"),
    (BITS, [1.0, 0.0], [0.5, 0.0], "is of float64 and does not fit bool"),
    (BITS, [True, False], [2, 0], "is of int64 and does not fit bool"),
    (spaces.Box(0, 9, (2,), np.int16), [9, 12], [40_000, 0], "is of int64 and does not fit int16"),
    (SINGLES, [1e30, 0], [1e300, 0.0], r"has 1e\+300, which is too large for float32"),
]


@pytest.mark.parametrize(("space", "right", "wrong", "why"), CASES)
def test_what_a_space_has_not_is_refused(
    space: spaces.Space[Any], right: Any, wrong: Any, why: str
) -> None:
    """A number of one component was taken for another one's, and infinities went through."""
    with A2C(lambda: SpacesEnv(space, spaces.Discrete(2)), num_envs=1, num_steps=4) as agent:
        for ask in (agent.predict, agent.value, agent.action_probability):
            ask(np.array(right))
            for each in (np.array(wrong), np.array([right, wrong])):
                with pytest.raises(ValueError, match=f"the observation {why}"):
                    ask(each)


def test_the_part_is_named() -> None:
    space = spaces.Dict(a=spaces.Discrete(4), b=SINGLES)
    agent = A2C(lambda: SpacesEnv(space, spaces.Discrete(2)), num_envs=1, num_steps=4)
    with agent, pytest.raises(ValueError, match="the observation's part 'a' has 4, which"):
        agent.predict({"a": np.int64(4), "b": np.zeros(2)})
