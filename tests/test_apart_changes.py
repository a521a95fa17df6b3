"""What is done to a critic that learns in a process of its own, and to that process."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from acktr import ACKTR
from acktr.algorithms import ACKTRLearner
from acktr.apart import CriticApart, can_be_apart
from acktr.callbacks import StopAt
from acktr.config import Config
from acktr.envs import ForkedProcess
from acktr.kfac import FactorError
from acktr.runs.checkpoint import load_checkpoint
from acktr.train import Trainer, TrainStats
from tests.test_apart import (
    ENV,
    STEPS,
    assert_gone,
    assert_same,
    configuration,
    elsewhere,
    pid_of,
    trainer_of,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux forks processes")


def learner_of(trainer: Trainer) -> ACKTRLearner:
    assert isinstance(trainer.learner, ACKTRLearner)
    return trainer.learner


def fill(trainer: Trainer) -> None:
    for parameter in trainer.network.critic.parameters():
        parameter.data.fill_(0.01)


def from_vector(trainer: Trainer) -> None:
    vector = parameters_to_vector(trainer.network.critic.parameters())
    vector_to_parameters(torch.full_like(vector, 0.02), trainer.network.critic.parameters())


def slower(trainer: Trainer) -> None:
    critic = learner_of(trainer).critic
    assert critic is not None and not isinstance(critic, torch.nn.Module)
    critic.param_groups[0]["lr"] = 1e-3  # type: ignore[union-attr]


def frozen(trainer: Trainer) -> None:
    next(trainer.network.critic.parameters()).requires_grad_(False)


@pytest.mark.parametrize("change", [fill, from_vector, slower, frozen])
@pytest.mark.parametrize("settled", [False, True])
def test_changes_that_torch_does_not_count(change: Any, settled: bool) -> None:
    states = []
    for workers in (1, 2):
        with trainer_of(workers) as trainer:
            for stats in trainer.run(6 * STEPS):
                if stats.updates == 3:
                    if settled:
                        trainer.settle()
                    change(trainer)
            states.append(trainer.state_dict())
    assert_same(*states)


@pytest.mark.parametrize("structure", ["diagonal", "tridiagonal"])
def test_structures_without_eigenvalues_are_saved(structure: str, tmp_path: Path) -> None:
    """NaN stood for their eigenvalues, in metrics of which a checkpoint holds the last."""
    config = configuration(2)
    critic = dataclasses.replace(config.acktr.critic, structure=structure)
    config = dataclasses.replace(config, acktr=dataclasses.replace(config.acktr, critic=critic))
    rows: list[TrainStats] = []
    with ACKTR(ENV, config=config) as agent:
        agent.learn(3 * STEPS, callback=rows.append)
        agent.save(tmp_path / "agent")
    assert "kfac/critic_min_eig" not in rows[-1].metrics
    load_checkpoint(tmp_path / "agent")


def test_metrics_that_are_no_numbers_do_not_spoil_a_state() -> None:
    with trainer_of(1) as trainer:
        learner_of(trainer)._report = {"train/quadratic_critic": float("nan"), "a": 1.0}
        assert learner_of(trainer).state_dict()["critic_report"] == {"a": 1.0}


@pytest.mark.parametrize("where", ["settle", "fetch"])
def test_an_interrupt_while_the_critic_comes_home_waits(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for workers in (1, 2):
        with trainer_of(workers) as trainer:
            updates = trainer.run(9 * STEPS)
            next(updates)
            next(updates)
            if workers == 2:
                real, calls = getattr(CriticApart, where), []

                def interrupted(self: CriticApart, real: Any = real, calls: Any = calls) -> Any:
                    calls.append(1)
                    if len(calls) == 1:
                        raise KeyboardInterrupt
                    return real(self)

                pid = pid_of(trainer)
                with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                    patch.setattr(CriticApart, where, interrupted)
                    updates.close()
                assert elsewhere(trainer) is None
                assert_gone(pid)
            else:
                updates.close()
            for _ in trainer.run(5 * STEPS):
                pass
            states.append(trainer.state_dict())
    assert_same(*states)


def test_what_stops_kfac_in_the_last_steps_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with trainer_of(2) as trainer:
        learner = learner_of(trainer)

        def fails(**given: Any) -> None:
            raise FactorError("no decomposition of it")

        monkeypatch.setattr(learner._value_step.optimizer, "step", fails)
        updates = trainer.run(9 * STEPS)
        next(updates)
        pid = pid_of(trainer)
        with pytest.raises(FactorError, match=r"^no decomposition of it$"):
            updates.close()
        assert elsewhere(trainer) is None
        assert_gone(pid)


def test_training_within_training_loses_no_steps() -> None:
    counts = {}
    for workers in (1, 2):
        with trainer_of(workers) as trainer:
            outer = trainer.run(40 * STEPS)
            next(outer)
            next(outer)
            inner = trainer.run(40 * STEPS)
            next(inner)
            next(outer)
            inner.close()
            next(outer)
            outer.close()
            assert elsewhere(trainer) is None
            counts[workers] = trainer.state_dict()
    assert_same(counts[1], counts[2])


def test_a_forgotten_one_ends_its_process() -> None:
    with trainer_of(2) as trainer:
        updates = trainer.run(9 * STEPS)
        next(updates)
        learner = learner_of(trainer)
        other = CriticApart(learner, 10.0)
        other._fork()
        pid = other._process[0].pid
        updates.close()
    del other
    gc.collect()
    assert_gone(pid)


def test_copies_and_files_of_a_policy_have_the_values_of_this_update() -> None:
    seen, found = torch.ones(2, 4), {}
    for workers in (1, 2):
        with ACKTR(ENV, config=configuration(workers)) as agent:

            def look(stats: TrainStats, agent: ACKTR = agent, workers: int = workers) -> None:
                if stats.updates != 3:
                    return
                copied, file = copy.deepcopy(agent.policy), io.BytesIO()
                torch.save(agent.policy.network, file)
                file.seek(0)
                loaded = torch.load(file, weights_only=False)
                vector = parameters_to_vector(agent.policy.network.parameters())
                with torch.no_grad():
                    found[workers] = [copied.network(seen)[1], loaded(seen)[1], vector]

            agent.learn(4 * STEPS, callback=look)
    assert all(torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True))


def test_a_metric_that_is_told_later_may_stop_training() -> None:
    for workers in (1, 2):
        with ACKTR(ENV, config=configuration(workers)) as agent:
            agent.learn(6 * STEPS, callback=StopAt(0.0, "train/value_loss"))
            assert agent.num_timesteps == workers * STEPS
            with pytest.raises(ValueError, match="StopAt waits for the metric 'train/valu_loss'"):
                agent.learn(6 * STEPS, callback=StopAt(0.0, "train/valu_loss"))


def test_answers_that_nobody_waits_for_do_not_fill_the_pipe() -> None:
    """More than the 32,768 that fit in."""
    counts = []
    process = ForkedProcess(
        "a test",
        {b"x": lambda: counts.append(1), b"c": lambda: None},
        lambda: None,
        lambda doing: "nothing",
    )
    for _ in range(400):
        for _ in range(100):
            process.send(b"x")
        process.receive(5.0)
    process.send(b"x")
    process.receive(5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        process.send(b"c")
        process.end()


class _Pair:
    size, helped = 2, False


@pytest.mark.parametrize("obstacle", ["ranks", "helper", "devices"])
def test_others_than_one_process_on_the_cpu_learn_here(
    obstacle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks' messages and, where torch sees a device, its autograd do not go on in a fork."""
    with trainer_of(2) as trainer:
        learner = learner_of(trainer)
        assert can_be_apart(learner, trainer.config, trainer.envs)
        if obstacle == "devices":
            monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        else:
            pair: Any = _Pair()
            pair.size, pair.helped = (1, True) if obstacle == "helper" else (2, False)
            learner.ranks = pair
        assert not can_be_apart(learner, trainer.config, trainer.envs)


def test_ctrl_c_reaches_the_program_alone() -> None:
    """The critic's process goes on when the terminal sends SIGINT to all."""
    with trainer_of(2) as trainer:
        for stats in trainer.run(4 * STEPS):
            if stats.updates == 2:
                os.kill(pid_of(trainer), signal.SIGINT)
        assert trainer.updates == 4


def test_configurations_are_not_exchanged() -> None:
    with ACKTR(ENV, config=configuration(1)) as agent:
        other: Config = dataclasses.replace(agent.config, gamma=0.5)
        with pytest.raises(AttributeError, match=r"config cannot be set .* ACKTR\(env, config="):
            agent.config = other  # type: ignore[misc]
        assert agent.config is agent.trainer.config
