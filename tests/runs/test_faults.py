"""What is left of a run that an environment, a signal or an error ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acktr import interrupts as interrupts_module
from acktr.config import Config, merge, preset
from acktr.envs.vector import env_seeds
from acktr.interrupts import Interrupts, Stopped
from acktr.rollout import Collector
from acktr.runs import session
from acktr.runs.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from acktr.runs.folder import run_path
from acktr.runs.session import TrainingFault
from acktr.runs.start import resume, start
from acktr.runs.tables import read_table
from acktr.train import Trainer
from tests.tools.toys import CountingEnv, variant

UPDATE = 2 * 32
"""Steps of an update."""


class Brittle(CountingEnv):
    """Does what it is told to in the middle of the second update."""

    act: Any = staticmethod(lambda: None)

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(truncate_at=10)
        self.total = 0

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.total += 1
        if self.total == 32 + 15:
            self.act()
        return super().step(action)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def config() -> Config:
    env = variant(Brittle, {})
    small = {"num_envs": 2, "num_steps": 32, "total_timesteps": 4 * UPDATE, "device": "cpu"}
    start = merge(preset("CartPole-v1")[0], {**small, "eval_episodes": 1})
    settings = {"checkpoint_freq": 1_000_000, "normalize_observation": True, "env_workers": 1}
    return merge(start, {"env": env, **settings})


def train(tmp_path: Path, chosen: Config, interrupts: Interrupts | None = None) -> Path:
    start(chosen, tmp_path, "test", interrupts or Interrupts(), ["acktr"], lambda *_: None)
    return run_path(tmp_path, chosen)


def raises(error: BaseException) -> Any:
    def act(self: Brittle) -> None:
        raise error

    return act


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool(np.array_equal(one, other))


@pytest.mark.parametrize("workers", [1, "auto"])
def test_fault_of_an_environment_keeps_the_state_after_the_last_update(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, workers: int | str
) -> None:
    """Its weights, curvature, statistics and generators, from before the rollout that failed."""
    path = run_path(tmp_path / "whole", config)
    with monkeypatch.context() as patched:
        original = Trainer.run

        def stopped(self: Trainer, total: int, start: int = 0) -> Iterator[Any]:
            yield from original(self, UPDATE)

        patched.setattr(Trainer, "run", stopped)
        train(tmp_path / "whole", config)
    wanted, _ = load_checkpoint(path / "checkpoints/last")
    assert wanted["collector"]["observation_normalizer"]["count"] == UPDATE

    monkeypatch.setattr(Brittle, "act", raises(ZeroDivisionError("the toy broke")))
    path = run_path(tmp_path, config)
    with pytest.raises(TrainingFault) as fault:
        train(tmp_path, merge(config, {"env_workers": workers}))
    assert fault.value.environment
    assert str(fault.value) == (
        f"environment 0 of {config.env} raised ZeroDivisionError at step 47: the toy broke"
        f" (episode 5, seed {env_seeds(0, 2)[0]}); last good checkpoint: {path}/checkpoints/last,"
        f" step 64; traceback in {path}/fault.log"
    )
    kept, meta = load_checkpoint(path / "checkpoints/last")
    assert meta["timesteps"] == kept["timesteps"] == UPDATE
    for name in ("network", "learner"):
        assert same(kept[name], wanted[name])
    for name in ("observation_normalizer", "reward_scaler", "generator"):
        assert same(kept["collector"][name], wanted["collector"][name])
    log = (path / "fault.log").read_text()
    assert "after step 64: environment 0 of" in log and "in act\n    raise error" in log

    monkeypatch.setattr(Brittle, "act", lambda self: None)
    resume(path, None, Interrupts(), ["acktr"], lambda *_: None)
    steps = [int(row["timesteps"]) for row in read_table(path / "progress.csv").rows]
    assert steps == [64, 128, 192, 256]


def test_log_of_faults_is_bounded(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Brittle, "act", raises(ValueError("x" * 1_000_000)))
    for number in (1, 2):
        with pytest.raises(TrainingFault):
            train(tmp_path / str(number), config)
    path = run_path(tmp_path / "1", config)
    assert 1000 < (path / "fault.log").stat().st_size <= 1 << 16


def test_unexpected_error_keeps_it_too(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Collector.collect

    def broken(self: Collector, steps: int) -> Any:
        rollout = original(self, steps)
        if self.envs.unwrapped.envs[0].unwrapped.total > 32:
            raise MemoryError
        return rollout

    monkeypatch.setattr(Collector, "collect", broken)
    with pytest.raises(MemoryError):
        train(tmp_path, config)
    last = run_path(tmp_path, config) / "checkpoints/last"
    assert load_checkpoint(last)[0]["timesteps"] == UPDATE


def test_error_in_the_middle_of_an_update_keeps_the_last_checkpoint(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are neither the old nor the new ones then."""
    calls = []

    def broken(self: Trainer, batch: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError

    monkeypatch.setattr(Trainer, "_require_finite", broken)
    with pytest.raises(MemoryError):
        train(tmp_path, config)
    last = run_path(tmp_path, config) / "checkpoints/last"
    assert load_checkpoint(last)[0]["timesteps"] == 0


class TestSignals:
    @staticmethod
    def hang(self: Brittle) -> None:
        """A simulator that never answers, and a user who wants to stop it."""
        signal.raise_signal(signal.SIGTERM)
        signal.sigtimedwait([signal.SIGUSR2], 60)

    def test_environment_that_hangs_is_broken_off(
        self, tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(interrupts_module, "PATIENCE", 0.2)
        monkeypatch.setattr(Brittle, "act", self.hang)
        with Interrupts() as interrupts, pytest.raises(Stopped) as stop:
            train(tmp_path, config, interrupts)
        path = run_path(tmp_path, config)
        assert stop.value.note == (
            f"stopped by SIGTERM, checkpoint at step 64; continue with: acktr train --resume {path}"
        )
        assert load_checkpoint(path / "checkpoints/last")[0]["timesteps"] == UPDATE

    @pytest.mark.parametrize("fails", [False, True])
    def test_disk_that_is_full_does_not_change_the_exit_code(
        self, fails: bool, tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(folder: Path, state: dict[str, Any], meta: dict[str, Any], *rest: Any) -> None:
            if fails and state["timesteps"] > 0:
                raise CheckpointError("no space left")
            save_checkpoint(folder, state, meta, *rest)

        monkeypatch.setattr(session, "save_checkpoint", full)
        monkeypatch.setattr(Brittle, "act", lambda self: signal.raise_signal(signal.SIGTERM))
        with Interrupts() as interrupts, pytest.raises(Stopped) as stop:
            train(tmp_path, config, interrupts)
        assert f"checkpoint at step {0 if fails else 128}" in stop.value.note

    def test_save_that_hangs_is_not_tried_again(
        self, tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        saved = []

        def hanging(folder: Path, state: dict[str, Any], *rest: Any) -> None:
            saved.append(state["timesteps"])
            if state["timesteps"] > 0:
                raise Stopped(signal.SIGINT)  # as the second signal does

        monkeypatch.setattr(session, "save_checkpoint", hanging)
        monkeypatch.setattr(Brittle, "act", lambda self: signal.raise_signal(signal.SIGINT))
        with Interrupts() as interrupts, pytest.raises(Stopped) as stop:
            train(tmp_path, config, interrupts)
        assert "checkpoint at step 0" in stop.value.note
        assert saved == [0, 128]
