"""Snapshots of environments: restored elsewhere, they go on with the same bits."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation, NormalizeObservation, NormalizeReward

from acktr.envs import AnyVectorEnv, EnvFault, UnsavedError, make_vec
from acktr.envs.values import decoded, encoded, from_bytes, require_like, to_bytes
from tests.tools.command_line import environment

MUJOCO = [
    *("Ant-v5", "HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "HumanoidStandup-v5"),
    *("InvertedDoublePendulum-v5", "InvertedPendulum-v5", "Pusher-v5", "Reacher-v5"),
    *("Swimmer-v5", "Walker2d-v5"),
]
linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are for Linux")


class Walk(gymnasium.Env[Any, Any]):
    """A random walk that saves itself; its generator is Gymnasium's."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.place = np.zeros(1, np.float32)
        self.visited: list[float] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place, self.visited = np.zeros(1, np.float32), []
        return self.place.copy(), {}

    def step(self, action: Any) -> Any:
        self.place += np.float32(self.np_random.normal() + action)
        self.visited.append(float(self.place[0]))
        return self.place.copy(), sum(self.visited), len(self.visited) > 40, False, {}

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place, "visited": self.visited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place, self.visited = state["place"], state["visited"]


class Forgetful(Walk):
    """The same without a state."""

    state_dict = None  # type: ignore[assignment]


class Scaled(gymnasium.RewardWrapper[Any, Any]):
    """A wrapper without attributes of its own."""

    def reward(self, reward: Any) -> Any:
        return 2 * reward


