"""A critic that learns in a process of its own is one that learns here, bit for bit."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acktr import ACKTR
from acktr.algorithms import ACKTRLearner, CriticError
from acktr.apart import TOLD_LATER, CriticApart, can_be_apart
from acktr.config import Config
from acktr.environments import training_envs
from acktr.kfac import FactorError
from acktr.runs.checkpoint import load_checkpoint, save_checkpoint
from acktr.train import Trainer, TrainStats

ENV = "InvertedPendulum-v5"
STEPS = 8 * 16

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux forks processes")


def configuration(workers: int, **changes: Any) -> Config:
    config = Config.for_env(ENV)
    network = dataclasses.replace(config.network, hidden=(8,), critic_hidden=(8, 8))
    acktr = dataclasses.replace(config.acktr, critic_steps=4, **changes.pop("acktr", {}))
    given = {"num_steps": 16, "network": network, "acktr": acktr, "seed": 3, **changes}
    return dataclasses.replace(config, env_workers=workers, **given)


@contextmanager
def trainer_of(workers: int, **changes: Any) -> Iterator[Trainer]:
    config = configuration(workers, **changes)
    envs = training_envs(config)
    try:
        yield Trainer(config, envs)
    finally:
        envs.close()


def elsewhere(trainer: Trainer) -> CriticApart | None:
    assert isinstance(trainer.learner, ACKTRLearner)
    found = trainer.learner.elsewhere
    assert found is None or isinstance(found, CriticApart)
    return found


def pid_of(trainer: Trainer) -> int:
    apart = elsewhere(trainer)
    assert apart is not None
    (process,) = apart._process
    return process.pid


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a state by their paths, but for what is told later and for seconds."""
    if isinstance(node, dict):
        inner = [flat(each, f"{path}/{key}") for key, each in node.items()]
        return {name: leaf for part in inner for name, leaf in part.items()}
    if isinstance(node, list | tuple):
        inner = [flat(each, f"{path}/{place}") for place, each in enumerate(node)]
        return {name: leaf for part in inner for name, leaf in part.items()}
    skipped = "critic_report" in path or path == "/seconds" or path.startswith("/collector/envs")
    return {} if skipped else {path: node}


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    one, two = flat(first), flat(second)
    assert one.keys() == two.keys()
    for path, leaf in one.items():
        other = two[path]
        if isinstance(leaf, torch.Tensor | np.ndarray):
            assert np.array_equal(np.asarray(leaf), np.asarray(other)), path
        else:
            assert leaf == other, path


def untimed(stats: TrainStats) -> dict[str, float]:
    return {tag: value for tag, value in stats.metrics.items() if not tag.startswith("time/")}


@pytest.mark.parametrize("acktr", [{}, {"value_sigma": "adaptive"}])
def test_everything_is_what_it_is_in_one_process(acktr: dict[str, Any]) -> None:
    """Parameters, both optimizers, statistics and generators; metrics, of which some come later."""
    states, rows = [], []
    for workers in (1, 2):
        with trainer_of(workers, acktr=acktr) as trainer:
            rows.append([untimed(stats) for stats in trainer.run(6 * STEPS)])
            states.append(trainer.state_dict())
            assert elsewhere(trainer) is None
    assert_same(*states)
    here, apart = rows
    assert len(here) == len(apart) == 6
    assert {*TOLD_LATER} & {*apart[0]} == {"kfac/failures"}
    for number, (row, other) in enumerate(zip(here, apart, strict=True)):
        before = {tag: here[number - 1][tag] for tag in TOLD_LATER} if number else {}
        before.setdefault("kfac/failures", 0.0)
        now = {tag: value for tag, value in row.items() if tag not in TOLD_LATER}
        assert other == now | before
    report = states[1]["learner"]["critic_report"]
    assert report["train/value_loss"] == here[-1]["train/value_loss"]


