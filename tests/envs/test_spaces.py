"""Supported and unsupported spaces, actions against them."""

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from acktr.envs import EnvError, EnvFault, check_spaces, make_vec
from acktr.envs.spaces import check_actions
from tests.tools import toys

VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float32)
TWO = spaces.Discrete(2)
CROSSED = spaces.Box(-1.0, 1.0, (2,), np.float32)
CROSSED.low = np.array([2.0, -1.0], np.float32)
NAN_BOUND = spaces.Box(-1.0, 1.0, (2,), np.float32)
NAN_BOUND.high = np.array([np.nan, 1.0], np.float32)


@pytest.mark.parametrize(
    "space",
    [
        VECTOR,
        spaces.Box(-1, 1, (), np.float64),
        spaces.Box(-1, 1, (2, 3, 4), np.float32),
        spaces.Box(0, 255, (128,), np.uint8),
        spaces.Box(0, 255, (84, 84, 3), np.uint8),
        spaces.Box(0, 9, (5,), np.int64),
        spaces.Box(0, 1, (3,), np.bool_),
        spaces.Discrete(4, start=3),
        spaces.MultiBinary([3, 2]),
        spaces.MultiDiscrete([2, 2]),
        spaces.Dict({"a": TWO, "b": spaces.Tuple((VECTOR,))}),
    ],
)
def test_supported_observations(space: spaces.Space[Any]) -> None:
    check_spaces(space, TWO)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3, start=-1),
        spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(4),
    ],
)
def test_supported_actions(space: spaces.Space[Any]) -> None:
    check_spaces(VECTOR, space)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Dict({"a": spaces.Text(3)}),
        spaces.Tuple((spaces.Sequence(TWO),)),
        spaces.Text(3),
        spaces.Graph(VECTOR, None),
        spaces.Sequence(TWO),
        spaces.Box(-1, 1, (0,), np.float32),
        spaces.Dict({}),
    ],
)
def test_unsupported_observations(space: spaces.Space[Any]) -> None:
    with pytest.raises(EnvError, match="unsupported observation space") as caught:
        check_spaces(space, TWO)
    text = str(caught.value)
    assert type(space).__name__ in text
    assert "supported are Box (numbers, or pictures), Discrete, MultiDiscrete" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "space",
    [
        spaces.Dict({"a": TWO}),
        spaces.Tuple((TWO, TWO)),
        spaces.Text(3),
        spaces.Graph(VECTOR, None),
        spaces.MultiDiscrete([[2, 2], [2, 2]]),
        spaces.MultiBinary([2, 2]),
        spaces.Box(-1, 1, (), np.float32),
        spaces.Box(-1, 1, (0,), np.float32),
        spaces.Box(0, 9, (2,), np.int64),
        CROSSED,
        NAN_BOUND,
    ],
)
def test_unsupported_actions(space: spaces.Space[Any]) -> None:
    with pytest.raises(EnvError, match="unsupported action space") as caught:
        check_spaces(VECTOR, space)
    assert type(space).__name__ in str(caught.value)
    assert "supported are Discrete, Box" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unsupported_spaces_are_refused_by_make_vec() -> None:
    settings = {"observation_space": VECTOR, "action_space": spaces.Tuple((TWO,))}
    env_id = toys.variant(toys.SpacesEnv, settings)
    with pytest.raises(EnvError, match="unsupported action space Tuple"):
        make_vec(env_id, 2)


@pytest.mark.parametrize(
    ("space", "actions", "message"),
    [
        (TWO, [0, 2], "action 2 of environment 1 is not in range"),
        (TWO, [0.0, 1.0], "must be integers"),
        (TWO, [True, False], "must be integers"),
        (TWO, [[0], [1]], r"shape \(2,\)"),
        (VECTOR, np.full((2, 3), np.nan), "action nan of environment 0 is not a finite number"),
        (VECTOR, np.zeros((2, 3), np.int64), "must be floats"),
        (VECTOR, np.zeros((3, 2)), r"shape \(2, 3\)"),
        (spaces.MultiDiscrete([2, 3]), [[1, 2], [2, 2]], "action 2 of environment 1"),
        (spaces.MultiDiscrete([2, 3]), [[1, 2], [-1, 2]], "action -1 of environment 1"),
        (spaces.MultiBinary(2), [[1, 0], [2, 0]], "action 2 of environment 1"),
    ],
)
def test_invalid_actions(space: spaces.Space[Any], actions: object, message: str) -> None:
    with pytest.raises(EnvFault, match=message):
        check_actions(actions, space, 2)


def test_valid_actions_get_the_dtype_of_the_space() -> None:
    assert check_actions(np.array([0, 1], np.int32), TWO, 2).dtype == np.int64
    assert check_actions(np.zeros((2, 3)), VECTOR, 2).dtype == np.float32
    assert check_actions([[True, False]], spaces.MultiBinary(2), 1).dtype == np.int8


@pytest.mark.parametrize(
    ("space", "actions", "outside"),
    [
        (spaces.Discrete(3, start=5), [5, 7], [5, 8]),
        (spaces.Discrete(3, start=5), [5, 7], [4, 5]),
        (
            spaces.MultiDiscrete([2, 3], start=[1, -1]),
            [[1, -1], [2, 1]],
            [[1, -1], [2, 2]],
        ),
    ],
)
def test_integer_spaces_keep_their_start(space: Any, actions: Any, outside: Any) -> None:
    settings = {"observation_space": spaces.Discrete(4, start=10), "action_space": space}
    vec = make_vec(toys.variant(toys.SpacesEnv, settings), 2)
    obs, _ = vec.reset(seed=0)
    assert vec.single_action_space == space
    assert vec.single_observation_space == spaces.Discrete(4, start=10)
    for _ in range(6):
        obs, *_ = vec.step(np.array(actions))  # the toy asserts that its space contains the action
        assert (obs >= 10).all()
        assert (obs < 14).all()
    np.testing.assert_array_equal(np.array(vec.env.get_attr("last_action")), actions)
    with pytest.raises(EnvFault, match="is not in range for"):
        vec.step(np.array(outside))
    vec.close()
