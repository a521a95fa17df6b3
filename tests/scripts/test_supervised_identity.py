"""What tells runs apart stays as it is, so that a campaign continues with newer code."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from scripts.supervised import __main__ as main
from scripts.supervised import options, settings
from scripts.supervised.campaign import Campaign
from scripts.supervised.data import load
from scripts.supervised.errors import SupervisedError
from scripts.supervised.problems import make_problem
from scripts.supervised.runs import Row, RunSpec, read_rows, write_rows
from scripts.supervised.settings import ProblemName

FIELDS = {
    "batch", "constants", "curvature", "data", "device", "eval_every", "optimizer", "problem",
    "seed", "setting", "updates", "widths",
}  # fmt: skip
SETTINGS = {
    "kfac": {"kl_clip": 10.0, "damping": 0.3},
    "kfac-adaptive": {"damping": 9.0},
    "sgd": {"lr": 0.01},
    "adam": {"lr": 0.01},
}


def spec_of(name: str, out: Path, problem_name: ProblemName = "autoencoder") -> RunSpec:
    """Description of the only full run of a command line."""
    setting = ",".join(f"{key}={value}" for key, value in SETTINGS[name].items())
    argv = [problem_name, "--out", str(out), "--seeds", "0", "--optimizers", name]
    argv += ["--fix", f"{name}:{setting}", "--epochs", f"{name}=1", "--widths", "16", "4"]
    chosen = options.parse(argv)
    images = load(None, problem_name)
    problem = make_problem(problem_name, images, chosen.widths, chosen.device)
    plan = main._plan(chosen, problem, 64, images)
    return Campaign(plan, problem, out)._full(name, 0, SETTINGS[name])[1]


def identity_of(name: str, out: Path, problem_name: ProblemName = "autoencoder") -> Any:
    return json.loads(spec_of(name, out, problem_name).identity())


def test_the_identity_of_a_kfac_run_is_pinned(tmp_path: Path) -> None:
    text = spec_of("kfac", tmp_path).identity()
    found = json.loads(text)
    assert text == json.dumps(found, sort_keys=True)
    assert found.keys() == FIELDS
    assert found["constants"].keys() == {"factored_damping", "inverse", "lr", "stat_decay"}
    assert found["curvature"].keys() == {"statistics_part", "statistics_every", "refresh_every"}
    assert found["setting"] == SETTINGS["kfac"]


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_identity_of_other_runs_is_pinned(tmp_path: Path, name: str) -> None:
    found = identity_of(name, tmp_path)
    assert found.keys() == FIELDS
    assert (found["constants"], found["curvature"]) == ({}, None)


@pytest.mark.parametrize(
    ("problem", "minimum", "clip"), [("autoencoder", 0.1, 10.0), ("convnet", 1e-3, 0.03)]
)
def test_kfac_adaptive_states_how_it_adapts(
    tmp_path: Path, problem: ProblemName, minimum: float, clip: float | None
) -> None:
    constants = identity_of("kfac-adaptive", tmp_path, problem)["constants"]
    assert constants.pop("adaptive") == {
        "interval": 5, "factor": 0.95, "minimum": minimum, "maximum": 1e4, "kl_clip": clip
    }  # fmt: skip
    assert constants == identity_of("kfac", tmp_path, problem)["constants"]


@pytest.mark.parametrize("what", ["LM", "ADAPTIVE_CLIP"])
def test_runs_with_other_adaptive_constants_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    before = {name: spec_of(name, tmp_path) for name in SETTINGS}
    file = tmp_path / "a.csv"
    write_rows(file, before["kfac-adaptive"], [Row(0, 0.0, 1.0, 1.0)], 8)
    assert read_rows(file, before["kfac-adaptive"]) == [Row(0, 0.0, 1.0, 1.0)]
    if what == "LM":
        other = dataclasses.replace(settings.LM["autoencoder"], factor=0.9)
        monkeypatch.setitem(settings.LM, "autoencoder", other)
        line = "made with constants.adaptive.factor 0.95, not 0.9;"
    else:
        monkeypatch.setitem(settings.ADAPTIVE_CLIP, "autoencoder", 0.5)
        line = "made with constants.adaptive.kl_clip 10.0, not 0.5;"
    for name in ("kfac", "sgd", "adam"):
        assert spec_of(name, tmp_path).identity() == before[name].identity()
    with pytest.raises(SupervisedError) as caught:
        read_rows(file, spec_of("kfac-adaptive", tmp_path))
    assert line in str(caught.value)
