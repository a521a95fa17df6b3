"""How many processes step the environments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from acktr.envs import EnvError, make_vec
from acktr.envs import workers as number
from acktr.envs.parallel import usable_cores, worker_count
from acktr.envs.registry import lookup


def test_environments_that_render_stay_here() -> None:
    vec = make_vec("CartPole-v1", 2, render_mode="rgb_array", env_workers=2)
    assert number(vec) == 1
    vec.close()


@pytest.mark.parametrize(
    ("env_id", "asked", "cores", "num_envs", "found"),
    [
        ("HalfCheetah-v5", "auto", 1, 8, 1),
        ("HalfCheetah-v5", "auto", 2, 8, 2),
        ("HalfCheetah-v5", "auto", 64, 8, 4),
        ("HalfCheetah-v4", "auto", 4, 3, 2),
        ("HalfCheetah-v5", "auto", 4, 1, 1),
        ("CartPole-v1", "auto", 4, 8, 1),
        ("CartPole-v1", 3, 1, 8, 3),
        ("HalfCheetah-v5", 1, 4, 8, 1),
        ("HalfCheetah-v5", 9, 4, 8, 8),
    ],
)
def test_number_of_processes(
    env_id: str,
    asked: Any,
    cores: int,
    num_envs: int,
    found: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("acktr.envs.parallel.usable_cores", lambda: cores)
    assert worker_count(asked, lookup(env_id), num_envs) == found


@pytest.mark.parametrize("asked", ["all", 0, -1, 1025, True, 2.0, None])
def test_bad_number_of_processes(asked: Any) -> None:
    with pytest.raises(EnvError, match="env_workers must be 'auto' or an integer from 1 to 1024"):
        make_vec("CartPole-v1", 2, env_workers=asked)


def test_usable_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr("acktr.envs.parallel._QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert usable_cores() == 8
    for text, found in (("max 100000", 8), ("250000 100000", 3), ("5000 100000", 1), ("?", 8)):
        quota.write_text(text)
        assert usable_cores() == found
    monkeypatch.setenv("OMP_NUM_THREADS", "2,1")
    assert usable_cores() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert usable_cores() == 8


def test_a_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(EnvError, match=r"no process can be started .*set env_workers to 1"):
        make_vec("CartPole-v1", 2, env_workers=2)
