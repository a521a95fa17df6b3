"""Environments stepped by other processes only: the same as in this one, and this one survives."""

from __future__ import annotations

import threading
from typing import Any

import gymnasium
import numpy as np
import pytest

from acktr.envs import EnvError, found_masks, make_single, make_vec, workers
from acktr.envs.parallel import ParallelEnvs, can_fork, thread_ids
from tests.tools.hostile import ENV_ID
from tests.tools.masked import MaskedEnv
from tests.tools.toys import CountingEnv, variant


def pids(vec: gymnasium.vector.VectorEnv[Any, Any, Any]) -> list[int]:
    inner = vec.unwrapped
    assert isinstance(inner, ParallelEnvs)
    return [process.pid for process in inner._processes]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_steps_and_snapshots_are_those_of_this_process(number: int) -> None:
    here = make_vec(ENV_ID, 3, seed=4)
    there = make_vec(ENV_ID, 3, seed=4, env_workers=number, apart=True)
    assert (workers(here), len(pids(here))) == (1, 0)
    assert (workers(there), len(pids(there))) == (number, number)
    assert here.reset()[0].tobytes() == there.reset()[0].tobytes()
    for _ in range(45):
        one, other = (vec.step(np.zeros(3, np.int64)) for vec in (here, there))
        assert all(a.tobytes() == b.tobytes() for a, b in zip(one[:4], other[:4], strict=True))
        assert one[4].keys() == other[4].keys()
    here.close()
    there.close()


def test_masks_are_found_and_missed_as_in_this_process() -> None:
    env_id = variant(MaskedEnv, {})
    for apart in (False, True):
        vec = make_vec(env_id, 2, apart=apart)
        assert found_masks(vec).source is None
        _, infos = vec.reset(seed=0)
        assert len(pids(vec)) == apart
        assert found_masks(vec).source is not None
        assert infos["action_mask"].shape[0] == 2
        vec.close()
        vec = make_vec(variant(CountingEnv, {}), 2, masks="info", apart=apart)
        with pytest.raises(EnvError, match=r"masks='info': environment 0 of .* has no info"):
            vec.reset(seed=0)
        vec.close()


def test_gymnasiums_own_environments_stay_here() -> None:
    vec = make_vec("CartPole-v1", 2, apart=True)
    assert pids(vec) == []
    vec.close()


def test_environments_of_make_single_have_no_thread_before_they_are_used() -> None:
    vec = make_vec(lambda: make_single("CartPole-v1", render_mode=None), 2, apart=True)
    assert len(pids(vec)) == 1
    vec.reset(seed=0)
    vec.step(np.zeros(2, np.int64))
    vec.close()


def test_environments_with_threads_stay_here() -> None:
    class Threaded(CountingEnv):
        def __init__(self) -> None:
            super().__init__()
            self.ended = threading.Event()
            threading.Thread(target=self.ended.wait, daemon=True).start()

        def close(self) -> None:
            self.ended.set()

    vec = make_vec(Threaded, 2, apart=True)
    assert pids(vec) == []
    vec.close()


def test_a_thread_that_takes_the_place_of_an_ended_one_is_seen() -> None:
    """As where the last test's thread ends while environments are made."""
    ended = [threading.Event(), threading.Event()]
    threads = [threading.Thread(target=event.wait, daemon=True) for event in ended]
    threads[0].start()
    before = thread_ids()
    assert can_fork(before)
    threads[1].start()
    ended[0].set()
    threads[0].join()
    assert not can_fork(before)
    ended[1].set()
    threads[1].join()
    assert can_fork(before)
