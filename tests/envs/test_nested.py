"""Dict and Tuple observations: by part and back, checked, the same from any number of workers."""

from __future__ import annotations

import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from acktr.envs import EnvError, EnvFault, GuardedVectorEnv, check_spaces, make_vec
from acktr.envs.nested import batched, final_rows, flat, nested, parts
from tests.tools import toys

VECTOR = spaces.Box(-1, 1, (3,), np.float32)
ROBOT = spaces.Dict(
    {
        "camera": spaces.Box(0, 255, (6, 5, 3), np.uint8),
        "arm": spaces.Tuple((VECTOR, spaces.Discrete(4))),
        "lamps": spaces.MultiBinary(2),
        "modes": spaces.MultiDiscrete([3, 2]),
    }
)
NAMES = ["arm/0", "arm/1", "camera", "lamps", "modes"]


def test_parts_are_named_by_their_paths() -> None:
    assert list(parts(ROBOT)) == NAMES
    assert parts(ROBOT)["arm/0"] is VECTOR
    assert list(parts(spaces.Tuple((VECTOR, VECTOR)))) == ["0", "1"]
    assert parts(VECTOR) == {"": VECTOR}


def test_observations_come_back_from_their_parts() -> None:
    ROBOT.seed(0)
    seen = ROBOT.sample()
    arrays = flat(ROBOT, seen)
    assert isinstance(arrays, dict) and list(arrays) == NAMES
    again = nested(ROBOT, arrays)
    assert ROBOT.contains({**again, "arm": (again["arm"][0], int(again["arm"][1]))})
    np.testing.assert_array_equal(again["arm"][0], seen["arm"][0])
    plain = flat(VECTOR, np.ones(3))
    assert isinstance(plain, np.ndarray) and nested(VECTOR, {"": plain}) is plain


def test_one_observation_and_a_batch_are_told_apart() -> None:
    one = ROBOT.sample()
    batch, alone = batched(ROBOT, one)
    assert alone and batch["camera"].shape == (1, 6, 5, 3) and batch["arm"][1].shape == (1,)
    again, alone = batched(ROBOT, batch)
    assert not alone and again["camera"].shape == (1, 6, 5, 3)
    for wrong, message in (
        ({**one, "camera": one["camera"][0]}, r"part 'camera' has shape \(5, 3\)"),
        ({**one, "camera": batch["camera"]}, "one sample and others a batch"),
        ({"camera": one["camera"]}, "must have the parts 'arm/0', 'arm/1', 'camera'"),
        (np.zeros(3), "must have the parts"),
    ):
        with pytest.raises(ValueError, match=message):
            batched(ROBOT, wrong)


def test_unsupported_parts_are_named() -> None:
    check_spaces(ROBOT, spaces.Discrete(2))
    for space, message in (
        (spaces.Dict({}), "it has no parts"),
        (spaces.Dict({"a": spaces.Dict({"b": spaces.Text(3)})}), "part 'a/b' is Text"),
        (spaces.Tuple((VECTOR, spaces.Sequence(VECTOR))), "part '1' is Sequence"),
        (spaces.Dict({"a/b": VECTOR}), "key 'a/b' is not a text without /"),
        (spaces.Tuple((spaces.Dict({"$a": VECTOR}),)), r"key '\$a' is not a text"),
    ):
        with pytest.raises(EnvError, match=message) as caught:
            check_spaces(space, spaces.Discrete(2))
        assert "\n" not in str(caught.value)


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, tuple):
        return all(same(*pair) for pair in zip(ours, theirs, strict=True))
    return bool(ours.dtype == theirs.dtype and np.array_equal(ours, theirs))


