"""Groups of games: the same games as without them, and steps that are under way."""

from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from acktr.envs import AtariSettings, EnvError, EnvFault, GroupedEnvs, group_count, make_vec
from acktr.envs.atari import AtariEnvs

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


@pytest.mark.parametrize("groups", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_groups_play_the_same_games(groups: int) -> None:
    """Bit for bit, through lost lives, the ends of games and partial resets."""
    whole, grouped = games(1, max_frames=400), games(groups, max_frames=400)
    assert (group_count(whole), group_count(grouped)) == (1, groups)
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


@pytest.mark.parametrize(("most", "num_envs", "groups"), [(2, 3, 1), (4, 6, 3), (4, 1, 1)])
def test_groups_are_as_many_as_divide(most: int, num_envs: int, groups: int) -> None:
    vec = games(most, num_envs)
    assert group_count(vec) == groups
    vec.close()


def test_groups_must_fit_together() -> None:
    with pytest.raises(ValueError, match="one size"):
        GroupedEnvs([])
    first, second = games(1, 2), games(1, 3)
    with pytest.raises(ValueError, match="one size"):
        GroupedEnvs([*first.groups, *second.groups])
    first.close()
    second.close()


def test_a_step_has_a_beginning_and_an_end() -> None:
    (vec,) = games(1).groups
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
    (vec,), (other,) = games(1).groups, games(1).groups
    for each in (vec, other):
        each.reset(seed=1)
    vec.step_async(np.ones(4, np.int64))
    for one, two in zip(vec.reset(seed=2), other.reset(seed=2), strict=True):
        same(one, two)
    for one, two in zip(vec.step(np.ones(4, int)), other.step(np.ones(4, int)), strict=True):
        same(one, two)
    vec.close()
    other.close()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mask", [np.ones(3, bool), np.zeros(4, bool), [1, 0, 0, 0]])
def test_bad_reset_masks_touch_no_group(mask: Any, groups: int) -> None:
    vec = games(groups)
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


class Interrupted(AtariEnvs):
    """Its first wait ends in Ctrl-C, as the games have finished the step."""

    interrupted = False

    def step_wait(self) -> Any:
        result = super().step_wait()
        if not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt
        return result


@pytest.mark.parametrize("which", [0, 1])
def test_after_an_interrupted_step_no_group_is_under_way(which: int) -> None:
    vec = games(2)
    vec.groups[which].__class__ = Interrupted
    vec.reset()
    with pytest.raises(KeyboardInterrupt):
        vec.step(np.zeros(4, np.int64))
    vec.step(np.zeros(4, np.int64))
    vec.reset()
    vec.close()


def test_an_interrupt_while_waiting_leaves_no_step_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vec = games(1)
    (group,) = vec.groups
    vec.reset()
    native, receive = group._native, group._native.recv

    def interrupted() -> Any:
        receive()
        raise KeyboardInterrupt

    monkeypatch.setattr(native, "recv", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vec.step(np.zeros(4, np.int64))
    monkeypatch.undo()
    vec.step(np.zeros(4, np.int64))
    vec.reset()
    vec.close()


def test_a_group_that_cannot_begin_leaves_the_others_at_rest() -> None:
    vec = games(2)
    vec.reset()
    vec.groups[1].step_async(np.zeros(2, np.int64))
    with pytest.raises(EnvFault, match="while a step is under way"):
        vec.step(np.zeros(4, np.int64))
    vec.groups[1].step_wait()
    vec.step(np.zeros(4, np.int64))
    vec.close()


def test_a_partial_reset_waits_for_no_step() -> None:
    vec = games(2)
    vec.reset()
    vec.groups[0].step_async(np.zeros(2, np.int64))
    with pytest.raises(EnvFault, match="before a partial reset"):
        vec.reset(options={"reset_mask": np.array([True, False, False, False])})
    vec.groups[0].step_wait()
    vec.close()