class Drawn(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Shows a picture of the state in place of its numbers."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.observation_space = spaces.Box(0, 255, (16, 16, 1), np.uint8)

    def observation(self, observation: Any) -> Any:
        picture = np.zeros((16, 16, 1), np.uint8)
        picture[:4] = np.clip(128 + 100 * observation, 0, 255)[:, None, None]
        return picture


class Counting(gymnasium.Wrapper[Any, Any, Any, Any]):
    """A wrapper whose counter nobody can save."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.count = 0


def go_on(envs: AnyVectorEnv, steps: int, seed: int) -> str:
    """A hash of all that environments return for random actions."""
    rng, space, sha = np.random.default_rng(seed), envs.single_action_space, hashlib.sha256()
    for _ in range(steps):
        if isinstance(space, spaces.Discrete):
            actions: Any = rng.integers(0, space.n, envs.num_envs)
        else:
            actions = rng.uniform(-1, 1, (envs.num_envs, *(space.shape or ())))
            actions = actions.astype(space.dtype)
        *arrays, infos = envs.step(actions)
        for array in (*arrays, infos.get("final_obs"), infos.get("_episode")):
            sha.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
        if "episode" in infos:
            sha.update(infos["episode"]["r"].tobytes() + infos["episode"]["l"].tobytes())
    return sha.hexdigest()


def saved(env: Any, workers: int = 1, steps: int = 70, **making: Any) -> tuple[bytes, str]:
    """The state of three environments in the middle of episodes, and how they go on."""
    envs = make_vec(env, 3, seed=1, env_workers=workers, **making)
    envs.reset()
    go_on(envs, steps, 2)
    state = to_bytes(envs.state_dict())  # type: ignore[attr-defined]
    following = go_on(envs, 150, 3)
    envs.close()
    return state, following


def continued(env: Any, state: bytes, workers: int = 1, **making: Any) -> str:
    """How new environments go on from a state."""
    envs: Any = make_vec(env, 3, seed=99, env_workers=workers, **making)
    envs.load_state_dict(from_bytes(state))
    following = go_on(envs, 150, 3)
    envs.close()
    return following


@linux
@pytest.mark.parametrize(
    ("env", "before", "after"),
    [
        *(("CartPole-v1", 1, 2), ("Pendulum-v1", 2, 1), ("MountainCar-v0", 1, 1)),
        *(("Hopper-v5", 2, 1), ("Ant-v5", 1, 2), (Walk, 1, 2), (Walk, 2, 1)),
    ],
)
def test_steps_after_a_restore_are_the_same(env: Any, before: int, after: int) -> None:
    state, following = saved(env, before)
    assert continued(env, state, after) == following


@linux
def test_this_process_may_have_no_environment() -> None:
    state, following = saved(Walk, apart=True)
    assert continued(Walk, state) == continued(Walk, state, apart=True) == following


@pytest.mark.slow
def test_all_of_mujoco_goes_on_in_another_process(tmp_path: Path) -> None:
    states = {name: saved(name) for name in MUJOCO}
    for name, (state, _) in states.items():
        (tmp_path / name).write_bytes(state)
    code = (
        "import sys; from pathlib import Path; from tests.envs.test_snapshot import *\n"
        "for name in MUJOCO: print(continued(name, (Path(sys.argv[1]) / name).read_bytes()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert found.stdout.split() == [following for _, following in states.values()]


def test_wrappers_are_saved_with_it() -> None:
    def make() -> Any:
        env = NormalizeObservation(gymnasium.make("Pendulum-v1"))
        return FrameStackObservation(Scaled(NormalizeReward(env)), 3)

    state, following = saved(make)
    assert continued(make, state) == following


def test_pixels_of_classic_control() -> None:
    def make() -> Any:
        return FrameStackObservation(Drawn(gymnasium.make("CartPole-v1")), 2)

    state, following = saved(make)
    assert continued(make, state) == following


class Varied(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Gives every episode a gravity of its own."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        found = self.env.reset(seed=seed, options=options)
        base: Any = self.unwrapped
        if hasattr(base, "model"):
            base.model.opt.gravity[2] = self.np_random.uniform(-10, -9)
        else:
            base.gravity = self.np_random.uniform(9, 10)
        return found


@pytest.mark.parametrize(
    ("env", "what"), [("CartPole-v1", "'gravity' of .*CartPoleEnv"), ("Hopper-v5", "'model' of")]
)
def test_what_somebody_changes_is_not_forgotten(env: str, what: str) -> None:
    """Restored in silence the episode went on under other laws."""

    def make() -> Any:
        return Varied(gymnasium.make(env))

    state, _ = saved(make)
    with pytest.raises(UnsavedError, match=f"environment 0 of {env}: .*{what}"):
        continued(make, state)


def test_what_is_for_drawing_may_differ() -> None:
    """Also what only one of two versions of Gymnasium has, and windows stay open."""

    def changed(**attributes: Any) -> Any:
        env = gymnasium.make("CartPole-v1")
        vars(env.unwrapped).update(attributes)
        return env

    state, following = saved(lambda: changed(newer=1, notes=[1], camera_id=2, isopen=True))
    window = object()
    drawn = changed(surf=window, isopen=False, screen_width=9, own=3)
    assert continued(lambda: changed(surf=window, isopen=False, own=3), state) == following
    envs: Any = make_vec(drawn, 1)
    envs.reset()
    envs.load_state_dict(envs.state_dict())
    assert drawn.unwrapped.surf is window
    envs.close()


@pytest.mark.parametrize("making", [{"width": 200}, {"render_mode": "rgb_array"}])
def test_pictures_of_mujoco_may_differ(making: dict[str, Any]) -> None:
    state, following = saved(lambda: gymnasium.make("Hopper-v5"), steps=5)
    assert continued(lambda: gymnasium.make("Hopper-v5", **making), state) == following


def test_attributes_come_back_where_only_the_reset_changed_them() -> None:
    """They were the environment's own when it was saved."""
    envs: Any = make_vec(Varied(gymnasium.make("CartPole-v1")), 1)
    base = envs.unwrapped.envs[0].unwrapped
    envs.reset()
    base.gravity = 9.8
    state = envs.state_dict()
    envs.load_state_dict(state)
    assert base.gravity == 9.8
    envs.close()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Forgetful, "environment 0 of Forgetful: tests.envs.test_snapshot.Forgetful has no state"),
        (lambda: Counting(Walk()), "environment 0 of Walk: tests.envs.test_snapshot.Counting has"),
    ],
)
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=linux)])
def test_what_has_no_state_says_so(make: Any, why: str, workers: int) -> None:
    envs: Any = make_vec(make, 2, env_workers=workers)
    envs.reset()
    with pytest.raises(UnsavedError, match=why):
        envs.state_dict()
    envs.step(np.array([0, 1]))
    envs.close()


