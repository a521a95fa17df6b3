"""Measures one case in a process of its own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from acktr.config import from_dict
from acktr.files import read_object, write_atomic
from scripts.bench.cases import Case, Timing
from scripts.bench.memory import peak_mib

TASK, RESULT, OUTPUT = "task.json", "result.json", "output.txt"
"""Files of a task: what to measure, what was found, and what the process said."""


def write_task(folder: Path, case: Case, timing: Timing) -> None:
    """Leave a task in a folder."""
    values = {"case": asdict(case), "timing": asdict(timing)}
    (folder / TASK).write_text(json.dumps(values))


def work(folder: Path) -> None:
    """Do the task of a folder and leave the result there."""
    task = read_object(folder / TASK)
    task["case"]["needs"] = tuple(task["case"]["needs"])
    case, timing = Case(**task["case"]), Timing(**task["timing"])
    torch.set_num_threads(timing.threads)
    found = measure(case, timing)
    write_atomic(folder / RESULT, json.dumps(found).encode())


def measure(case: Case, timing: Timing) -> dict[str, Any]:
    """The measurement as JSON values, with the ``peak_mib`` of memory."""
    found = _measure(case, timing)
    return {"peak_mib": peak_mib()} | found


def _measure(case: Case, timing: Timing) -> dict[str, Any]:
    """Each kind imports what it needs and no more, which would count as its memory."""
    if case.kind == "supervised":
        from scripts.bench.supervised import measure_supervised

        return measure_supervised(case, timing)
    if case.kind in ("atari peer", "mujoco peer"):
        from scripts.bench import peers

        mujoco = case.kind == "mujoco peer"
        return (peers.measure_mujoco if mujoco else peers.measure_atari)(case, timing)
    from scripts.bench import training

    config = from_dict(case.settings)
    if case.kind == "environment":
        return training.measure_environment(config, timing)
    if case.kind == "compute":
        return training.measure_compute(config, timing)
    return training.measure_training(config, timing)
