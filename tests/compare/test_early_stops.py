"""Runs of a grid that stop early, on the schedule of all steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from acktr.compare.status import State, Status, status, survey
from acktr.config import ConfigError
from acktr.interrupts import Interrupts
from acktr.runs.start import resume, start
from tests.compare.test_grid import one_thread as one_thread
from tests.compare.test_grid import plans


def test_early_stop(tmp_path: Path) -> None:
    (whole,) = plans(tmp_path)
    early = dataclasses.replace(whole, stop_at=64)
    args = (whole.config, tmp_path, "test", Interrupts(), ["acktr"], lambda *_: None)
    start(*args, None, None, 64)
    assert status(early) == Status(State.FINISHED, 64)
    assert status(dataclasses.replace(whole, stop_at=65)) == Status(State.UNFINISHED, 64)
    assert status(whole) == Status(State.UNFINISHED, 64)
    resume(whole.path, None, Interrupts(), ["acktr"], lambda *_: None)
    assert status(early) == status(whole) == Status(State.FINISHED, 128)


@pytest.mark.parametrize("stop_at", [-5, 0, 129])
def test_a_stop_out_of_range_is_refused_for_finished_runs_too(tmp_path: Path, stop_at: int) -> None:
    (plan,) = plans(tmp_path)
    start(plan.config, tmp_path, "test", Interrupts(), ["acktr"], lambda *_: None, None, None, 64)
    with pytest.raises(ConfigError, match=rf"in \[1, total_timesteps\], here 128, got {stop_at}"):
        survey([dataclasses.replace(plan, stop_at=stop_at)])


def test_a_stop_in_the_last_update_is_the_end(tmp_path: Path) -> None:
    """Updates have 64 steps: a stop at 100 ends at 128, with the evaluation of the end."""
    (plan,) = plans(tmp_path)
    early = dataclasses.replace(plan, stop_at=100)
    args = (plan.config, tmp_path, "test", Interrupts(), ["acktr"], lambda *_: None)
    start(*args, None, None, 100)
    evaluations = plan.path / "eval.csv"
    assert status(early) == Status(State.FINISHED, 128)
    evaluations.unlink()  # as it is when the process was killed during the evaluation
    assert status(early) == Status(State.UNFINISHED, 128)
    resume(plan.path, None, Interrupts(), ["acktr"], lambda *_: None, None, 100)
    assert evaluations.exists()
    assert status(early) == Status(State.FINISHED, 128)
    again = resume(plan.path, None, Interrupts(), ["acktr"], lambda *_: None, None, 100)
    assert "is complete: 128 of 128 steps" in again
