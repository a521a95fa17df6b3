"""Agents on observations with parts: what they learn, in both autoreset modes, saved and loaded."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import FlattenObservation

from acktr import A2C, ACKTR, TRPO
from acktr.config import Config, NetworkConfig, from_dict, preset, to_dict
from acktr.evaluate import evaluate
from acktr.policies import build_network
from acktr.policies.distributions import action_head
from acktr.rollout import Acting, Collector, make_batch
from acktr.runs.start import difference
from tests.tools.toys import Forced

MODES = [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP]
CPU = torch.device("cpu")
ALGOS = {"acktr": ACKTR, "a2c": A2C, "trpo": TRPO}


class Walk(gymnasium.Env[Any, Any]):
    """Noise that actions push, in two vectors; episodes end or are cut."""

    action_space = spaces.Discrete(2)

    def __init__(self, kind: str = "dict") -> None:
        inside = {"a": spaces.Box(-9, 9, (3,), np.float32), "b": spaces.Box(-9, 9, (2,))}
        tuples = spaces.Tuple(tuple(inside.values()))
        self._kind = kind
        self.observation_space = {
            "dict": spaces.Dict(inside),
            "tuple": tuples,
            "deep": spaces.Dict({"in": tuples}),
        }[kind]

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._steps, self._x = 0, 0.1 * self.np_random.normal(size=5)
        return self._show(), {}

    def _show(self) -> Any:
        first, second = np.split(self._x.astype(np.float32), [3])
        pair = (first, second)
        return {"dict": {"a": first, "b": second}, "tuple": pair, "deep": {"in": pair}}[self._kind]

    def step(self, action: Any) -> Any:
        self._steps += 1
        self._x = 0.9 * self._x + 0.1 * self.np_random.normal(size=5) + 0.1 * (action - 0.5)
        ended = bool(abs(self._x[0]) > 0.4)
        return self._show(), -float(self._x[4]), ended, self._steps >= 7, {}


def vector(make: Any, mode: AutoresetMode, num: int = 4) -> Any:
    return SyncVectorEnv([make] * num, autoreset_mode=mode)


def small(algo: str, **settings: Any) -> Config:
    config = preset("none", algo)[0]
    network = NetworkConfig(shared=False, hidden=(16,), critic_hidden=(16,))
    return dataclasses.replace(config, num_steps=10, network=network, **settings)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["dict", "tuple", "deep"])
@pytest.mark.parametrize("algo", ALGOS)
def test_parts_are_learned_from_as_one_vector(algo: str, kind: str, mode: AutoresetMode) -> None:
    """Bit for bit: collection, normalisation, final observations, updates, and micro-batches."""
    limits = {} if algo == "trpo" else {"micro_batch": 13}
    found = []
    for make in (lambda: Walk(kind), lambda: FlattenObservation(Walk(kind))):
        agent = ALGOS[algo](vector(make, mode), small(algo, **limits), seed=1)
        begun = agent.trainer.network.state_dict()["actor.head.linear.weight"].clone()
        agent.learn(120)
        found.append(agent.trainer.network.state_dict())
    parted, whole = found
    assert parted.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(parted[name], value), name
    assert not torch.equal(whole["actor.head.linear.weight"], begun)


class Screen(gymnasium.Env[Any, Any]):
    """A picture and numbers; the reward is what was seen: mean brightness and a number."""

    action_space = spaces.Discrete(3)
    observation_space = spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (12, 10, 3), np.uint8),
            "level": spaces.Discrete(4, start=1),
            "number": spaces.Box(-1, 1, (1,), np.float32),
        }
    )

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._steps = 0
        return self._draw(), {}

    def _draw(self) -> Any:
        draw = self.np_random
        self.seen = {
            "camera": draw.integers(0, 256, (12, 10, 3), np.uint8),
            "level": draw.integers(1, 5),
            "number": draw.random(1, np.float32),
        }
        return self.seen

    def step(self, action: Any) -> Any:
        self._steps += 1
        reward = float(self.seen["camera"].mean()) / 255 + float(self.seen["number"][0])
        reward += float(self.seen["level"])
        return self._draw(), reward, False, self._steps == 5, {}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_all_parts_of_a_row_are_of_the_same_step(shared: bool, mode: AutoresetMode) -> None:
    """Pictures are packed in place, numbers are copied: the reward tells that both fit."""
    envs: Any = Forced(vector(Screen, mode, 2))
    head = action_head(Screen.action_space)
    torch.manual_seed(0)
    network = build_network(Screen.observation_space, head, NetworkConfig(shared=shared))
    generator = torch.Generator().manual_seed(0)
    runner = Collector(envs, Acting(network, head, generator, nullcontext))
    runner.reset(0)
    for _ in range(2):
        found = runner.collect(7)
        assert found.valid.sum() < found.valid.size
        batch = make_batch(found, 0.0, 1.0, CPU)
        seen = batch.observations
        assert isinstance(seen, dict) and len(batch) == found.valid.sum()
        assert seen["camera"].shape[1:] == (3, 12, 10)
        rewards = seen["camera"].mean((1, 2, 3)) + seen["number"][:, 0] + seen["level"]
        torch.testing.assert_close(batch.returns, rewards, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            values = network(seen)[1]
        torch.testing.assert_close(batch.values, values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("algo", ALGOS)
def test_agents_act_evaluate_save_and_load(algo: str, mode: AutoresetMode, tmp_path: Path) -> None:
    agent = ALGOS[algo](vector(Screen, mode, 3), small(algo), seed=0)
    before = {n: p.clone() for n, p in agent.trainer.network.state_dict().items()}
    agent.learn(60)
    after = agent.trainer.network.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("layers" in name for name in changed)  # those of the picture alone
    agent.save(tmp_path / "agent")
    again = ALGOS[algo].load(tmp_path / "agent", vector(Screen, mode, 3))
    env = Screen()
    one, _ = env.reset(seed=3)
    batch = {name: np.stack([value, value]) for name, value in one.items()}
    for each in (agent, again):
        action, _ = each.predict(one, deterministic=True)
        actions, _ = each.predict(batch, deterministic=True)
        assert action.shape == () and (actions == action).all()
    assert agent.predict(one, deterministic=True)[0] == again.predict(one, deterministic=True)[0]
    with pytest.raises(ValueError, match="part 'camera' has shape"):
        agent.predict({**one, "camera": np.zeros(3)})
    if mode is AutoresetMode.SAME_STEP:
        played = evaluate(again.policy, again.envs, 4, seed=0)
        assert played.lengths == (5,) * 4
    again.learn(30)


def test_files_of_before_have_the_defaults() -> None:
    now = preset("CartPole-v1")[0]
    values = to_dict(now)
    del values["network"]["channels"], values["normalize_parts"]
    assert from_dict(values) == now and difference(from_dict(values), now) is None
    last = dataclasses.replace(now, network=dataclasses.replace(now.network, channels="last"))
    assert difference(now, last) == ("network.channels", "auto", "last")
