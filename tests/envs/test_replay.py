"""Atari games that are saved as what was done in them, and played again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from ale_py.vector_env import AtariVectorEnv

from acktr.envs import AtariSettings, UnsavedError, atari, make_single, make_vec, replay
from acktr.envs.values import from_bytes, to_bytes

SHORT = AtariSettings(reseed_steps=40, max_frames=600)


def go_on(envs: Any, steps: int, seed: int) -> str:
    """A hash of all that games return for random actions."""
    rng, sha = np.random.default_rng(seed), hashlib.sha256()
    for _ in range(steps):
        *arrays, infos = envs.step(rng.integers(0, envs.single_action_space.n, envs.num_envs))
        for array in (*arrays, infos.get("final_obs"), infos.get("forced")):
            sha.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
        if "episode" in infos:
            sha.update(infos["episode"]["r"].tobytes() + infos["episode"]["l"].tobytes())
    return sha.hexdigest()


def games(env_id: str, seed: int, atari: AtariSettings = SHORT, num_envs: int = 2) -> Any:
    return make_vec(env_id, num_envs, seed, atari=atari)


def test_games_go_on_as_they_would_have() -> None:
    """With sticky actions; tests/test_resume.py has games without."""
    env_id = "ALE/Breakout-v5"
    envs = games(env_id, 3)
    envs.reset()
    started = [group.state_dict()["log"]["seeds"] for group in envs.groups]
    go_on(envs, 230, 1)
    state = to_bytes(envs.state_dict())
    following = go_on(envs, 60, 2)
    other = games(env_id, 77)
    other.load_state_dict(from_bytes(state))
    logs = [part["log"] for part in from_bytes(state)["groups"]]
    assert all((log["seeds"] != seeds).all() for log, seeds in zip(logs, started, strict=True))
    assert to_bytes(other.state_dict()["groups"][0]["log"]) == to_bytes(logs[0])
    assert go_on(other, 60, 2) == following
    for each in (envs, other):
        each.close()


BRIEF = AtariSettings(reseed_steps=100, max_frames=16)
"""Episodes of a few steps, of which some come before a new seed."""


def played(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """For each replay to come: whether it is of whole logs, and its steps."""
    calls: list[tuple[bool, int]] = []

    def counted(log: Any, native: Any, *, whole: bool) -> replay.Played:
        first = log["begins" if whole else "starts"].min()
        calls.append((whole, len(log["actions"]) - int(first)))
        return replay.replay(log, native, whole=whole)

    monkeypatch.setattr(atari, "replay", counted)
    return calls


@pytest.mark.parametrize(
    "env_id",
    ["BreakoutNoFrameskip-v4", pytest.param("QbertNoFrameskip-v4", marks=pytest.mark.slow)],
)
def test_without_sticky_actions_the_present_episodes_suffice(
    env_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, as what was skipped once must be skipped again."""
    calls = played(monkeypatch)
    envs = games(env_id, 3, BRIEF)
    envs.reset()
    for number, steps in enumerate((150, 110), 1):
        go_on(envs, steps, number)
        state = from_bytes(to_bytes(envs.state_dict()))
        assert all((part["log"]["resets"] > 0).all() for part in state["groups"])
        resumed = games(env_id, 77, BRIEF)
        resumed.load_state_dict(state)
        assert to_bytes(resumed.state_dict()) == to_bytes(state)
        for seed in (5, 6):
            *_, mine = resumed.step(np.ones(2, np.int64))
            *_, theirs = envs.step(np.ones(2, np.int64))
            assert (mine["frame_number"] == theirs["frame_number"]).all()
            assert go_on(resumed, 60, seed) == go_on(envs, 60, seed)
        envs.close()
        envs = resumed
    envs.close()
    assert len(calls) == 4 and not any(whole for whole, _ in calls)
    assert all(steps <= 16 for _, steps in calls)


