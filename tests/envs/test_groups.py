"""Groups of games: the same games as without them, and steps that are under way."""

from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from envs import AtariSettings, EnvError, EnvFault, make_vec
from envs.atari import AtariEnvs
from envs.groups import GroupedEnvs

BREAKOUT = "BreakoutNoFrameskip-v4"


def games(groups: int, num_envs: int = 4, **settings: Any) -> Any:
    chosen = AtariSettings(num_threads=1, num_groups=groups, **settings)
    return make_vec(BREAKOUT, num_envs, seed=3, atari=chosen)


def same(one: Any, other: Any) -> None:
    """Equal arrays of equal types, in nested dictionaries with the same keys."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert set(one) == set(other)
        for name in one:
            if name != "t":  # seconds
                same(one[name], other[name])
    else:
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_play_the_same_games(groups: int) -> None:
    """Bit for bit, through lost lives, the ends of games and partial resets."""
    whole, grouped = games(1, max_frames=400), games(groups, max_frames=400)
    assert isinstance(whole, AtariEnvs)
    assert isinstance(grouped, GroupedEnvs)
    assert grouped.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert grouped.observation_space == whole.observation_space
    assert grouped.action_space == whole.action_space
    rng = np.random.default_rng(0)
    mask = np.array([True, False, False, False])
    endings = 0
    for step in range(260):
        if step % 130 == 0:
            first, second = (vec.reset() for vec in (whole, grouped))
        elif step % 50 == 0:
            first, second = (
                vec.reset(seed=step, options={"reset_mask": mask}) for vec in (whole, grouped)
            )
        else:
            actions = rng.integers(0, 4, 4)
            first, second = (vec.step(actions) for vec in (whole, grouped))
            endings += int(first[4].get("_episode", np.zeros(1)).sum())
        for one, other in zip(first, second, strict=True):
            same(one, other)
    assert endings >= 4
    whole.close()
    grouped.close()
    grouped.close()


def test_groups_need_a_multiple() -> None:
    vec = games(2, 3)
    assert isinstance(vec, AtariEnvs)
    vec.close()
    with pytest.raises(ValueError, match="one size"):
        GroupedEnvs([])


def test_a_step_has_a_beginning_and_an_end() -> None:
    vec = games(1)
    vec.reset()
    with pytest.raises(EnvFault, match="while no step is under way"):
        vec.step_wait()
    with pytest.raises(EnvFault, match="actions must have shape"):
        vec.step_async(np.zeros(3, np.int64))
    vec.step_async(np.ones(4, np.int64))
    with pytest.raises(EnvFault, match="while a step is under way"):
        vec.step_async(np.ones(4, np.int64))
    vec.step_wait()
    vec.close()


def test_reset_forgets_a_step_that_is_under_way() -> None:
    vec, other = games(1), games(1)
    for each in (vec, other):
        each.reset(seed=1)
    vec.step_async(np.ones(4, np.int64))
    for one, two in zip(vec.reset(seed=2), other.reset(seed=2), strict=True):
        same(one, two)
    for one, two in zip(vec.step(np.ones(4, int)), other.step(np.ones(4, int)), strict=True):
        same(one, two)
    vec.close()
    other.close()


@pytest.mark.parametrize("mask", [np.ones(3, bool), np.zeros(4, bool), [1, 0, 0, 0]])
def test_bad_reset_masks_touch_no_group(mask: Any) -> None:
    vec = games(2)
    vec.reset()
    with pytest.raises(EnvError, match="reset_mask must be 4 booleans"):
        vec.reset(options={"reset_mask": mask})
    vec.step(np.zeros(4, np.int64))
    vec.close()


def test_bad_actions_begin_no_step() -> None:
    vec = games(2)
    vec.reset()
    with pytest.raises(EnvFault, match=r"got 9|shape|range"):
        vec.step(np.array([0, 0, 0, 9]))
    vec.step(np.zeros(4, np.int64))
    vec.close()
