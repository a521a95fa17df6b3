"""Environments that misbehave, in trained runs: each is named, and no process stays."""

from __future__ import annotations

import re
import time
from pathlib import Path

from acktr.runs.checkpoint import load_checkpoint
from scripts.reliability.processes import Command, alive, descendants, gone
from scripts.reliability.trials import Trial
from tests.tools.hostile import ENV_ID, FAULTS

WORKERS = ("auto", 3, 2)
"""One process would be this one, of which nothing survives a crash."""
COUNT = len(WORKERS) * len(FAULTS)
FAILED, REFUSED = 76, 2
_TIMEOUT = 1.0
_SLACK = 12.0
"""Seconds that a run and its end may take besides the limit to a call, on a busy machine."""


def plan(count: int, scratch: Path) -> list[Trial]:
    """Every deed with each number of processes."""
    grid = [(deed, workers) for workers in WORKERS for deed in FAULTS]
    return [
        Trial(f"{deed}, {workers} workers", 0)
        for deed, workers in grid[:: max(1, len(grid) // count)][:count]
    ]


def misbehaved(trial: Trial, here: Path) -> str:
    """The line names it, the exit code is the right one, and what was learned is there."""
    deed, _, workers = trial.what.removesuffix(" workers").rpartition(", ")
    fault = FAULTS[deed]
    words = (
        f"train --env {ENV_ID} --num-envs 3 --num-steps 4 --total-timesteps 48 --device cpu"
        f" --eval-episodes 2 --env-timeout {_TIMEOUT} --env-workers {workers} --run-dir runs"
    )
    began = time.monotonic()
    command = Command([*words.split(), "--env-kwargs", f"deed={deed}"], here)
    family: set[int] = set()
    while (code := command.poll()) is None:
        family |= alive(descendants(command.pid))
        assert time.monotonic() - began < 60, f"it hangs: {command.said[-300:]}"
        time.sleep(0.02)
    took = time.monotonic() - began
    said = command.said
    assert "Traceback" not in said, said[-600:]
    wanted = 0 if fault.goes_on else REFUSED if fault.where == "init" else FAILED
    assert code == wanted, f"exit code {code}, not {wanted}: {said[-300:]}"
    assert any(re.search(fault.said, line) for line in said.splitlines()), said[-400:]
    most = _SLACK + (2 * _TIMEOUT if fault.hangs else 0)
    assert took < most, f"it took {took:.1f} s"
    left = gone(family, 5.0)
    assert not left, f"{len(left)} processes survive"
    if fault.where not in ("init", "reset"):  # a run that never began leaves nothing
        (run,) = here.glob("runs/*/*/seed0")
        load_checkpoint(run / "checkpoints" / "last")
    return f"exit code {code} in {took:.1f} s"