def test_a_state_in_the_middle_goes_on_as_it_would_have(tmp_path: Path) -> None:
    """With a checkpoint on the disk while the critic learns, and without influence on this run."""
    rows: list[dict[str, float]] = []
    with trainer_of(2) as trainer:
        for stats in trainer.run(6 * STEPS):
            rows.append(untimed(stats))
            if stats.updates == 3:
                assert pid_of(trainer)
                save_checkpoint(tmp_path / "last", trainer.state_dict(), {})
        whole = trainer.state_dict()
    saved, _ = load_checkpoint(tmp_path / "last")
    again: list[dict[str, float]] = []
    with trainer_of(2) as trainer:
        trainer.load_state_dict(saved)
        again = [untimed(stats) for stats in trainer.run(6 * STEPS)]
        assert_same(whole, trainer.state_dict())
    assert again == rows[3:]


def test_a_state_loaded_while_the_critic_learns_replaces_it() -> None:
    states = []
    for workers in (1, 2):
        with trainer_of(workers) as trainer:
            updates = trainer.run(9 * STEPS)
            next(updates)
            state = trainer.state_dict()
            next(updates)
            pid = pid_of(trainer) if workers > 1 else 0
            trainer.load_state_dict(state)
            assert_same(state, trainer.state_dict())
            next(updates)
            next(updates)
            states.append(trainer.state_dict())
            if pid:
                assert_gone(pid)
            updates.close()
    assert_same(*states)


def test_who_asks_the_critic_waits_for_it() -> None:
    """Values, state_dict() and get_parameters() in a callback are those of this update."""
    seen = torch.ones(3, 4)
    found: dict[int, list[Any]] = {}
    for workers in (1, 2):
        found[workers] = []
        with trainer_of(workers) as trainer:
            for stats in trainer.run(4 * STEPS):
                with torch.no_grad():
                    kinds = {
                        1: lambda: trainer.network.critic(seen),
                        2: lambda: list(trainer.network.state_dict().values())[-1].clone(),
                        3: lambda: trainer.policy(0).network(seen)[1],
                    }
                    if stats.updates in kinds:
                        found[workers].append(kinds[stats.updates]())
    assert len(found[1]) == 3
    assert all(torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True))


def test_parameters_written_in_between_count() -> None:
    """Both while the steps are under way and after them, with the optimizer as it is then."""
    states = []
    for workers in (1, 2):
        with trainer_of(workers) as trainer:
            for stats in trainer.run(6 * STEPS):
                if stats.updates in (2, 4):
                    if stats.updates == 4:
                        trainer.settle()
                    with torch.no_grad():
                        for parameter in trainer.network.critic.parameters():
                            parameter.fill_(0.01 * stats.updates)
            states.append(trainer.state_dict())
    assert_same(*states)


def test_parameters_of_an_agent_in_a_callback() -> None:
    kept: dict[int, list[Any]] = {1: [], 2: []}
    for workers, found in kept.items():
        agent = ACKTR(ENV, config=configuration(workers))

        def look(stats: TrainStats, agent: ACKTR = agent, found: list[Any] = found) -> None:
            if stats.updates == 2:
                parameters = agent.get_parameters()
                found.append({name: value.clone() for name, value in parameters.items()})
                agent.set_parameters({name: 0.5 * value for name, value in parameters.items()})

        agent.learn(4 * STEPS, callback=look)
        found.append(agent.get_parameters())
        agent.close()
    for one, two in zip(kept[1], kept[2], strict=True):
        assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_an_export_in_a_callback_has_the_values_of_this_update(tmp_path: Path) -> None:
    seen, file = torch.ones(1, 4, dtype=torch.float64), tmp_path / "policy.pt2"
    agent = ACKTR(ENV, config=configuration(2))
    found = []

    def write(stats: TrainStats) -> None:
        if stats.updates == 2:
            agent.export(file)
            found.append(float(agent.value(seen.numpy())[0]))

    agent.learn(3 * STEPS, callback=write)
    _, _, value, *_ = torch.export.load(file).module()(seen)
    assert float(value.detach()) == pytest.approx(found[0], rel=1e-5)
    agent.close()


def test_no_process_outlives_the_training() -> None:
    with trainer_of(2) as trainer:
        pids = {pid_of(trainer) for _ in trainer.run(3 * STEPS)}
        (pid,) = pids  # one for all updates
        assert_gone(pid)
        for stats in trainer.run(9 * STEPS):
            pid = pid_of(trainer)
            if stats.updates == 5:
                break
        del stats
        assert_gone(pid)
        assert elsewhere(trainer) is None
        updates = trainer.run(9 * STEPS)
        next(updates)
        pid = pid_of(trainer)
        del updates
    del trainer
    gc.collect()
    assert_gone(pid)


