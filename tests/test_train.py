"""Whole training runs: determinism, exact resume, learning, and faults."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from acktr.config import ALGOS, Config, preset
from acktr.rollout.collector import NonFiniteError
from acktr.train import Trainer
from tests.tools.toys import IdentityEnv


class SavableIdentity(VectorEnv[Any, Any, Any]):
    """Identity task whose whole state can be saved: the random generator and step counts."""

    def __init__(self, num_envs: int, autoreset_mode: AutoresetMode) -> None:
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": autoreset_mode}
        self.single_observation_space = spaces.Box(0, 1, (3,), np.float32)
        self.single_action_space = spaces.Discrete(3)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._mode = autoreset_mode
        self._rng = np.random.default_rng(0)
        self._targets = np.zeros(num_envs, np.int64)
        self._counts = np.zeros(num_envs, np.int64)
        self._ended = np.zeros(num_envs, np.bool_)

    def _observe(self) -> Any:
        return np.eye(3, dtype=np.float32)[self._targets]

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        self._rng = np.random.default_rng(seed)
        self._targets = self._rng.integers(3, size=self.num_envs)
        self._counts[:] = 0
        self._ended[:] = False
        return self._observe(), {}

    def step(self, actions: Any) -> Any:
        dead = self._ended if self._mode == AutoresetMode.NEXT_STEP else np.zeros_like(self._ended)
        rewards = np.where(dead, 0.0, actions == self._targets)
        self._counts = np.where(dead, 0, self._counts + 1)
        self._targets = self._rng.integers(3, size=self.num_envs)
        ended = self._counts >= 5
        infos: dict[str, Any] = {}
        if self._mode == AutoresetMode.SAME_STEP and ended.any():
            infos = {"final_obs": self._observe(), "_final_obs": ended}
            self._targets = self._rng.integers(3, size=self.num_envs)
            self._counts[ended] = 0
        self._ended = ended
        return self._observe(), rewards, np.zeros_like(ended), ended, infos

    def state_dict(self) -> dict[str, Any]:
        words = self._rng.bit_generator.state
        return {
            "rng": words,
            "targets": self._targets.copy(),
            "counts": self._counts.copy(),
            "ended": self._ended.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state["rng"]
        self._targets = state["targets"].copy()
        self._counts = state["counts"].copy()
        self._ended = state["ended"].copy()


def small(algo: str = "acktr", **changes: Any) -> Config:
    config, _ = preset("Toy-v0", algo)
    network = dataclasses.replace(config.network, hidden=(8,), critic_hidden=(8,))
    changes = {"num_envs": 4, "num_steps": 8, "network": network, **changes}
    return dataclasses.replace(config, **changes)


def fingerprint(trainer: Trainer) -> list[Any]:
    return [p.detach().clone() for p in trainer.network.parameters()]


def curve(trainer: Trainer, total: int) -> list[dict[str, float]]:
    rows = []
    for stats in trainer.run(total):
        numbers = {k: v for k, v in stats.metrics.items() if not k.startswith("time/")}
        rows.append({**numbers, "timesteps": stats.timesteps})
    return rows


def same(first: list[Any], second: list[Any]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


MODES = [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP]


@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("mode", MODES)
def test_same_seed_same_curve_bit_for_bit(mode: AutoresetMode, algo: str) -> None:
    runs = []
    for seed in (3, 3, 4):
        trainer = Trainer(small(algo, seed=seed), SavableIdentity(4, mode))
        runs.append((curve(trainer, 640), fingerprint(trainer)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    assert not same(runs[0][1], runs[2][1])


@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("mode", MODES)
def test_resumed_run_equals_the_uninterrupted_one(
    mode: AutoresetMode, algo: str, tmp_path: Any
) -> None:
    """2N steps equal N steps, a checkpoint on disk, and N steps in a new trainer."""
    from acktr.runs.checkpoint import load_checkpoint, save_checkpoint

    config = small(algo, seed=1)
    straight = Trainer(config, SavableIdentity(4, mode))
    whole = curve(straight, 640)
    first = Trainer(config, SavableIdentity(4, mode))
    rows: list[dict[str, float]] = []
    for stats in first.run(640):
        numbers = {k: v for k, v in stats.metrics.items() if not k.startswith("time/")}
        rows.append({**numbers, "timesteps": stats.timesteps})
        if stats.timesteps >= 320:
            break
    save_checkpoint(tmp_path / "half", first.state_dict(), {})
    second = Trainer(config, SavableIdentity(4, mode))
    second.load_state_dict(load_checkpoint(tmp_path / "half")[0])
    rows += curve(second, 640)
    assert rows == whole
    assert same(fingerprint(second), fingerprint(straight))


def test_environments_without_state_start_anew_on_resume() -> None:
    def make() -> Any:
        maker = [lambda: IdentityEnv(spaces.Discrete(3))] * 4
        return RecordEpisodeStatistics(SyncVectorEnv(maker, autoreset_mode=AutoresetMode.SAME_STEP))

    first = Trainer(small(), make())
    curve(first, 320)
    second = Trainer(small(), make())
    second.load_state_dict(first.state_dict())
    assert second.timesteps == first.timesteps
    rows = curve(second, 640)
    assert [row["timesteps"] for row in rows] == list(range(first.timesteps + 32, 641, 32))


def test_a_restart_is_told_once_and_counted() -> None:
    def make() -> Any:
        return SyncVectorEnv(
            [lambda: IdentityEnv(spaces.Discrete(3))] * 4, autoreset_mode=AutoresetMode.SAME_STEP
        )

    trainer, told = Trainer(small(), make()), []
    assert all("rollout/restarts" not in row for row in curve(trainer, 64))
    for count in (1, 2):
        state = trainer.state_dict()
        trainer = Trainer(small(), make())
        trainer.load_state_dict(state)
        assert trainer.restarted is None
        trainer.begin()
        told.append(trainer.restarted)
        rows = curve(trainer, trainer.timesteps + 64)
        assert [row["rollout/restarts"] for row in rows] == [count] * 2
    assert told == ["environments start new episodes: SyncVectorEnv has no state_dict"] * 2


def test_a_wrapper_with_variables_must_save_itself() -> None:
    class Counted(gymnasium.vector.VectorWrapper):
        def __init__(self, envs: Any) -> None:
            super().__init__(envs)
            self.count = 0

    inner = SavableIdentity(4, AutoresetMode.SAME_STEP)
    for envs, saved in ((gymnasium.vector.VectorWrapper(inner), True), (Counted(inner), False)):
        trainer = Trainer(small(), envs)
        trainer.begin()
        state = trainer.state_dict()["collector"]
        assert (state["envs"] is not None) == saved == (state["unsaved"] is None)


def test_state_of_another_network_is_refused_untouched() -> None:
    first = Trainer(small(), SavableIdentity(4, AutoresetMode.SAME_STEP))
    curve(first, 64)
    wide = dataclasses.replace(small().network, hidden=(9,))
    second = Trainer(small(network=wide), SavableIdentity(4, AutoresetMode.SAME_STEP))
    before = fingerprint(second)
    with pytest.raises(ValueError, match="checkpoint does not fit the network: actor"):
        second.load_state_dict(first.state_dict())
    assert same(before, fingerprint(second))
    assert second.timesteps == 0


@pytest.mark.parametrize(
    ("space", "random", "good"),
    [
        (spaces.Discrete(4), 0.25, 0.9),
        pytest.param(spaces.MultiDiscrete([3, 2]), 0.42, 0.9, marks=pytest.mark.slow),
        pytest.param(spaces.MultiBinary(3), 0.5, 0.9, marks=pytest.mark.slow),
        (spaces.Box(-1, 1, (2,), np.float32), -1.0, -0.08),
    ],
    ids=["discrete", "multi-discrete", "multi-binary", "box"],
)
def test_identity_environments_are_solved(space: Any, random: float, good: float) -> None:
    """Mean reward per step from that of a random policy to nearly the best, in seconds."""
    maker = [lambda: IdentityEnv(space, horizon=10)] * 8
    envs = RecordEpisodeStatistics(SyncVectorEnv(maker, autoreset_mode=AutoresetMode.SAME_STEP))
    config = small(num_envs=8, num_steps=16, gamma=0.5)
    rewards = []
    for stats in Trainer(config, envs).run(25_000):
        rewards += [episode.reward / episode.length for episode in stats.episodes]
    assert np.mean(rewards[:16]) < (random + good) / 2
    assert np.mean(rewards[-100:]) > good


def test_linear_schedule_follows_the_total() -> None:
    trainer = Trainer(small(), SavableIdentity(4, AutoresetMode.SAME_STEP))
    rates = [row["train/learning_rate"] for row in curve(trainer, 320)]
    assert rates[0] == pytest.approx(0.25)
    assert rates[-1] == pytest.approx(0.25 * (1 - 0.9 / 1.1))


def test_diverged_network_stops_with_one_line() -> None:
    trainer = Trainer(small(), SavableIdentity(4, AutoresetMode.SAME_STEP))
    with torch.no_grad():
        for parameter in trainer.network.critic.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="NaN or Inf at step 0: lower lr"):
        next(trainer.run(320))


def test_diverged_policy_is_a_divergence_and_no_fault_of_the_environment() -> None:
    trainer = Trainer(small(), SavableIdentity(4, AutoresetMode.SAME_STEP))
    with torch.no_grad():
        for parameter in trainer.network.actor.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="policy's output is NaN or Inf"):
        next(trainer.run(320))


def test_every_documented_scalar_is_reported() -> None:
    trainer = Trainer(small(), SavableIdentity(4, AutoresetMode.SAME_STEP))
    stats = list(trainer.run(320))[-1]
    wanted = {
        "train/approx_kl",
        "train/kl_quadratic",
        "train/trust_scale_actor",
        "train/trust_scale_critic",
        "train/quadratic_actor",
        "train/explained_variance",
        "train/policy_loss",
        "train/value_loss",
        "train/entropy_loss",
        "train/learning_rate",
        "kfac/min_eig",
        "kfac/max_eig",
        "time/env",
        "time/forward",
        "time/update",
        "time/refresh",
        "time/fps",
    }
    assert wanted <= set(stats.metrics)
    assert all(np.isfinite(stats.metrics[name]) for name in wanted)
    assert stats.metrics["kfac/max_eig"] > stats.metrics["kfac/min_eig"] >= 0


@pytest.mark.parametrize("algo", ALGOS)
def test_parts_of_the_update_take_no_longer_than_it(algo: str) -> None:
    trainer = Trainer(small(algo), SavableIdentity(4, AutoresetMode.SAME_STEP))
    stats = next(iter(trainer.run(320)))
    seconds = trainer.learner.seconds
    outer = [v for k, v in seconds.items() if k not in ("refresh", "apply")]
    never = {"exact"}  # the Kronecker form of the trust region measures nothing
    assert all(value > 0 for name, value in seconds.items() if name not in never)
    assert sum(outer) <= stats.metrics["time/update"]


def test_vector_environment_must_be_supported() -> None:
    envs = SavableIdentity(4, AutoresetMode.SAME_STEP)
    envs.single_observation_space = gymnasium.spaces.Text(4)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="unsupported observation space"):
        Trainer(small(), envs)


class Resetting(gymnasium.Env[Any, Any]):
    """Episodes of one step, so that every second step of next-step autoreset only resets."""

    observation_space, action_space = spaces.Box(0, 1, (1,), np.float32), spaces.Discrete(2)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.ones(1, np.float32), 1.0, True, False, {}


def test_updates_without_samples_are_told_once() -> None:
    envs = SyncVectorEnv([Resetting], autoreset_mode=AutoresetMode.NEXT_STEP)
    config = dataclasses.replace(preset("CartPole-v1", "a2c")[0], num_envs=1, num_steps=2)
    with pytest.warns(UserWarning, match="1 of its 1 steps .* 2 are needed .* num_steps") as told:
        stats = list(Trainer(config, envs).run(4))
    assert len(stats) == 4 and len(told) == 1
