"""Windows, shares, memory and the work of processors, as the benchmark counts them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from acktr.envs import make_vec
from scripts.bench.cases import Timing
from scripts.bench.measure import Windows, peak_mib, processor_seconds, shares


def test_windows_end_with_updates_and_the_warm_up_does_not_count() -> None:
    now = iter([100.0, 101, 102.5, 103.5, 105, 109])
    timing = Timing(threads=1, seconds=2, windows=2, warm_up=2, warm_up_updates=2)
    seen: list[tuple[bool, int]] = []
    work = iter([5.0, 9, 12])
    windows = Windows(
        timing, lambda: next(now), lambda: {"calls": len(seen) ** 2.0}, lambda: next(work)
    )
    for steps in (10, 20, 30, 40, 60):
        windows.end_update(steps)
        seen.append((windows.warm, len(windows.rates)))
    # Warm at 102.5 with 20 steps; windows end at 105 with 40 and at 109 with 60 steps.
    assert seen == [(False, 0), (True, 0), (True, 0), (True, 1), (True, 2)]
    assert windows.done and windows.counted == {"calls": 4**2.0 - 1**2.0}
    assert windows.rates == [20 / 2.5, 20 / 4]
    assert windows.seconds == 6.5 and windows.steps == 40
    assert windows.processor == 12 - 5  # asked when it is warm and at the end of each window


def test_a_window_needs_the_updates_of_the_warm_up_too() -> None:
    now = iter(range(100))
    timing = Timing(threads=1, seconds=1, windows=1, warm_up=0.5, warm_up_updates=3)
    windows = Windows(timing, lambda: float(next(now)), processor=lambda: None)
    for steps in (1, 2, 3):
        assert not windows.warm
        windows.end_update(steps)
    assert windows.warm and not windows.done
    windows.end_update(8)
    found = {"rates": [5.0], "updates": 1, "seconds": 1.0, "steps": 5, "processor": None}
    assert windows.result() == found


def test_shares_are_disjoint_and_sum_to_one() -> None:
    rollout = {"env": 2.0, "forward": 1.0, "update": 6.0}
    inside = {"forward": 1.0, "fisher": 0.5, "factors": 0.25, "backward": 1.0}
    inside |= {"step": 3.0, "refresh": 1.0, "apply": 0.5}
    assert shares(10.0, rollout, inside) == pytest.approx(
        {
            "env": 0.2,
            "act": 0.1,
            "batch": 0.1,
            "forward": 0.1,
            "fisher": 0.05,
            "statistics": 0.025,
            "backward": 0.1,
            "step": 0.15,
            "refresh": 0.1,
            "precondition": 0.05,
            "rest": 0.025,
        }
    )


def test_peak_memory_is_that_of_this_process() -> None:
    peak = peak_mib()
    if not Path("/proc/self/status").exists():
        assert peak is None
        return
    assert peak is not None and 50 < peak < 100_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_peak_memory_counts_forked_processes() -> None:
    alone = peak_mib()
    envs = make_vec("Pendulum-v1", 4, env_workers=3)
    try:
        together = peak_mib()
    finally:
        envs.close()
    assert alone is not None and together is not None
    assert together > alone + 40  # two processes that have imported torch


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_work_of_processors_is_that_of_all_processes() -> None:
    burn = "import time\nwhile time.process_time() < 0.5: pass\nprint(1, flush=True)\ninput()"
    shell = f"{sys.executable} -c '{burn}'; true"  # a process of a process
    before, mine = processor_seconds(), time.process_time()
    with subprocess.Popen(["sh", "-c", shell], stdin=-1, stdout=-1) as child:
        assert child.stdout is not None and child.stdout.readline() == b"1\n"
        after, mine = processor_seconds(), time.process_time() - mine
        child.communicate(b"\n")
    assert before is not None and after is not None
    assert after - before == pytest.approx(0.5 + mine, abs=0.15)
