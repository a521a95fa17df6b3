"""The quick tier of corrupt checkpoints and senseless settings and command lines."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch

from acktr.runs.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from acktr.runs.saved import read_agent
from scripts.reliability import corruption
from scripts.reliability.cases import Checkpoints, command_case, settings_case
from tests.runs.test_formats import FORMATS, NUMBERS

SOUND = FORMATS / NUMBERS[-1] / "checkpoints" / "last"


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    made = Checkpoints(SOUND, tmp_path)
    yield made
    made.close()


def test_corrupt_checkpoints_are_refused_or_harmless(checkpoints: Checkpoints) -> None:
    found = Counter(checkpoints.case(number) for number in range(300))
    assert found["refused"] > 200 and 5 < found["loaded"] < 60


def test_the_campaign_sees_what_must_not_happen(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the check of the hashes."""
    monkeypatch.setattr("acktr.runs.checkpoint._verified", lambda _, files, *__: files)
    with pytest.raises(AssertionError, match="was loaded"):
        for number in range(300):
            checkpoints.case(number)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name", ["network/actor.trunk.1.bias", "collector/reward_scaler/returns", "learner/lr"]
)
def test_numbers_that_no_agent_has_are_refused(name: str, value: float, tmp_path: Path) -> None:
    files = corruption.read(SOUND)
    tensors = safetensors.torch.load(files[corruption.TENSORS])
    if f"state/{name}" in tensors:
        tensors[f"state/{name}"][0] = value
        changed = {corruption.TENSORS: safetensors.torch.save(tensors)}
    else:
        tree = json.loads(files[corruption.TREE])
        tree["learner"]["lr"] = value
        changed = {corruption.TREE: json.dumps(tree).encode()}
    corruption.write(tmp_path / "x", corruption.signed(files | changed, {}))
    with pytest.raises(CheckpointError, match=f"{name} is NaN or Inf"):
        read_agent(tmp_path / "x")


def test_senseless_settings_and_command_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    codes = Counter(settings_case(number, tmp_path) for number in range(40))
    assert codes[2] > 20 and codes[0] > 1
    assert Counter(command_case(number) for number in range(20))[2] > 10
    assert os.listdir(tmp_path) == ["settings.json"]


def test_a_forged_checkpoint_has_the_right_hashes(tmp_path: Path) -> None:
    files = corruption.read(SOUND)
    assert corruption.signed(files, {}) == files
    corruption.write(tmp_path / "x", files)
    assert read_agent(tmp_path / "x").timesteps == read_agent(SOUND).timesteps


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b'{"x":' + b"[" * 65 + b"]" * 65 + b"}", "state.json: not valid"),
        (b'{"x":[' + b"{}," * (1 << 20) + b"0]}", "state.json: not valid"),
        (b'{"x":1,"x":1}', "state.json: not valid"),
        (b'{"x":' + b"9" * 79 + b"}", "state.json: not valid"),
    ],
)
def test_json_is_bounded(text: bytes, why: str, tmp_path: Path) -> None:
    """Memory stays within a few times the file: 60 MB of JSON took 3.9 GB."""
    resource = pytest.importorskip("resource")
    files = corruption.signed(corruption.read(SOUND) | {corruption.TREE: text}, {})
    corruption.write(tmp_path / "x", files)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Exception, match=why):
        load_checkpoint(tmp_path / "x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_what_cannot_be_read_back_is_not_written(tmp_path: Path) -> None:
    deep: dict[str, object] = {}
    for _ in range(65):
        deep = {"x": deep}
    for state, why in ((deep, "more than 64"), ({"x": 1 << 257}, "more than 256 bits")):
        with pytest.raises(TypeError, match=why):
            save_checkpoint(tmp_path / "last", state, {})
    save_checkpoint(tmp_path / "last", {"x": -(1 << 255)}, {})
    assert load_checkpoint(tmp_path / "last")[0] == {"x": -(1 << 255)}