def test_what_stops_kfac_stops_training(monkeypatch: pytest.MonkeyPatch) -> None:
    with trainer_of(2) as trainer:
        assert isinstance(trainer.learner, ACKTRLearner)

        def fails(**given: Any) -> None:
            raise FactorError("no decomposition of it")

        monkeypatch.setattr(trainer.learner._value_step.optimizer, "step", fails)
        with pytest.raises(FactorError, match=r"^no decomposition of it$"):
            list(trainer.run(3 * STEPS))
        assert elsewhere(trainer) is None


@pytest.mark.parametrize("way", ["killed", "raises"])
def test_a_lost_process_is_one_line(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with trainer_of(2) as trainer:
        assert isinstance(trainer.learner, ACKTRLearner)
        if way == "raises":

            def fails(*given: Any) -> None:
                raise ValueError("something\nodd")

            monkeypatch.setattr(trainer.learner, "critic_report", fails)
        updates = trainer.run(9 * STEPS)
        expected = "killed by SIGKILL" if way == "killed" else "the critic: ValueError: something"
        started = time.monotonic()
        with pytest.raises(CriticError, match=expected) as caught:
            for _ in updates:
                if way == "killed":
                    os.kill(pid_of(trainer), signal.SIGSTOP)
                    os.kill(pid_of(trainer), signal.SIGKILL)
        assert "\n" not in str(caught.value)
        assert time.monotonic() - started < 30
        for lost in (trainer.state_dict, lambda: next(trainer.run(9 * STEPS))):
            with pytest.raises(CriticError, match=expected):
                lost()
        with trainer_of(1) as other:
            state = other.state_dict()
        trainer.load_state_dict(state)
        assert_same(state, trainer.state_dict())


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with trainer_of(2, env_timeout=1.0) as trainer:
        assert isinstance(trainer.learner, ACKTRLearner)
        monkeypatch.setattr(trainer.learner, "critic_report", lambda *given: time.sleep(60))
        with pytest.raises(CriticError, match=r"step 1 .*within 1 s"):
            list(trainer.run(3 * STEPS))


@pytest.mark.parametrize(
    "changes",
    [
        {"acktr": {"critic_optimizer": "first_order"}},
        {"algo": "a2c"},
        {"network": dataclasses.replace(Config.for_env(ENV).network, shared=True)},
        {"network": dataclasses.replace(Config.for_env(ENV).network, memory="lstm")},
    ],
)
def test_others_learn_here(changes: dict[str, Any]) -> None:
    with trainer_of(2, **changes) as trainer:
        updates = trainer.run(9 * STEPS)
        next(updates)
        assert getattr(trainer.learner, "elsewhere", None) is None
        updates.close()


def test_one_worker_is_one_process() -> None:
    with trainer_of(1) as trainer:
        updates = trainer.run(9 * STEPS)
        next(updates)
        assert elsewhere(trainer) is None
        updates.close()


def test_compiled_ones_learn_here() -> None:
    with trainer_of(2) as trainer:
        assert isinstance(trainer.learner, ACKTRLearner)
        given = trainer.learner, trainer.envs
        compiled = dataclasses.replace(trainer.config, compile=True)
        assert can_be_apart(given[0], trainer.config, given[1])
        assert not can_be_apart(given[0], compiled, given[1])


def test_by_default_it_is_apart_where_cores_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acktr.envs.parallel.usable_cores", lambda: 2)
    config = dataclasses.replace(configuration(2), env_workers="auto")
    envs = training_envs(config)
    trainer = Trainer(config, envs)
    updates = trainer.run(9 * STEPS)
    next(updates)
    assert pid_of(trainer)
    updates.close()
    envs.close()


def assert_gone(pid: int) -> None:
    """The process has ended, and nobody waits for it."""
    with suppress(ProcessLookupError):
        for _ in range(100):
            os.kill(pid, 0)
            time.sleep(0.05)
        raise AssertionError(f"process {pid} is there")
