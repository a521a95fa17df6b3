"""What environments can be made from, and what cannot be used as one."""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation, TimeLimit, TransformReward

from acktr.envs import EnvError, EnvFault, EnvSource, describe, make_single, make_vec, wrapper_name
from tests.tools.toys import CountingEnv, SpacesEnv, variant


def counting(terminate_at: int = 3) -> gymnasium.Env[Any, Any]:
    return CountingEnv(terminate_at=terminate_at)


class Doubled(gymnasium.RewardWrapper[Any, Any]):
    def reward(self, reward: Any) -> Any:
        return 2 * reward


class Silent(gymnasium.Env[Any, Any]):
    """Its constructor knows no render mode."""

    observation_space: Any = spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space: Any = spaces.Discrete(2)

    def __init__(self, size: int = 1) -> None:
        self.size = size

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(2, np.float32), 1.0, False, False, {}


class OldManner(Silent):
    """The interface of gym before 0.26 in a class of Gymnasium's."""

    def __init__(self, old: str = "step") -> None:
        self.old = old

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        found = super().reset(seed=seed)
        return np.zeros(3, np.float32) if self.old == "reset" else found

    def step(self, action: Any) -> Any:
        return np.zeros(2, np.float32), 1.0, False, {}


def ended(envs: Any, steps: int = 12) -> list[tuple[float, int]]:
    """Returns and lengths of the episodes of some steps."""
    found: list[tuple[float, int]] = []
    envs.reset(seed=0)
    for _ in range(steps):
        infos = envs.step(np.zeros(envs.num_envs, np.int64))[4]
        for index in np.flatnonzero(infos.get("_episode", ())):
            found.append((infos["episode"]["r"][index], int(infos["episode"]["l"][index])))
    envs.close()
    return found


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("form", ["id", "spec", "class", "function", "partial", "list"])
def test_every_form_gives_the_same_environments(form: str, workers: int) -> None:
    env_id = variant(CountingEnv, {})
    forms: dict[str, Any] = {
        "id": env_id,
        "spec": gymnasium.spec(env_id),
        "class": CountingEnv,
        "function": counting,
        "partial": functools.partial(counting),
        "list": [counting, counting],
    }
    envs = make_vec(
        forms[form], 2, env_workers=workers, env_kwargs={"terminate_at": 4}, wrappers=(Doubled,)
    )
    assert ended(envs) == [(20.0, 4)] * 6


def test_wrappers_go_from_the_inside_out_and_may_be_named() -> None:
    name = f"{__name__}:Doubled"
    assert wrapper_name(Doubled) == name
    envs = make_vec(
        counting, 1, wrappers=(name, lambda env: TimeLimit(env, 2), lambda env: Doubled(env))
    )
    assert ended(envs) == [(12.0, 2)] * 6
    single = make_single("CartPole-v1", wrappers=("gymnasium.wrappers:FlattenObservation",))
    assert isinstance(single.unwrapped, gymnasium.Env)
    single.close()


def test_what_gymnasium_make_takes() -> None:
    envs = make_vec("CartPole-v1", 1, env_kwargs={"max_episode_steps": 3})
    assert {length for _, length in ended(envs, 30)} == {3}
    assert describe("CartPole-v1", env_kwargs={"max_episode_steps": 3})["max_episode_steps"] == 3
    assert describe("CartPole-v1", wrappers=["a:B"])["wrappers"] == ["a:B"]
    assert "env_kwargs" not in describe("CartPole-v1")
    make_vec(_registered(Silent), 2, env_kwargs={"size": 5}).close()


def _registered(kind: type[gymnasium.Env[Any, Any]]) -> str:
    env_id = f"toys/{kind.__name__}-v0"
    if env_id not in gymnasium.registry:
        gymnasium.register(env_id, entry_point=kind)
    return env_id


@pytest.mark.parametrize(
    ("source", "name", "origin"),
    [
        ("CartPole-v1", "CartPole-v1", None),
        (lambda: gymnasium.make("CartPole-v1"), "CartPole-v1", "made by the function <lambda>"),
        (CountingEnv, "CountingEnv", "made by the class CountingEnv"),
        ([counting], "CountingEnv", "made by a list of 1 functions"),
    ],
)
def test_names_and_origins(source: Any, name: str, origin: str | None) -> None:
    found = EnvSource(source)
    assert (found.name, found.origin) == (name, origin)


def test_what_a_file_cannot_say() -> None:
    plain = {"terminate_at": 3}
    env_id = variant(CountingEnv, {})
    assert EnvSource(env_id, plain, (FlattenObservation,)).origin is None
    made = EnvSource(env_id, {**plain, "truncate_at": np.int64(4)})
    assert made.origin == "made with env_kwargs that are no JSON values (truncate_at)"
    assert made.json_kwargs == plain
    nameless = EnvSource(env_id, plain, (FlattenObservation, lambda env: env))
    assert nameless.origin == "wrapped by <lambda>, which is not found in a module by its name"
    changed = gymnasium.spec(env_id)
    changed = EnvSource(type(changed)(env_id, entry_point=CountingEnv, max_episode_steps=7))
    assert changed.origin is not None and "not the registered one" in changed.origin


