"""Training with environments in several processes."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acktr import ACKTR
from acktr.config import preset
from acktr.envs import EnvFault, workers
from acktr.runs.checkpoint import load_checkpoint
from tests.tools.command_line import call, start, table, wait_for

LABELS = {"one": "1", "two": "2", "auto": "auto"}
CHEETAH = ("train", "--env", "HalfCheetah-v5", "--num-steps", "32", "--device", "cpu")


def test_training_does_not_depend_on_the_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("acktr.envs.parallel.usable_cores", lambda: 3)
    argv = ("train", "--env", "Hopper-v5", "--total-timesteps", "1024", "--num-steps", "64")
    states = {}
    for label, number in LABELS.items():
        options = ("--eval-episodes", "1", "--env-workers", number, "--label", label)
        assert call(capsys, *argv, *options)[0] == 0
        run = Path("runs/Hopper-v5", label, "seed0")
        used = json.loads((run / "protocol.json").read_text())["env_workers"]
        assert used == {"one": 1, "two": 2, "auto": 3}[label]
        rewards = [row["r"] for row in table(run / "monitor.csv")]
        assert len(rewards) > 5
        states[label] = (load_checkpoint(run / "checkpoints/last")[0]["network"], rewards)
    for network, rewards in states.values():
        assert rewards == states["one"][1]
        for name, value in states["one"][0].items():
            assert torch.equal(network[name], value)


def test_agents_have_processes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acktr.envs.parallel.usable_cores", lambda: 2)
    config = dataclasses.replace(preset("Hopper-v5")[0], num_steps=4)
    agent = ACKTR("Hopper-v5", config)
    assert workers(agent.envs) == 2
    agent.learn(64)
    inner = agent.envs.unwrapped
    agent.close()
    with pytest.raises(EnvFault, match="is closed"):
        inner.step(0.0)


def test_one_process_where_one_thread_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    argv = (*CHEETAH, "--total-timesteps", "256", "--eval-episodes", "1")
    code, _, err = call(capsys, *argv)
    assert code == 0, err
    assert "env workers 1" in err


def stepped_in_a_fork(agent: ACKTR) -> str:
    """What an error says of steps in a copy of the agent's environments in another process."""

    def step(ends: Any) -> None:
        try:
            agent.envs.step(
                np.ones((4, *(agent.action_space.shape or ())), agent.action_space.dtype)
            )
            ends.send("")
        except Exception as error:
            ends.send(str(error))

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=step, args=(theirs,))
    process.start()
    said: str = ours.recv()
    process.join()
    return said


def test_copies_of_an_agent_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    with ACKTR("CartPole-v1", num_envs=4, seed=0, num_steps=8) as agent:
        agent.learn(32)
        rows = agent.envs.unwrapped._rows
        before = rows.observations[""].copy()
        assert not stepped_in_a_fork(agent)
        assert np.array_equal(rows.observations[""], before)
    monkeypatch.setattr("acktr.envs.parallel.usable_cores", lambda: 2)
    with ACKTR("Hopper-v5", num_envs=4, seed=0, num_steps=8) as agent:
        agent.learn(32)
        said = stepped_in_a_fork(agent)
        assert f"belong to process {os.getpid()}: make the agent in the process" in said
        agent.learn(32)


def test_interrupted_group(tmp_path: Path) -> None:
    """Ctrl-C reaches all processes of a terminal; the run stops in an orderly way all the same."""

    process = start(tmp_path, *CHEETAH, "--env-workers", "3", new_session=True)
    wait_for(process, "steps")
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("acktr: stopped by SIGINT, checkpoint at step")
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_killed_process_ends_the_run_with_one_line(tmp_path: Path) -> None:

    process = start(tmp_path, *CHEETAH, "--env-workers", "2", new_session=True)
    wait_for(process, "steps")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 76
    assert (
        "error: the process of environments 4 to 7 of HalfCheetah-v5 was killed by "
        in (err.splitlines()[-1])
    )
    assert "Traceback" not in err
    assert "last good checkpoint" in err
