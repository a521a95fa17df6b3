"""What users of Stable-Baselines know: parameters, probabilities, values, rates, other places."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from acktr import A2C, ACKTR, TRPO, CheckpointError, Config, ConfigError, EnvError, preset
from acktr.config import merge
from acktr.envs import make_vec
from tests.tools.toys import SpacesEnv


def tiny(env: str = "CartPole-v1", algo: Any = "acktr", **changes: Any) -> Config:
    return dataclasses.replace(preset(env, algo)[0], num_envs=2, num_steps=8, **changes)


def of_space(space: spaces.Space[Any]) -> ACKTR:
    """An agent whose actions are of a space; the network's numbers are of size one."""
    vector = spaces.Box(-1.0, 1.0, (3,), np.float32)
    maker = [lambda: SpacesEnv(vector, space)] * 2
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    envs = gymnasium.vector.SyncVectorEnv(maker, autoreset_mode=mode)
    config = merge(tiny(), {"network": {"policy_gain": 1.0}})
    return ACKTR(envs, config, seed=4)


SPACES = [
    spaces.Discrete(3),
    spaces.Discrete(3, start=5),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiDiscrete([2, 3], start=[1, -1]),
    spaces.MultiBinary(2),
    spaces.Box(-0.3, 0.3, (2, 1), np.float32),
]
ROWS = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


@pytest.mark.parametrize("space", SPACES, ids=repr)
def test_probabilities_are_those_of_the_samples(space: spaces.Space[Any]) -> None:
    """Frequencies of predicted actions, and the density of a Gaussian written out."""
    agent = of_space(space)
    row = ROWS[1]
    told = agent.action_probability(row)
    if isinstance(space, spaces.Box):
        mean, deviation = told
        assert mean.shape == deviation.shape == (2, 1)
        action = np.array([[0.2], [-0.1]], np.float32)
        z = (action.astype(np.float64) - mean) / deviation
        density = np.exp(-0.5 * z**2).prod() / (2 * np.pi * deviation.prod(dtype=np.float64))
        assert agent.action_probability(row, action) == pytest.approx(density, rel=1e-5)
        assert agent.action_probability(row, action, logp=True) == pytest.approx(np.log(density))
        return
    drawn, _ = agent.predict(np.repeat(row[None], 4000, 0))
    if isinstance(space, spaces.Discrete):
        shares = [(drawn == space.start + k).mean() for k in range(3)]
        assert np.abs(told - shares).max() < 0.04
        each = [float(agent.action_probability(row, space.start + k)) for k in range(3)]
        np.testing.assert_allclose(each, told, rtol=1e-5)
        return
    start: Any = getattr(space, "start", np.zeros(2, np.int64))
    ones = told if isinstance(told, np.ndarray) else np.array([part[1] for part in told])
    assert np.abs((drawn == start + 1).mean(0) - ones).max() < 0.04
    both = agent.action_probability(row, start + 1)
    assert both == pytest.approx(ones.prod(), rel=1e-5)


@pytest.mark.parametrize("space", SPACES, ids=repr)
def test_a_batch_is_its_rows(space: spaces.Space[Any]) -> None:
    """Up to the rounding of float32, which differs between one row and several on some machines."""
    agent = of_space(space)
    actions, _ = agent.predict(ROWS, deterministic=True)
    together = agent.action_probability(ROWS, actions)
    assert together.shape == (4,)
    for index, row in enumerate(ROWS):
        alone = agent.action_probability(row)
        batch = agent.action_probability(ROWS)
        pairs = zip(alone, batch, strict=True) if isinstance(alone, tuple) else [(alone, batch)]
        for one, several in pairs:
            np.testing.assert_allclose(one, several[index], rtol=1e-4)
        one = agent.action_probability(row, actions[index])
        assert float(one) == pytest.approx(float(together[index]), rel=1e-4)
        assert float(agent.value(row)) == pytest.approx(float(agent.value(ROWS)[index]), rel=1e-4)
    assert agent.value(ROWS).shape == (4,)
    assert np.shape(agent.value(ROWS[0])) == ()