@pytest.mark.parametrize(
    ("seed", "steps", "reseed", "seeded", "most"),
    [(0, 170, 10_000, 0, 0), (2, 330, 10_000, 0, 8), (2, 330, 200, 3, 8)],
    ids=["in time", "early", "seeded anew"],
)
def test_games_that_began_apart_skip_their_episodes_together(
    seed: int, steps: int, reseed: int, seeded: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Games that wait end where their present episode begins, or before; or are seeded there."""
    atari = AtariSettings(num_groups=1, reseed_steps=reseed)
    envs = games("BreakoutNoFrameskip-v4", seed, atari, 6)
    envs.reset()
    go_on(envs, steps, seed)
    state = to_bytes(envs.state_dict())
    resumed = games("BreakoutNoFrameskip-v4", 77, atari, 6)
    calls, whole = [], played(monkeypatch)
    reset = AtariVectorEnv.reset

    def counted(native: Any, **given: Any) -> Any:
        calls.append(given.get("seed") is not None)
        return reset(native, **given)

    monkeypatch.setattr(AtariVectorEnv, "reset", counted)
    resumed.load_state_dict(from_bytes(state))
    monkeypatch.undo()
    assert whole[0][0] is False and len(whole) == 1
    assert sum(calls) == 1 + seeded and len(calls) <= 1 + most
    assert to_bytes(resumed.state_dict()) == state
    assert go_on(resumed, 60, 5) == go_on(envs, 60, 5)
    for each in (envs, resumed):
        each.close()


@pytest.mark.parametrize("lacking", [False, True])
def test_what_the_present_episodes_do_not_tell_the_whole_log_does(
    lacking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resets that were miscounted, and a state of before they were counted."""
    envs = games("BreakoutNoFrameskip-v4", 3, BRIEF)
    envs.reset()
    go_on(envs, 90, 1)
    right = to_bytes(envs.state_dict())
    state = from_bytes(right)
    for part in state["groups"]:
        if lacking:
            del part["frames"], part["log"]["starts"], part["log"]["resets"]
        else:
            part["log"]["resets"] -= 1
    calls = played(monkeypatch)
    resumed = games("BreakoutNoFrameskip-v4", 77, BRIEF)
    resumed.load_state_dict(state)
    assert [whole for whole, _ in calls] == ([True, True] if lacking else [False, True] * 2)
    assert to_bytes(resumed.state_dict()) == right
    assert go_on(resumed, 50, 2) == go_on(envs, 50, 2)
    for each in (envs, resumed):
        each.close()


def test_a_game_that_was_seeded_in_the_last_step_is_saved_too() -> None:
    envs = games("ALE/Breakout-v5", 3, AtariSettings(reseed_steps=30, num_groups=1))
    envs.reset()
    rng = np.random.default_rng(0)
    log = envs.state_dict()["groups"][0]["log"]
    while not (log["begins"] == len(log["actions"])).any() or not len(log["actions"]):
        envs.step(rng.integers(0, 4, 2))
        log = envs.state_dict()["groups"][0]["log"]
    other = games("ALE/Breakout-v5", 5, AtariSettings(reseed_steps=30, num_groups=1))
    other.load_state_dict(envs.state_dict())
    assert go_on(other, 50, 2) == go_on(envs, 50, 2)
    for each in (envs, other):
        each.close()


def test_short_logs_change_no_game() -> None:
    """The seeds of the published protocol hold until a log has grown long."""
    hashes = []
    for reseed_steps in (0, 10_000):
        envs = games("BreakoutNoFrameskip-v4", 3, AtariSettings(reseed_steps=reseed_steps))
        envs.reset()
        hashes.append(go_on(envs, 150, 1))
        envs.close()
    assert hashes[0] == hashes[1]


def test_a_single_game_is_saved_with_its_picture() -> None:
    envs = [make_single("ALE/Breakout-v5") for _ in range(2)]
    for number, env in enumerate(envs):
        env.reset(seed=number)
    for _ in range(30):
        envs[0].step(1)
    envs[1].unwrapped.load_state_dict(envs[0].unwrapped.state_dict())  # type: ignore[attr-defined]
    for action in (2, 3, 2, 1):
        (one, *_), (other, *_) = (env.step(action) for env in envs)
        assert np.array_equal(one, other)
        assert np.array_equal(envs[0].render(), envs[1].render())  # type: ignore[arg-type]
    for env in envs:
        env.close()


def test_what_cannot_be_saved_says_so() -> None:
    envs = games("BreakoutNoFrameskip-v4", 3, AtariSettings(reseed_steps=0))
    with pytest.raises(UnsavedError, match="reseed_steps"):
        envs.state_dict()
    envs.close()
    envs = games("BreakoutNoFrameskip-v4", 3)
    envs.reset()
    envs.reset()
    with pytest.raises(UnsavedError, match="without a seed"):
        envs.state_dict()
    envs.close()


@pytest.fixture(scope="module")
def begun() -> Iterator[Any]:
    envs = games("BreakoutNoFrameskip-v4", 3)
    envs.reset()
    go_on(envs, 5, 1)
    yield envs
    envs.close()


def _log(state: Any) -> dict[str, Any]:
    log: dict[str, Any] = state["groups"][1]["log"]
    return log


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (lambda s: s["groups"].pop(), ValueError, "no states of 2 groups"),
        (lambda s: _log(s)["actions"].fill(9), ValueError, "actions above 3"),
        (lambda s: _log(s).update(actions=np.zeros((5, 2), np.uint8)), ValueError, "the shape"),
        (
            lambda s: _log(s).update(actions=np.zeros((10**6, 1), np.uint8)),
            ValueError,
            "at most 641 steps",
        ),
        (lambda s: _log(s).update(actions="all"), ValueError, "the shape"),
        (lambda s: _log(s)["begins"].fill(6), ValueError, "out of range"),
        (lambda s: _log(s)["seeds"].fill(-1), ValueError, "out of range"),
        (lambda s: _log(s)["starts"].fill(6), ValueError, "starts out of range"),
        (lambda s: _log(s)["resets"].fill(1), ValueError, "more resets than steps"),
        (lambda s: _log(s).pop("resets"), ValueError, "other entries"),
        (lambda s: s["groups"][0].pop("press"), ValueError, "other entries"),
        (lambda s: _log(s)["seeds"].fill(8), UnsavedError, "look different"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    damage: Any, error: type[Exception], said: str, begun: Any
) -> None:
    state = begun.state_dict()
    damage(state)
    with pytest.raises(error, match=said) as told:
        begun.load_state_dict(state)
    assert "\n" not in str(told.value)
