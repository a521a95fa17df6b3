"""What agents can learn on, and that they come back to the same environments or are refused."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import TransformReward

from acktr import A2C, ACKTR, CheckpointError, Config, ConfigError, EnvError, preset
from acktr.config import to_dict
from acktr.envs import make_vec
from acktr.runs.checkpoint import save_checkpoint
from acktr.runs.saved import play, read_agent
from tests.tools.toys import CountingEnv, IdentityEnv, variant


def identity(horizon: int = 5, start: int = 0) -> gymnasium.Env[Any, Any]:
    return IdentityEnv(spaces.Discrete(2, start=start), horizon)


class Tripled(gymnasium.RewardWrapper[Any, Any]):
    def reward(self, reward: Any) -> Any:
        return 3 * reward


def tiny(env: str = "x", **changes: Any) -> Config:
    settings = {"num_envs": 2, "num_steps": 8, **changes}
    return dataclasses.replace(preset("any")[0], env=env, **settings)


def episodes(agent: Any, steps: int = 64) -> list[tuple[float, int]]:
    found: list[tuple[float, int]] = []
    agent.learn(steps, lambda stats: found.extend((e.reward, e.length) for e in stats.episodes))
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_an_id_a_class_a_function_and_a_list_learn_the_same(workers: int) -> None:
    settings: dict[str, Any] = {"action_space": spaces.Discrete(2)}
    horizon, networks = {"horizon": 5}, []
    both = {"env_kwargs": settings | horizon}
    forms: list[tuple[Any, dict[str, Any]]] = [
        (variant(IdentityEnv, settings), {"env_kwargs": horizon}),
        (IdentityEnv, both),
        (identity, {}),
        ([identity, identity], {}),
    ]
    for form, given in forms:
        env = form if isinstance(form, str) else "x"
        agent = ACKTR(form, tiny(env, env_workers=workers), 4, wrappers=(Tripled,), **given)
        assert {length for _, length in episodes(agent)} == {5}
        networks.append(agent.trainer.network.state_dict())
        agent.close()
    for network in networks[1:]:
        for name, value in networks[0].items():
            assert torch.equal(network[name], value)


def test_one_environment_is_the_only_one_with_updates_of_the_same_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = gymnasium.make("CartPole-v1")
    agent = ACKTR(env, seed=0)
    base = preset("CartPole-v1")[0]
    assert agent.config.env == "CartPole-v1"
    assert (agent.config.num_envs, agent.config.num_steps) == (1, base.num_envs * base.num_steps)
    assert len(episodes(agent, 256)) > 3
    with monkeypatch.context() as patch:
        patch.setattr(env, "close", lambda: pytest.fail("it is the caller's"))
        agent.close()
    assert ACKTR(env, tiny()).config.num_steps == 8
    with pytest.raises(EnvError, match="8 environments cannot be made: CartPole-v1 is one"):
        ACKTR(gymnasium.make("CartPole-v1"), num_envs=8)


def test_the_preset_follows_the_environment_that_a_function_makes() -> None:
    agent = ACKTR(lambda: gymnasium.make("CartPole-v1"), num_envs=3)
    assert agent.config == dataclasses.replace(preset("CartPole-v1")[0], num_envs=3)
    assert A2C(identity).config == dataclasses.replace(preset("x", "a2c")[0], env="IdentityEnv")


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        (("MlpPolicy", identity), {}, ConfigError, "order of Stable-Baselines3: write ACKTR"),
        ((identity, 3), {}, ConfigError, "config must be an acktr.Config, got a int"),
        ((identity,), {"num_envs": 0}, ConfigError, "num_envs must be an integer >= 1, got 0"),
        (([identity] * 2,), {"num_envs": 3}, EnvError, "3 environments cannot be made"),
        ((identity,), {"env_kwargs": {"size": 3}}, EnvError, "argument 'size'"),
    ],
)
def test_bad_arguments_are_told_in_one_line(
    arguments: Any, settings: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        ACKTR(*arguments, **settings)
    assert "\n" not in str(caught.value)


def test_made_vector_environments_take_no_settings() -> None:
    envs = gymnasium.make_vec("CartPole-v1", 2, vectorization_mode="sync")
    for given in ({"num_envs": 3}, {"env_kwargs": {"a": 1}}, {"wrappers": (Tripled,)}):
        with pytest.raises(EnvError, match="cannot be given to a VectorEnv"):
            ACKTR(envs, **given)
    assert ACKTR(envs, num_envs=2).config.num_envs == 2
    envs.close()


def test_arguments_and_wrappers_come_back(tmp_path: Path) -> None:
    env_id = variant(CountingEnv, {})
    agent = ACKTR(env_id, tiny(env_id), env_kwargs={"terminate_at": 4}, wrappers=(Tripled,)).learn(
        32
    )
    assert dict(agent.config.env_kwargs) == {"terminate_at": 4}
    assert agent.config.wrappers == (f"{__name__}:Tripled",)
    agent.save(tmp_path / "agent")
    for given in ({}, {"env_kwargs": {"terminate_at": 4}}, {"env": env_id, "num_envs": 3}):
        loaded = ACKTR.load(tmp_path / "agent", **given)  # type: ignore[arg-type]
        assert set(episodes(loaded)) == {(30.0, 4)}
        loaded.close()
    played = play(
        read_agent(tmp_path / "agent"), 2, seed=0, num_envs=2, deterministic=True, device="cpu"
    )
    assert (played.returns, played.lengths) == ((30.0, 30.0), (4, 4))
    other = ACKTR.load(tmp_path / "agent", env_id, env_kwargs={"terminate_at": 2}, wrappers=())
    assert set(episodes(other)) == {(3.0, 2)}
    with pytest.raises(ConfigError, match=r"env_kwargs is {'terminate_at': 5} but the agent was"):
        ACKTR.load(tmp_path / "agent", env_kwargs={"terminate_at": 5})
    with pytest.raises(ConfigError, match=r"wrappers is \(\) but the agent was trained with"):
        ACKTR.load(tmp_path / "agent", wrappers=())


FORMS: dict[str, Any] = {
    "function": lambda: identity,
    "class": lambda: CountingEnv,
    "list": lambda: [identity],
    "one": identity,
    "vector": lambda: gymnasium.make_vec(
        "FrozenLake-v1", 2, vectorization_mode="sync", is_slippery=False
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_no_file_can_bring_back_is_asked_for(form: str, tmp_path: Path) -> None:
    settings = {"env_kwargs": {"truncate_at": 6}} if form == "class" else {}
    ACKTR(FORMS[form](), tiny(), **settings).learn(32).save(tmp_path / "agent")
    with pytest.raises(CheckpointError, match=r"which no file can bring back; .*load\(path, env="):
        ACKTR.load(tmp_path / "agent")
    with pytest.raises(CheckpointError, match="which no file can bring back"):
        play(
            read_agent(tmp_path / "agent"), 1, seed=0, num_envs=1, deterministic=True, device="cpu"
        )
    loaded = ACKTR.load(tmp_path / "agent", FORMS[form]())
    assert form != "class" or {length for _, length in episodes(loaded)} == {6}
    loaded.learn(32)


def test_arguments_and_wrappers_without_a_name_are_asked_for(tmp_path: Path) -> None:
    env_id = variant(CountingEnv, {})
    for settings in (
        {"env_kwargs": {"terminate_at": np.int64(4)}},
        {"wrappers": (lambda env: TransformReward(env, lambda r: 3 * r),)},
    ):
        agent = ACKTR(env_id, tiny(env_id), **settings)  # type: ignore[arg-type]
        agent.learn(32).save(tmp_path / "agent")
        with pytest.raises(CheckpointError, match=r"made with env_kwargs|wrapped by <lambda>"):
            ACKTR.load(tmp_path / "agent")
        agent.close()


def test_a_file_cannot_name_a_wrapper_to_import(tmp_path: Path) -> None:
    agent = ACKTR("CartPole-v1", tiny("CartPole-v1"))
    config = {**to_dict(agent.config), "wrappers": ["this:s"]}
    meta = {"format": "acktr-agent", "config": config}
    save_checkpoint(tmp_path / "evil", agent.trainer.state_dict(), meta)
    with pytest.raises(CheckpointError, match="its wrapper this:s would import the module this;"):
        ACKTR.load(tmp_path / "evil")
    assert "this" not in sys.modules


def test_predict_speaks_the_language_of_the_environment() -> None:
    agent = ACKTR(identity, tiny(num_steps=32), 0, env_kwargs={"start": 3}).learn(1000)
    env = identity(start=3)
    observation, _ = env.reset(seed=1)
    action, _ = agent.predict(observation, deterministic=True)
    assert env.action_space.contains(action)
    assert env.step(action)[1] == 1.0


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32])
def test_integers_of_numpy_are_integers(kind: Any, tmp_path: Path) -> None:
    agent = ACKTR("CartPole-v1", seed=kind(85), num_envs=kind(2)).learn(kind(100))
    agent.save(tmp_path / "agent")
    assert type(agent.config.seed) is int
    assert ACKTR.load(tmp_path / "agent").config == agent.config
    assert dataclasses.replace(agent.config, gamma=np.float32(0.5)).gamma == 0.5
    with pytest.raises(ConfigError, match="seed must be an integer"):
        dataclasses.replace(agent.config, seed=np.float64(3.0))


class OnlyOne(IdentityEnv):
    """Rewards the second action, which alone its mask allows."""

    def __init__(self) -> None:
        super().__init__(spaces.Discrete(2), 10)

    def step(self, action: Any) -> Any:
        obs, _, *rest = super().step(action)
        return obs, float(action == 1), *rest

    def action_masks(self) -> list[bool]:
        return [False, True]


@pytest.mark.parametrize(("masks", "obeys"), [("auto", True), (None, False)])
@pytest.mark.parametrize("again", [False, True])
def test_evaluation_follows_the_setting_of_masks(masks: Any, obeys: bool, again: bool) -> None:
    agent = ACKTR(OnlyOne, tiny(masks=masks), 0)
    played = agent.evaluate(OnlyOne if again else None, 8, deterministic=False)
    assert (played.mean == 10.0) is obeys
    agent.close()


def test_another_number_of_environments_keeps_the_samples_of_an_update(tmp_path: Path) -> None:
    """As where the one environment is given at first; silently it was an eighth of them."""
    config = dataclasses.replace(preset("CartPole-v1", "a2c")[0], num_envs=8, num_steps=4)
    sizes = []
    with A2C("CartPole-v1", config) as agent:
        agent.save(tmp_path / "agent.zip")
        for env in (gymnasium.make("CartPole-v1"), [lambda: gymnasium.make("CartPole-v1")] * 16):
            agent.set_env(env)
            sizes.append((agent.config.num_envs, agent.config.num_steps))
    one = A2C.load(tmp_path / "agent.zip", gymnasium.make("CartPole-v1"))
    assert sizes == [(1, 32), (16, 2)] and one.config.num_steps == 32


def test_a_saved_agent_keeps_the_samples_of_an_update(tmp_path: Path) -> None:
    A2C("CartPole-v1", num_envs=4, num_steps=8).save(tmp_path / "agent")
    pair = make_vec("CartPole-v1", 2)
    for given, count, steps in (({"env": pair}, 2, 16), ({"num_envs": 1}, 1, 32), ({}, 4, 8)):
        with A2C.load(tmp_path / "agent", **given) as agent:  # type: ignore[arg-type]
            assert (agent.config.num_envs, agent.config.num_steps) == (count, steps)
    with pytest.warns(UserWarning, match="33 samples .* num_steps=11 .* 3 environments: 32, as"):
        A2C.load(tmp_path / "agent", num_envs=3).close()