def test_values_are_those_of_the_critic() -> None:
    agent = ACKTR("Pendulum-v1", tiny("Pendulum-v1"), seed=0).learn(160)
    rows = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    normalizer = agent.trainer.collector.observation_normalizer
    assert normalizer is not None
    with torch.no_grad():
        wanted = agent.trainer.network(torch.from_numpy(normalizer(rows)))[1].numpy()
    np.testing.assert_array_equal(agent.value(rows), wanted)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda a: a.value(np.zeros(4)), r"shape \(4,\); \(3,\) or"),
        (lambda a: a.action_probability(ROWS, [0, 1]), "2 actions for 4 observations"),
        (lambda a: a.action_probability(ROWS[0], 3), "the action 3 is not in Discrete"),
        (lambda a: a.action_probability(ROWS[0], 0.5), "the action 0.5 is not in Discrete"),
        (lambda a: a.action_probability(ROWS[0], [0]), r"actions have shape \(1, 1\); \(\) for"),
        (lambda a: a.action_probability(ROWS, logp=True), "logp=True needs actions"),
    ],
)
def test_bad_questions_get_one_line(call: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line) as caught:
        call(of_space(spaces.Discrete(3)))
    assert "\n" not in str(caught.value)


def test_parameters_go_out_and_in() -> None:
    with ACKTR("CartPole-v1", tiny(), seed=0) as one, ACKTR("CartPole-v1", tiny(), seed=1) as two:
        before = one.get_parameters()
        kept = {name: x.clone() for name, x in before.items()}
        one.learn(64)
        assert all(torch.equal(before[name], kept[name]) for name in kept)
        assert any(not torch.equal(before[name], x) for name, x in one.get_parameters().items())
        two.set_parameters({name: x.numpy() for name, x in one.get_parameters().items()})
        rows = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
        with torch.no_grad():
            pair = [a.trainer.network(torch.from_numpy(rows)) for a in (one, two)]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*pair, strict=True))
        two.learn(64)  # the optimizers see the new numbers
        for name, x in two.get_parameters().items():
            assert x.isfinite().all() and not torch.equal(x, one.get_parameters()[name])


def test_wrong_parameters_change_nothing() -> None:
    agent = ACKTR("CartPole-v1", tiny(), seed=0)
    own = agent.get_parameters()
    first, last = min(own), max(own)
    cases: dict[str, Any] = {
        f"parameter '{last}' is missing": {k: v for k, v in own.items() if k != last},
        "parameter 'other' is unknown": {**own, "other": own[first]},
        f"parameter '{last}' has shape": {**own, first: own[first] + 1, last: torch.zeros(77)},
        f"parameter '{last}' has NaN": {**own, first: own[first] + 1, last: own[last] * np.nan},
    }
    for line, given in cases.items():
        with pytest.raises(ValueError, match=line):
            agent.set_parameters(given)
    with pytest.raises(ValueError, match="unknown"):
        agent.set_parameters({"other": own[first]}, exact_match=False)
    assert all(torch.equal(value, own[name]) for name, value in agent.get_parameters().items())
    agent.set_parameters({first: own[first] + 1}, exact_match=False)
    assert torch.equal(agent.get_parameters()[first], own[first] + 1)
    assert torch.equal(agent.get_parameters()[last], own[last])


def test_another_environment_of_the_same_spaces() -> None:
    """The network and its statistics go along, what it predicts is the same."""
    agent = ACKTR("Pendulum-v1", tiny("Pendulum-v1"), seed=0).learn(64)
    rows = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    before, values = agent.predict(rows, deterministic=True)[0], agent.value(rows)
    envs = make_vec("Pendulum-v1", 3, 7)
    with pytest.warns(UserWarning, match="15 samples .* num_steps=5 .* 3 environments: 16, as"):
        agent.set_env(envs)
    assert agent.envs is envs and (agent.config.num_envs, agent.config.num_steps) == (3, 5)
    np.testing.assert_array_equal(agent.predict(rows, deterministic=True)[0], before)
    np.testing.assert_array_equal(agent.value(rows), values)
    assert agent.learn(24).num_timesteps == 94
    normalizer = agent.trainer.collector.observation_normalizer
    assert normalizer is not None and normalizer.moments.count > 80
    agent.set_env("Pendulum-v1")
    assert agent.learn(24).num_timesteps == 124
    for wrong, line in (("CartPole-v1", "action space|observation space"), ("No-v0", "No")):
        with pytest.raises(EnvError, match=line) as caught:
            agent.set_env(wrong)
        assert "\n" not in str(caught.value)
    assert agent.config.env == "Pendulum-v1"
    agent.learn(24)
    agent.close()
    envs.close()