class FromOldGym:
    """As old gym's environments look from here."""


class FromPeer:
    """As another library's vector environments look from here."""


FromPeer.__module__ = "stable_baselines3.common.vec_env"


FromOldGym.__module__ = "gym.core"


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        (3, {}, "must be an id, a gymnasium.Env, a class or function that makes one.*got int 3"),
        ([], {}, "must be an id"),
        (["CartPole-v1"], {}, "must be an id"),
        ("MlpPolicy", {}, r"'MlpPolicy' is no environment: write ACKTR\(env\) without a policy"),
        (lambda: 5, {}, "<lambda> gave no gymnasium.Env but int 5"),
        (
            FromOldGym(),
            {},
            r"old gym: derive its class from gymnasium.Env, or convert it by shimmy",
        ),
        (FromOldGym, {}, r"FromOldGym gave no gymnasium.Env but FromOldGym .* of the old gym"),
        (
            lambda: gymnasium.make_vec("CartPole-v1", 2, vectorization_mode="sync"),
            {},
            "gave no gymnasium.Env but SyncVectorEnv .*; give the VectorEnv itself",
        ),
        (gymnasium.vector.SyncVectorEnv, {}, "is a class of vector environments: give one of them"),
        (CountingEnv(), {}, r"2 environments cannot be made: CountingEnv is one CountingEnv that"),
        ([counting] * 3, {}, "2 environments cannot be made: CountingEnv is made by a list of 3"),
        (CountingEnv(), {"env_kwargs": {"a": 1}}, "env_kwargs cannot be given to an environment"),
        (counting, {"env_kwargs": {"at": 1}}, "counting could not be made: .*argument 'at'"),
        (
            "CartPole-v1",
            {"env_kwargs": {"siz": 1}},
            "CartPole-v1 could not be made:.*argument 'siz'",
        ),
        ("ALE/Pong-v5", {"env_kwargs": {"frameskip": 1}}, r"has its own settings \(atari.\*\)"),
        ("CartPole-v1", {"wrappers": ("Doubled",)}, "'Doubled' must be written as module:Name"),
        ("CartPole-v1", {"wrappers": ("no_such_module:A",)}, "cannot be imported: ModuleNotFound"),
        ("CartPole-v1", {"wrappers": ("math:A",)}, "cannot be imported: AttributeError"),
        ("CartPole-v1", {"wrappers": ("math:pi",)}, "'math:pi' is no class or function"),
        ("CartPole-v1", {"wrappers": "Doubled"}, "wrappers must be a list, such as .*'Doubled'"),
        ("CartPole-v1", {"wrappers": (3,)}, "a wrapper must be a class, a function or module:Name"),
        ("CartPole-v1", {"wrappers": (lambda env: 1 / 0,)}, "<lambda> failed: ZeroDivisionError"),
        ("CartPole-v1", {"wrappers": (lambda env: None,)}, "<lambda> gave no gymnasium.Env"),
        (
            lambda: SpacesEnv(spaces.Text(3), spaces.Discrete(2)),
            {},
            "unsupported observation space Text",
        ),
    ],
)
def test_what_is_refused_is_told_in_one_line(source: Any, settings: Any, message: str) -> None:
    with pytest.raises(EnvError, match=message) as caught:
        make_vec(source, 2, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_a_reward_may_be_an_array_of_one_number() -> None:
    def wrapped(env: Any) -> Any:
        return TransformReward(env, lambda reward: np.array([reward]))

    assert ended(make_vec(counting, 1, wrappers=(wrapped,))) == [(6.0, 3)] * 4


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("old", ["reset", "step"])
@pytest.mark.filterwarnings("ignore")
def test_the_interface_of_old_gym_is_named(old: str, registered: bool) -> None:
    source: Any = _registered(OldManner) if registered else OldManner
    envs = make_vec(source, 1, env_kwargs={"old": old})
    with pytest.raises(EnvFault, match=f"{old} must return .* environments of gym before 0.26"):
        envs.reset()
        envs.step(np.zeros(1, np.int64))
    envs.close()


def test_vector_environments_without_a_single_form() -> None:
    gymnasium.register("toys/OnlyVector-v0", vector_entry_point="tests.tools.toys:CountingEnv")
    with pytest.raises(EnvError, match=r"as a vector environment only: give gymnasium.make_vec"):
        make_vec("toys/OnlyVector-v0", 2)
    del gymnasium.registry["toys/OnlyVector-v0"]


def test_a_wrapper_of_the_main_module_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    kind = type("Mine", (Doubled,), {"__module__": "__main__"})
    main.Mine = kind  # type: ignore[attr-defined]
    assert wrapper_name(kind) is None