def played(env_id: str, workers: int) -> list[Any]:
    envs = make_vec(env_id, 3, seed=5, env_workers=workers)
    found = [envs.reset()[0]]
    for _ in range(12):
        observation, *_, infos = envs.step(np.zeros(3, np.int64))
        found += [observation, infos.get("final_obs", np.zeros(0))]
    mask = np.array([True, False, True])
    found.append(envs.reset(seed=1, options={"reset_mask": mask})[0])
    envs.close()
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="processes are for Linux")
@pytest.mark.parametrize("space", [ROBOT, ROBOT["arm"], spaces.MultiDiscrete([3, 2])])
def test_steps_do_not_depend_on_the_number_of_workers(space: Any) -> None:
    settings = {"observation_space": space, "action_space": spaces.Discrete(2)}
    env_id = toys.variant(toys.SpacesEnv, settings)
    one, two = (played(env_id, workers) for workers in (1, 2))
    assert all(same(*pair) for pair in zip(one, two, strict=True))
    assert not same(one[1], one[3])
    ends = [found for found in one[2::2] if not isinstance(found, np.ndarray) or found.size]
    assert len(ends) >= 2


def test_final_observations_of_every_form_are_rows() -> None:
    space = ROBOT["arm"]
    each = [space.sample() for _ in range(3)]
    objects = np.empty(3, object)
    objects[:] = each
    dense = (np.stack([one[0] for one in each]), np.array([one[1] for one in each]))
    for shown in (objects, dense):
        found = final_rows(space, shown, np.array([0, 2]))
        assert isinstance(found, dict)
        np.testing.assert_array_equal(found["0"], dense[0][[0, 2]])
        np.testing.assert_array_equal(found["1"], dense[1][[0, 2]])
        assert found["1"].dtype == np.int64


class Broken(gymnasium.Env[Any, Any]):
    """Gives one bad part at its second step, which ends the episode if so told."""

    action_space = spaces.Discrete(2)

    def __init__(
        self, part: str, value: Any, end: bool = False, render_mode: str | None = None
    ) -> None:
        self.render_mode = render_mode
        self.observation_space = spaces.Dict(
            {"a": VECTOR, "b": spaces.Discrete(3, start=1), "c": spaces.MultiBinary(2)}
        )
        self._bad, self._end, self._steps = {part: value}, end, 0

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return {"a": np.zeros(3, np.float32), "b": np.int64(1), "c": np.zeros(2, np.int8)}, {}

    def step(self, action: Any) -> Any:
        self._steps += 1
        good, _ = self.reset()
        bad = self._steps == 2
        return {**good, **(self._bad if bad else {})}, 0.0, False, bad and self._end, {}


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("a", np.array([0, np.nan, 0], np.float32), "non-finite .*observation 'a'.* nan"),
        ("b", np.int64(0), "observation 'b' 0 at step 2, which is not in range"),
        ("c", np.array([0, 2], np.int8), "observation 'c' .* not in range"),
    ],
)
def test_bad_parts_are_found_and_named(part: str, value: Any, message: str, end: bool) -> None:
    makers = [lambda: Broken(part, value, end)] * 2
    inner: Any = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    envs = GuardedVectorEnv(inner, "Broken", 0, foreign=True)
    envs.reset()
    envs.step(np.zeros(2, np.int64))
    with pytest.raises(EnvFault, match=message) as caught:
        envs.step(np.zeros(2, np.int64))
    assert "environment 0 of Broken" in str(caught.value)
    assert ("final" in str(caught.value)) is end


def test_a_part_of_another_shape_is_named() -> None:
    settings = {"part": "a", "value": np.zeros(4, np.float32)}
    gymnasium.register("nested/Broken-v0", entry_point=Broken, kwargs=settings)
    try:
        envs = make_vec("nested/Broken-v0", 1)
        envs.reset()
        envs.step(np.zeros(1, np.int64))
        with pytest.raises(EnvFault, match=r"observation part 'a' of shape \(4,\)"):
            envs.step(np.zeros(1, np.int64))
        envs.close()
    finally:
        del gymnasium.registry["nested/Broken-v0"]
