"""Reports say what their means are over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from acktr.report.page import ReportSettings, write_report
from acktr.report.references import load_references, published_curves
from tests.tools.run_folders import write_run


def reported(root: Path) -> str:
    settings = ReportSettings(load_references())
    write_report([root / "runs"], root / "out", settings, ["acktr", "report"])
    return (root / "out" / "report.md").read_text()


def test_runs_of_one_label_with_other_settings_are_named(tmp_path: Path) -> None:
    for seed in (0, 1):
        run = write_run(tmp_path / "runs", "X-v0", "acktr", seed, [1.0] * 20)
        config = json.loads((run / "config.json").read_text())
        more = {"gamma": 0.9 + 0.05 * seed, "acktr": {"actor": {"lr": 0.1}}, "env_workers": seed}
        (run / "config.json").write_text(json.dumps(config | more))
    write_run(tmp_path / "runs", "X-v0", "a2c", 0, [1.0] * 20, algo="a2c")
    text = reported(tmp_path)
    assert "**Runs of acktr on X-v0 differ in gamma**" in text
    assert "Runs of a2c" not in text


def configured(root: Path, label: str, seed: int, **settings: object) -> Path:
    run = write_run(root / "runs", "X-v0", label, seed, [1.0] * 20, algo=label)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | settings))
    return run


def test_an_argument_that_some_runs_lack_is_a_difference(tmp_path: Path) -> None:
    for seed, kwargs in enumerate(({}, {"max_episode_steps": 50})):
        configured(tmp_path, "acktr", seed, env_kwargs=kwargs, gamma=0.9)
    configured(tmp_path, "acktr", 2, env_kwargs={})  # of an earlier version, without gamma
    text = reported(tmp_path)
    assert "**Runs of acktr on X-v0 differ in env\\_kwargs.max\\_episode\\_steps**" in text
    assert "compared over tasks" not in text


def test_labels_that_were_given_other_tasks_are_named(tmp_path: Path) -> None:
    atari = {"sticky": 0.25, "num_threads": 4}
    for seed in range(2):
        configured(tmp_path, "acktr", seed, env_kwargs={"g": 1}, wrappers=[], atari=atari, lr=1)
        other = {"sticky": 0.0, "num_threads": 8}
        configured(tmp_path, "a2c", seed, wrappers=["m:W"], atari=other, lr=2)
    text = reported(tmp_path)
    line = "**Runs of a2c and acktr on X-v0 differ in atari.sticky, env\\_kwargs.g, wrappers**"
    assert f"{line}, so that they are compared over tasks, too." in text
    assert text.count("differ in") == 1


def test_runs_that_were_lengthened_are_named(tmp_path: Path) -> None:
    run = configured(tmp_path, "acktr", 0)
    assert "another length" not in reported(tmp_path)
    session = {"step": 4096, "total_timesteps": 10_000, "former_total_timesteps": 4000}
    (run / "versions.json").write_text(json.dumps({"sessions": [session]}))
    named = "**Resumed with another length: X-v0/acktr/seed0 (lengthened from 4,000 steps)**"
    assert named in reported(tmp_path)


def test_one_run_has_no_interval(tmp_path: Path) -> None:
    for label, level in (("acktr", 3.0), ("a2c", 1.0)):
        write_run(tmp_path / "runs", "HalfCheetah-v5", label, 0, [level] * 200, algo=label)
    text = reported(tmp_path)
    assert "## Aggregate scores" in text
    rows = [line for line in text.splitlines() if line.startswith(("| acktr", "| a2c"))]
    assert rows and not any("[" in row for row in rows)
    write_run(tmp_path / "runs", "HalfCheetah-v5", "acktr", 1, [2.0] * 200)
    again = reported(tmp_path)
    assert any("[" in line for line in again.splitlines() if line.startswith("| acktr"))


@pytest.mark.parametrize("env", ["MinAtar/Breakout-v1", "mine:Breakout-v0", "foo/Hopper-v5"])
def test_environments_of_others_have_no_published_curves(env: str) -> None:
    assert not published_curves(env)
    assert published_curves("ale_py:ALE/Breakout-v5") and published_curves("Hopper-v5")
