"""Action masks: every convention, kind of action, way of stepping, and every fault of theirs."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from acktr.envs import (
    MASK,
    EnvError,
    EnvFault,
    GuardedVectorEnv,
    MaskReader,
    as_masks,
    found_masks,
    make_vec,
)
from tests.tools.masked import (
    KINDS,
    MODES,
    SOURCES,
    MaskedEnv,
    random_actions,
    shown_masks,
    sync,
)
from tests.tools.toys import variant

kinds = pytest.mark.parametrize("nvec", KINDS.values(), ids=KINDS)
modes = pytest.mark.parametrize("mode", MODES, ids=["same", "next"])


def play(envs: Any, nvec: tuple[int, ...], steps: int) -> tuple[int, int]:
    """Take random allowed actions; the masks must be those shown. Ended episodes, dead steps."""
    rng = np.random.default_rng(0)
    following = envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    observations, infos = envs.reset(seed=3)
    dead = np.zeros(envs.num_envs, bool)
    ended = resets = 0
    for _ in range(steps):
        masks = infos[MASK]
        assert masks.dtype == np.bool_
        np.testing.assert_array_equal(masks[~dead], shown_masks(observations)[~dead])
        assert masks[dead].all()  # these actions are not taken
        start = np.ravel(envs.single_action_space.start)[0]
        actions = random_actions(masks, nvec, rng) + start
        observations, _, terminated, truncated, infos = envs.step(actions)
        over = (terminated | truncated) & ~dead
        ended, resets = ended + int(over.sum()), resets + int(dead.sum())
        dead = over & following
    return ended, resets


@kinds
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("workers", [1, 2])
def test_environments_made_here_have_the_masks_of_what_they_show(
    source: str, nvec: tuple[int, ...], workers: int
) -> None:
    settings = {"source": source, "nvec": nvec, "start": 2}
    envs = make_vec(variant(MaskedEnv, settings), 3, env_workers=workers)
    assert found_masks(envs).source is None
    ended, _ = play(envs, nvec, 11)
    assert ended == 9
    assert found_masks(envs).source == source
    envs.close()


@kinds
@modes
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("tuples", [False, True])
def test_vectors_of_others_too(
    source: str, nvec: tuple[int, ...], mode: AutoresetMode, tuples: bool
) -> None:
    vector = sync(mode, 3, source=source, nvec=nvec, start=1, tuples=tuples, kind="int8")
    envs = GuardedVectorEnv(vector, "masked", 0, foreign=True)
    ended, resets = play(envs, nvec, 11)
    assert ended == 9 if mode == AutoresetMode.SAME_STEP else ended > 5 < resets + 1
    assert found_masks(envs).source == source


@modes
@pytest.mark.parametrize("source", [*SOURCES, "none"])
def test_asynchronous_vectors_are_asked_without_harm(source: str, mode: AutoresetMode) -> None:
    makers = [lambda: MaskedEnv(source)] * 2
    vector = AsyncVectorEnv(makers, autoreset_mode=mode)
    envs = GuardedVectorEnv(vector, "masked", 0, foreign=True)
    if source == "none":
        _, infos = envs.reset(seed=1)
        assert MASK not in infos
        assert found_masks(envs).source is None
    else:
        play(envs, (5,), 8)
        assert found_masks(envs).source == source
    envs.close()


def test_a_vector_may_have_the_method_itself() -> None:
    vector: Any = sync(AutoresetMode.SAME_STEP, 3, source="none")
    vector.action_masks = lambda: np.stack([env._mask for env in vector.envs])
    envs = GuardedVectorEnv(vector, "masked", 0, foreign=True)
    play(envs, (5,), 8)
    assert found_masks(envs).source == "action_masks"


def test_a_partial_reset_renews_the_masks_of_its_environments_alone() -> None:
    own = make_vec(variant(MaskedEnv, {"source": "info"}), 3)
    foreign = GuardedVectorEnv(sync(MODES[0], 3, source="info"), "masked", 0, foreign=True)
    for envs in (own, foreign):
        before, infos = envs.reset(seed=5)
        np.testing.assert_array_equal(infos[MASK], shown_masks(before))
        which = np.array([False, True, False])
        after, infos = envs.reset(options={"reset_mask": which})
        np.testing.assert_array_equal(infos[MASK], shown_masks(after))
        np.testing.assert_array_equal(after[~which], before[~which])


def test_the_first_of_several_conventions_counts_unless_one_is_named() -> None:
    for asked, used in (("auto", "action_masks"), ("info", "info")):
        env_id = variant(MaskedEnv, {"source": "info+action_masks"})
        envs = make_vec(env_id, 2, masks=asked)  # type: ignore[arg-type]
        play(envs, (5,), 5)
        assert found_masks(envs).source == used


def test_masks_of_a_dict_observation_are_read() -> None:
    env = MaskedEnv("observation")
    reader = MaskReader(env, "auto", "masked")
    obs, info = env.reset(seed=0)
    mask = reader.read(obs, info, "reset")
    assert mask is not None
    np.testing.assert_array_equal(mask, env._mask)
    assert reader.source == "observation"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("spoil", "source", "said"),
    [
        ("length", "info", r"it has the shape \(4,\), not \(5,\)"),
        ("length", "action_masks", r"it has the shape \(4,\), not \(5,\)"),
        ("values", "info", "it has other values than 0 and 1: [23]"),
        ("nothing", "action_masks", "it allows no action"),
        ("missing", "info", r'gave no info\["action_mask"\]'),
        ("raises", "action_masks", r"action_masks\(\) raised ZeroDivisionError: the mask broke"),
    ],
)
def test_faults_name_environment_step_and_what_was_found(
    spoil: str, source: str, said: str, workers: int
) -> None:
    env_id = variant(MaskedEnv, {"source": source, "spoil": spoil, "at": 2})
    envs = make_vec(env_id, 2, env_workers=workers)
    with pytest.raises(EnvFault, match=said) as fault:
        play(envs, (5,), 8)
    text = str(fault.value)
    assert "environment 0 of toys/Variant" in text
    assert "at step 2" in text
    assert "\n" not in text
    envs.close()


@modes
@pytest.mark.parametrize("spoil", ["length", "values", "nothing", "missing"])
def test_faults_in_vectors_of_others(spoil: str, mode: AutoresetMode) -> None:
    source = "action_masks" if spoil == "length" else "info"
    vector = sync(mode, 2, source=source, spoil=spoil, at=2)
    envs = GuardedVectorEnv(vector, "masked", 0, foreign=True)
    with pytest.raises(EnvFault, match=r"^environment 0 of masked gave .*at step 2"):
        play(envs, (5,), 8)


def test_nothing_allowed_in_a_component_is_named() -> None:
    envs = make_vec(variant(MaskedEnv, {"nvec": (3, 2), "spoil": "nothing"}), 1)
    with pytest.raises(EnvFault, match="at reset: it allows no action in component 0 of 2"):
        envs.reset(seed=0)


@pytest.mark.parametrize("asked", SOURCES)
def test_what_is_asked_for_by_name_must_be_there(asked: Any) -> None:
    has = "info" if asked == "action_masks" else "none"
    envs = make_vec(variant(MaskedEnv, {"source": has}), 2, masks=asked, env_workers=2)
    with pytest.raises(EnvError, match=f"masks='{asked}': environment 0 of toys.* has no "):
        envs.reset(seed=0)
    envs.close()
    foreign = GuardedVectorEnv(
        sync(MODES[0], 2, source=has), "masked", 0, foreign=True, masks=asked
    )
    with pytest.raises(EnvError, match=f"masks='{asked}': masked has no "):
        foreign.reset(seed=0)


def test_masks_that_are_not_used_are_told() -> None:
    env_id = variant(MaskedEnv, {"source": "info+action_masks", "lenient": True})
    own = make_vec(env_id, 2, masks=None)
    foreign = GuardedVectorEnv(
        sync(MODES[0], 2, source="info"), "masked", 0, foreign=True, masks=None
    )
    for envs in (own, foreign):
        _, infos = envs.reset(seed=0)
        assert envs is foreign or MASK not in infos
        found = found_masks(envs)
        assert found.source is None
        assert found.unused is not None
        assert 'info["action_mask"]' in found.unused
        assert found.unused.endswith("not used: masks is None")
    own.step(np.zeros(2, np.int64))


class BoxEnv(MaskedEnv):
    """Continuous actions, and masks all the same."""

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__("info")
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)

    def step(self, action: Any) -> Any:
        return self._observation(), 0.0, False, False, self._info()


def test_masks_of_continuous_actions_are_told_or_refused() -> None:
    envs = make_vec(variant(BoxEnv, {}), 2)
    _, infos = envs.reset(seed=0)
    assert MASK not in infos
    envs.step(np.zeros((2, 2), np.float32))
    assert "Discrete and MultiDiscrete actions, not Box" in str(found_masks(envs).unused)
    with pytest.raises(EnvError, match=r"masks='info': masks are for .* has Box actions"):
        make_vec(variant(BoxEnv, {}), 2, masks="info").reset(seed=0)


class LateEnv(MaskedEnv):
    """A mask in the infos of steps, but not of resets."""

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__("info")

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return super().reset(seed=seed)[0], {}


def test_a_mask_that_comes_late_is_a_fault() -> None:
    foreign = GuardedVectorEnv(
        gymnasium.vector.SyncVectorEnv([LateEnv] * 2, autoreset_mode=MODES[0]), "l", 0, foreign=True
    )
    for envs in (make_vec(variant(LateEnv, {}), 2), foreign):
        observations, _ = envs.reset(seed=0)
        actions = shown_masks(observations).argmax(-1)
        with pytest.raises(EnvFault, match="at step 1 but not at its first reset"):
            envs.step(actions)


def test_environments_must_agree_about_masks() -> None:
    class Second(MaskedEnv):
        made = 0

        def __init__(self, render_mode: str | None = None) -> None:
            Second.made += 1
            super().__init__("info" if Second.made == 2 else "none")

    gymnasium.register("toys/Second-v0", entry_point=Second)
    with pytest.raises(EnvFault, match="environment 1 of toys/Second-v0 has action masks and"):
        make_vec("toys/Second-v0", 2).reset(seed=0)


def test_atari_games_have_none() -> None:
    with pytest.raises(EnvError, match="PongNoFrameskip-v4 is an Atari game, which has no action"):
        make_vec("PongNoFrameskip-v4", 2, masks="info")


def test_gymnasiums_taxi_is_found() -> None:
    envs = make_vec("Taxi", 2)
    _, infos = envs.reset(seed=0)
    assert found_masks(envs).source == "info"
    assert infos[MASK].shape == (2, 6)
    assert not infos[MASK].all()


def test_forms_of_a_mask() -> None:
    sizes = (2, 3)
    expected = np.array([True, False, True, True, True])
    for value in (
        expected,
        [1, 0, 1, 1, 1],
        (1, 0, 1, 1, 1),
        expected.astype(np.float32),
        (np.array([1, 0]), None),
        (np.array([1, 0], np.int8), np.ones(3, np.int8)),
    ):
        np.testing.assert_array_equal(as_masks(value, sizes), expected)
    two = np.stack([expected, expected])
    np.testing.assert_array_equal(as_masks((two[:, :2], None), sizes, (2,)), two)
    bad: list[tuple[Any, str]] = [
        (expected[None], r"the shape \(1, 5\), not \(5,\)"),
        ((np.ones(2),), "it has 1 arrays, not 2"),
        ((np.ones(3), np.ones(2)), r"array 0 has the shape \(3,\), not \(2,\)"),
        (["yes"] * 5, "other values than 0 and 1: the type <U3"),
        (np.full(5, 0.5), "other values than 0 and 1: 0.5"),
        (np.full(5, np.nan), "other values than 0 and 1: nan"),
        (np.array([1, 1, 0, 0, 0]), "no action in component 1 of 2"),
    ]
    for value, said in bad:
        with pytest.raises(ValueError, match=said):
            as_masks(value, sizes)