def _base(state: Any) -> dict[str, Any]:
    base: dict[str, Any] = state["envs"]["envs"][2]["layers"][-1]
    return base


@pytest.mark.parametrize(
    ("env", "damage", "said"),
    [
        ("Hopper-v5", lambda s: s["envs"]["envs"].pop(), "no states of 3 environments"),
        ("Hopper-v5", lambda s: s["envs"]["envs"][1]["layers"].pop(), "environment 1 of Hopper-v5"),
        ("Hopper-v5", lambda s: _base(s).update(mujoco=np.zeros(9)), "environment 2 .* shape"),
        ("Hopper-v5", lambda s: _base(s)["mujoco"].fill(math.nan), "environment 2 .* not finite"),
        ("Hopper-v5", lambda s: _base(s).update(kind="os.system"), "the state of os.system"),
        ("Hopper-v5", lambda s: _base(s).update(own=1), "other entries"),
        ("Hopper-v5", lambda s: s["episodes"].update(returns=np.zeros(4)), "shape"),
        ("Hopper-v5", lambda s: s.pop("dead"), "other entries"),
        (
            "CartPole-v1",
            lambda s: _base(s)["variables"]["dict"].update(step=1),
            "no variable 'step'",
        ),
        ("CartPole-v1", lambda s: _base(s).update(variables={"call": "x"}), "unknown kind"),
        (Walk, lambda s: _base(s).update(own={"list": [{"list": 1}]}), "unknown kind"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_anything_changes(
    env: Any, damage: Any, said: str
) -> None:
    envs: Any = make_vec(env, 3)
    envs.reset()
    before = to_bytes(envs.state_dict()["envs"])
    bad = from_bytes(to_bytes(envs.state_dict()))
    damage(bad)
    with pytest.raises(ValueError, match=said) as told:
        envs.load_state_dict(bad)
    assert "\n" not in str(told.value)
    assert to_bytes(envs.state_dict()["envs"]) == before
    envs.close()


def test_a_state_of_the_right_form_and_wrong_content_names_the_environment() -> None:
    envs: Any = make_vec(Walk, 3)
    envs.reset()
    state = envs.state_dict()
    _base(state)["own"] = encoded({"visited": []})
    with pytest.raises(EnvFault, match=r"environment 2 of Walk: .*KeyError: 'place'"):
        envs.load_state_dict(state)
    envs.close()


def test_a_number_is_one_with_and_without_an_array() -> None:
    """Running moments are an array without axes at first, and NumPy's number after a sum."""
    for value in (np.float64(3), np.array(3.0), 3.0):
        for template in (np.zeros(()), np.float64(0)):
            require_like(value, template, "mean")
    wrong: list[tuple[Any, str]] = [
        (np.ones(1), "a ndarray"),
        ("3", "a str"),
        (math.inf, "not fin"),
    ]
    for other, why in wrong:
        with pytest.raises(ValueError, match=why):
            require_like(other, np.zeros(()), "mean")


def test_values_keep_their_types() -> None:
    value: dict[str, Any] = {
        "$none": None,
        "\\bits": 2**127,
        "numbers": (np.float32(0.1), 0.1, math.inf, -math.inf, True, np.uint8(3)),
        "arrays": [np.arange(6.0).reshape(2, 3), np.zeros((), np.bool_), deque([1, "two"])],
    }
    again = decoded(from_bytes(to_bytes(encoded(value))))
    assert repr(again) == repr(value)
    assert [type(each) for each in again["numbers"]] == [type(each) for each in value["numbers"]]
    with pytest.raises(TypeError, match="a set"):
        encoded({"a": {1}})