def test_evaluation_goes_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with ACKTR("Pendulum-v1", tiny("Pendulum-v1"), seed=0) as agent:
        found = agent.evaluate(episodes=3)
        assert found.lengths == (200,) * 3
        assert found == agent.evaluate(episodes=3) == agent.evaluate("Pendulum-v1", 3)
        assert found != agent.evaluate(episodes=3, seed=5)
        assert found != agent.evaluate(episodes=3, deterministic=False)
        envs = gymnasium.make_vec("Pendulum-v1", 2, vectorization_mode="sync")
        assert len(agent.evaluate(envs, 3).returns) == 3
        one = gymnasium.make("Pendulum-v1")
        with monkeypatch.context() as patch:
            patch.setattr(one, "close", lambda: pytest.fail("it is left open"))
            assert len(agent.evaluate(one, 2).returns) == 2
        one.close()
        again = agent.learn(64)  # training was not disturbed
        assert again.num_timesteps == 64
        with pytest.raises(EnvError, match="the agent's observation space is"):
            agent.evaluate("CartPole-v1", 3)
        with pytest.raises(ValueError, match="episodes must be at least 1"):
            agent.evaluate(episodes=0)
    given = ACKTR(envs, tiny("Pendulum-v1"))
    with pytest.raises(EnvError, match=r"evaluate\(env=\.\.\.\) needs others"):
        given.evaluate()
    envs.close()


@pytest.mark.parametrize("kind", [ACKTR, A2C])
def test_a_learning_rate_is_a_number_or_a_function(kind: Any) -> None:
    rates: list[float] = []

    def note(stats: Any) -> None:
        rates.append(stats.metrics["train/learning_rate"])

    with kind("CartPole-v1", tiny(algo=kind.algo), learning_rate=0.01) as agent:
        agent.learn(48, note)
    with kind("CartPole-v1", tiny(algo=kind.algo), learning_rate=lambda x: 0.02 * x) as agent:
        agent.learn(64, note)
    with kind("CartPole-v1", tiny(algo=kind.algo), learning_rate=lambda x: 0.0) as agent:
        before = agent.get_parameters()
        agent.learn(16, note)
    assert rates == pytest.approx([0.01, 0.01, 0.01, 0.02, 0.015, 0.01, 0.005, 0.0])
    moved = {name for name, x in agent.get_parameters().items() if not torch.equal(x, before[name])}
    assert all("critic" in name for name in moved)


@pytest.mark.parametrize(
    ("kind", "rate", "line"),
    [
        (TRPO, 0.1, "trpo has no learning rate"),
        (ACKTR, -1.0, "learning_rate must be a finite number > 0 or a function"),
        (A2C, float("nan"), "learning_rate must be a finite number > 0 or a function"),
        (ACKTR, "linear", "learning_rate must be .* got 'linear'"),
    ],
)
def test_bad_learning_rates(kind: Any, rate: Any, line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        kind("CartPole-v1", tiny(algo=kind.algo), learning_rate=rate)
    assert "\n" not in str(caught.value)


def test_bad_learning_rates_of_functions_stop_training() -> None:
    with (
        ACKTR("CartPole-v1", tiny(), learning_rate=lambda x: float("nan")) as agent,
        pytest.raises(ConfigError, match=r"learning_rate\(1\) must be a number >= 0, got nan"),
    ):
        agent.learn(16)
    adapted = merge(tiny(), {"acktr": {"target_kl": 0.01}})
    with pytest.raises(ConfigError, match="target_kl adapts the learning rate"):
        ACKTR("CartPole-v1", adapted, learning_rate=0.1)


def test_a_file_remembers_that_it_lacks_the_function(tmp_path: Path) -> None:
    with ACKTR("CartPole-v1", tiny(), learning_rate=lambda x: 0.1 * x) as agent:
        agent.save(tmp_path / "agent.zip")
    with ACKTR.load(tmp_path / "agent.zip") as loaded:
        loaded.predict(np.zeros(4, np.float32))
        with pytest.raises(ValueError, match=r"load\(path, learning_rate=...\)"):
            loaded.learn(16)
    with ACKTR.load(tmp_path / "agent.zip", learning_rate=lambda x: 0.1 * x) as loaded:
        loaded.learn(16)


def test_one_file_and_a_folder_hold_the_same(tmp_path: Path) -> None:
    agent = ACKTR("Pendulum-v1", tiny("Pendulum-v1"), seed=3).learn(64)
    agent.save(tmp_path / "agent.zip")
    agent.save(str(tmp_path / "agent"))
    first = (tmp_path / "agent.zip").read_bytes()
    agent.save(tmp_path / "agent.zip")
    assert (tmp_path / "agent.zip").read_bytes() == first
    rows = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    trained = []
    for name in ("agent.zip", "agent"):
        loaded = ACKTR.load(tmp_path / name)
        assert loaded.config == agent.config
        np.testing.assert_array_equal(
            loaded.predict(rows, deterministic=True)[0], agent.predict(rows, deterministic=True)[0]
        )
        trained.append(loaded.learn(32).get_parameters())
        loaded.close()
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_the_end_of_a_name_may_be_left_out(tmp_path: Path) -> None:
    with ACKTR("CartPole-v1", tiny()) as agent:
        agent.save(tmp_path / "v1.5.zip")
    ACKTR.load(tmp_path / "v1.5").close()
    with pytest.raises(CheckpointError, match="nothing: no checkpoint"):
        ACKTR.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"use ACKTR\.load"):
        A2C.load(tmp_path / "v1.5.zip")


