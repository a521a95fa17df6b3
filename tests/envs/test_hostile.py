"""Environments that misbehave are named, whatever they do and wherever they are."""

from __future__ import annotations

import copy
import multiprocessing
import os
import re
import signal
import threading
import time
import warnings
from concurrent import futures
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch

from acktr.envs import EnvError, EnvFault, make_single, make_vec
from tests.tools.hostile import ENV_ID, FAULTS, HostileEnv

TIMEOUT = 0.4
DEADLY = ("crash", "kill")


def outcome(deed: str, workers: int, apart: bool) -> tuple[list[str], list[str]]:
    """The errors and the warnings of playing ten steps in three environments."""
    HostileEnv.made = 0
    errors: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vec: Any = None
        try:
            vec = make_vec(
                ENV_ID,
                3,
                env_kwargs={"deed": deed},
                env_workers=workers,
                env_timeout=TIMEOUT if FAULTS[deed].hangs else 30.0,
                apart=apart,
            )
            vec.reset(seed=0)
            for _ in range(10):
                vec.step(np.zeros(3, np.int64))
        except (EnvError, EnvFault) as error:
            errors.append(str(error))
        finally:
            if vec is not None:
                vec.close()
    return errors, [str(each.message) for each in caught]


@pytest.mark.parametrize(
    ("workers", "apart"), [(1, False), (3, False), (1, True)], ids=["here", "workers", "apart"]
)
@pytest.mark.parametrize("deed", FAULTS)
def test_each_fault_is_named(deed: str, workers: int, apart: bool) -> None:
    fault = FAULTS[deed]
    if deed in DEADLY and workers == 1 and not apart:
        pytest.skip("nothing in a process survives its end")
    if deed == "hang in close" and (workers > 1 or apart):
        pytest.skip("takes the five seconds that a process has to end")
    before = os.getcwd(), torch.get_default_dtype(), signal.getsignal(signal.SIGTERM), os._exit
    started = time.monotonic()
    errors, told = outcome(deed, workers, apart)
    after = os.getcwd(), torch.get_default_dtype(), signal.getsignal(signal.SIGTERM), os._exit
    assert after == before
    assert time.monotonic() - started < 5.0
    lines = told if fault.goes_on else errors
    assert errors == [] or not fault.goes_on
    assert any(re.search(fault.said, line) for line in lines), (errors, told)
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize(
    ("deed", "said"),
    [
        ("hang", "environment 0 of Hostile-v0 did not return from a step within 0.4 s"),
        ("hang in reset", "environment 0 of Hostile-v0 did not return from reset within 0.4 s"),
        ("os._exit", r"environment 0 of Hostile-v0 raised SystemExit at step 5: os._exit\(0\)"),
        ("sys.exit", "environment 0 of Hostile-v0 raised SystemExit at step 5: 0"),
    ],
)
def test_faults_of_one_environment_alone(deed: str, said: str) -> None:
    HostileEnv.made = 0
    env = make_single(
        ENV_ID,
        render_mode=None,
        env_kwargs={"deed": deed, "index": 0},
        env_timeout=TIMEOUT,
    )
    with pytest.raises(EnvFault, match=said):
        env.reset(seed=0)
        for _ in range(10):
            env.step(0)
    env.close()


def test_one_environment_alone_is_watched_by_one_thread_until_it_is_closed() -> None:
    before, seen = threading.active_count(), set()
    env = make_single("CartPole-v1", render_mode=None)
    env.reset(seed=0)
    for _ in range(5):
        env.step(0)
        seen |= {thread.ident for thread in threading.enumerate()}
    assert len(seen) == threading.active_count() == before + 1
    env.close()
    env.close()
    assert threading.active_count() == before


def test_a_limited_environment_can_be_copied_and_used_in_a_thread() -> None:
    env = make_single(Slow, render_mode=None, env_timeout=TIMEOUT / 4)  # type: ignore[arg-type]
    env.reset(seed=0)
    other = copy.deepcopy(env)
    other.reset(seed=0)
    with pytest.raises(EnvFault, match="did not return from a step"):
        other.step(0)
    other.close()
    with futures.ThreadPoolExecutor(1) as pool:  # where nothing is late, nor here because of it
        pool.submit(env.reset).result()
        pool.submit(env.step, 0).result()
    env.close()


def test_a_limited_environment_has_its_limit_in_a_fork_too() -> None:
    env = make_single(Slow, render_mode=None, env_timeout=TIMEOUT / 4)  # type: ignore[arg-type]
    env.reset(seed=0)

    def step(ends: Connection) -> None:
        try:
            env.step(0)
        except EnvFault as fault:
            ends.send(str(fault))
        ends.close()

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=step, args=(theirs,))
    process.start()
    theirs.close()
    assert "did not return from a step" in ours.recv()
    process.join()
    env.close()


def test_the_limit_is_for_each_call() -> None:
    """Many slow calls in one process are not late, whatever their number."""
    HostileEnv.made = 0
    vec = make_vec(Slow, 6, env_workers=2, env_timeout=TIMEOUT)
    vec.reset(seed=0)
    vec.step(np.zeros(6, np.int64))
    vec.close()


class Slow(HostileEnv):
    """Takes half of the time that it has."""

    def step(self, action: Any) -> Any:
        time.sleep(TIMEOUT / 2)
        return super().step(action)


def test_a_fault_in_a_worker_tells_where_it_was() -> None:
    for deed, place in (("raise", "_raise"), ("hang", "_hang"), ("crash", "_crash")):
        HostileEnv.made = 0
        vec = make_vec(ENV_ID, 2, env_kwargs={"deed": deed}, env_workers=2, env_timeout=TIMEOUT)
        vec.reset(seed=0)
        with pytest.raises(EnvFault) as caught:
            for _ in range(10):
                vec.step(np.zeros(2, np.int64))
        vec.close()
        assert place in caught.value.__notes__[0]
