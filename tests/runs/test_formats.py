"""Runs that every version wrote, one for each format of checkpoints; they stay for ever."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from acktr.agent import ACKTR
from acktr.interrupts import Interrupts
from acktr.runs.checkpoint import VERSION, load_checkpoint
from acktr.runs.saved import find_agent
from acktr.runs.start import resume
from acktr.runs.tables import read_table

FORMATS = Path(__file__).parent / "formats"
NUMBERS = [str(number) for number in range(1, VERSION + 1)]


@pytest.fixture(params=NUMBERS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    shutil.copytree(FORMATS / request.param, tmp_path / "run")
    manifest = json.loads((tmp_path / "run/checkpoints/last/manifest.json").read_text())
    assert manifest["version"] == int(request.param)
    return tmp_path / "run"


def test_there_is_one_of_each_format() -> None:
    assert sorted(path.name for path in FORMATS.iterdir()) == NUMBERS


def test_its_numbers_are_those_in_the_file(run: Path) -> None:
    last = run / "checkpoints" / "last"
    stored = load_file(last / "state.safetensors")
    state, meta = load_checkpoint(last)
    assert state["timesteps"] == 128 and state["updates"] == 4 and meta["timesteps"] == 128
    for name, value in state["network"].items():
        assert np.array_equal(value.numpy(), stored[f"state/network/{name}"])
    agent = ACKTR.load(run)
    try:
        observation = np.array([0.01, -0.02, 0.03, 0.04], np.float32)
        hidden = torch.tensor(observation)
        for layer in ("trunk.1", "head.linear"):
            weight, bias = (
                state["network"][f"actor.{layer}.{kind}"] for kind in ("weight", "bias")
            )
            hidden = weight @ (hidden if layer == "trunk.1" else hidden.tanh()) + bias
        assert agent.predict(observation, deterministic=True)[0] == int(hidden.argmax())
    finally:
        agent.close()


def test_it_goes_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without_envs = load_checkpoint(run / "checkpoints/last")[0]["collector"]["envs"] is None
    resume(run, 192, Interrupts(), ["acktr"], lambda folder, config: None)
    lines = capsys.readouterr().err.splitlines()
    assert any("warning: other versions from step" in line for line in lines)
    warnings = [line for line in lines if "warning" in line and "other versions" not in line]
    told = "environments start new episodes: the checkpoint of an earlier version"
    assert [told in line for line in warnings] == [True] * without_envs
    agent = find_agent(run, "last")
    assert agent.timesteps == 192 and agent.state["updates"] == 6
    assert json.loads((run / "checkpoints/last/manifest.json").read_text())["version"] == VERSION
    rows = read_table(run / "progress.csv").rows
    assert [int(row["timesteps"]) for row in rows] == list(range(32, 193, 32))