def test_what_is_no_path_is_told_what_to_write() -> None:
    with ACKTR("CartPole-v1", tiny()) as agent, pytest.raises(TypeError, match="write 'agent"):
        agent.save(io.BytesIO())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loaded from one, got BytesIO"):
        ACKTR.load(io.BytesIO())  # type: ignore[arg-type]


def test_names_of_other_libraries_are_told() -> None:
    with ACKTR("CartPole-v1", tiny()) as agent:
        with pytest.raises(AttributeError, match="ACKTR has no attribute get_env; here it is envs"):
            agent.get_env()  # type: ignore[attr-defined]
        with pytest.raises(AttributeError, match="no attribute gamma; its settings are in config"):
            _ = agent.gamma  # type: ignore[attr-defined]
        for name, here in {"gamma": r"ACKTR\(env, gamma=", "n_steps": "before: num_steps"}.items():
            with pytest.raises(AttributeError, match=here):
                setattr(agent, name, 0.5)
        assert not hasattr(agent, "nothing")
        agent.note = "mine"  # type: ignore[attr-defined]


@pytest.mark.parametrize("steps", [0, 0.5, "1000", math.nan, math.inf, None, True])
def test_steps_that_are_no_number(steps: Any) -> None:
    why = "total_timesteps must be at least 1 and a number"
    with ACKTR("CartPole-v1", tiny()) as agent, pytest.raises(ValueError, match=why):
        agent.learn(steps)


def test_an_observation_that_is_no_number() -> None:
    with ACKTR("CartPole-v1", tiny()) as agent:
        for ask in (agent.predict, agent.value, agent.action_probability):
            with pytest.raises(ValueError, match="the observation has NaN or Inf"):
                ask(np.array([0, 0, np.nan, 0], np.float32))
            with pytest.raises(ValueError, match=r"a tuple: of reset's \(observation, info\)"):
                ask((np.zeros(4, np.float32), {}))


def test_with_closes_what_it_made(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    def fail(stats: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), ACKTR("CartPole-v1", tiny()) as agent:
        monkeypatch.setattr(agent.envs, "close", lambda: closed.append("own"))
        agent.learn(16, fail)
    assert closed == ["own"]
    envs = make_vec("CartPole-v1", 2, 0)
    with monkeypatch.context() as patch, ACKTR(envs, tiny()) as agent:
        patch.setattr(envs, "close", lambda: closed.append("the user's"))
        agent.learn(16)
    assert closed == ["own"]
    envs.close()


@pytest.fixture(scope="module")
def untrained() -> Iterator[ACKTR]:
    with ACKTR("CartPole-v1", tiny(), env_workers=1) as agent:
        yield agent


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("log_interval", "write nothing: a callback is told of every update"),
        ("tb_log_name", "write label=, with run_dir="),
        ("reset_num_timesteps", "learn() goes on counting"),
        ("purple", "there are run_dir, label, eval_freq, eval_env, tensorboard"),
    ],
)
def test_arguments_of_learn_elsewhere_are_told(name: str, hint: str, untrained: ACKTR) -> None:
    others: dict[str, Any] = {name: 1}
    with pytest.raises(ConfigError, match=re.escape(f"learn() has no argument {name}; ")) as raised:
        untrained.learn(16, **others)
    assert hint in str(raised.value) and untrained.num_timesteps == 0


def test_agents_are_not_copied_but_their_policies_are(untrained: ACKTR) -> None:
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"save\(\) and load\(\) it, or copy agent.policy"):
            copied(untrained)
    theirs = copy.deepcopy(untrained.policy).network.state_dict()
    ours = untrained.policy.network.state_dict()
    assert ours and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_network_put_in_place_is_told(untrained: ACKTR) -> None:
    """It would act and not learn, or learn and not act."""
    trainer: Any = untrained.trainer
    network = trainer.network
    trainer.network = copy.deepcopy(network)
    with pytest.raises(ValueError, match=r"trainer.network was replaced"):
        untrained.learn(16)
    trainer.network = network
    untrained.learn(16)
