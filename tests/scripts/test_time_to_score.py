"""scripts/time_to_score.py."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from scripts import time_to_score
from scripts.bench.cases import SUITES
from tests.tools.run_folders import write_run

ROBOT, WALKER = "HalfCheetah-v5", "Walker2d-v5"


def row(env: str, speed: float, **settings: str) -> dict[str, object]:
    return {"env": env, "settings": settings, "steps_per_second": {"median": speed}}


@pytest.fixture
def speed(tmp_path: Path) -> Path:
    path = tmp_path / "score.json"
    rows = [row(ROBOT, 100.0, algo="acktr"), row(ROBOT, 20.0, peer="sb3-ppo")]
    path.write_text(json.dumps({"rows": rows}))
    return path


def made(root: Path, speed: Path) -> list[dict[str, str]]:
    given = [str(root / "runs"), "--speed", str(speed), "--out", str(root / "out")]
    assert time_to_score.main(given) == 0
    return list(csv.DictReader((root / "out" / "time_to_score.csv").open()))


def test_minutes_are_steps_over_measured_speed(tmp_path: Path, speed: Path) -> None:
    runs = tmp_path / "runs"
    for seed, first in enumerate((50, 100, 150)):  # of 200 episodes, one every 50 steps
        write_run(runs, ROBOT, "acktr", seed, [0.0] * first + [8000.0] * (200 - first))
    write_run(runs, ROBOT, "sb3-ppo", 0, [0.0] * 100 + [4000.0] * 100, algo="ppo")
    write_run(runs, ROBOT, "other", 0, [9000.0] * 100)
    ours, theirs = made(tmp_path, speed)
    # 50 of the last 100 have 8000 after 150 episodes; before 100 episodes half of them all do.
    assert ours == {
        "env": ROBOT,
        "score": "4000.0",
        "label": "acktr",
        "runs": "3",
        "reached": "3",
        "stopped": "0",
        "steps": "7500.0",
        "steps_per_second": "100.0",
        "minutes": "1.25",
    }
    assert [theirs[name] for name in ("label", "reached", "steps", "minutes")] == [
        *("sb3-ppo", "1", "10000.0", "8.33")
    ]
    text = (tmp_path / "out" / "time_to_score.md").read_text()
    assert f"| {ROBOT}, 4000 | ACKTR | 3 of 3 | 7,500 | 100 | 1.2 |" in text


def test_what_is_not_reached_or_not_measured_is_said(tmp_path: Path, speed: Path) -> None:
    runs = tmp_path / "runs"
    write_run(runs, ROBOT, "acktr", 0, [3999.0] * 200)
    write_run(runs, WALKER, "acktr", 0, [3000.0] * 200)
    robot, walker = made(tmp_path, speed)
    assert [robot[name] for name in ("reached", "steps", "minutes")] == ["0", "", ""]
    assert [walker[name] for name in ("reached", "steps_per_second", "minutes")] == ["1", "", ""]
    text = (tmp_path / "out" / "time_to_score.md").read_text()
    assert "| 0 of 1 | more than the run | 100 |  |" in text and "| not measured |  |" in text


def test_runs_that_have_stopped_early_count_however_they_went(tmp_path: Path, speed: Path) -> None:
    runs, some, none = tmp_path / "runs", [0.0] * 50 + [8000.0] * 150, [0.0] * 200
    for seed, returns in enumerate([none, none, some, some, some, none]):
        evaluation = (1.0, 3.0) if seed < 2 else None
        write_run(runs, ROBOT, "acktr", seed, returns, evaluation=evaluation)
    for seed, returns in enumerate([some, some, none]):
        evaluation = None if returns == none else (1.0, 3.0)
        write_run(runs, WALKER, "acktr", seed, returns, evaluation=evaluation)
    robot, walker = made(tmp_path, speed)
    # Three of six get there: the median depends on what would have become of the last one.
    names = ("runs", "reached", "stopped", "steps")
    assert [robot[name] for name in names] == ["6", "3", "4", ""]
    assert [walker[name] for name in names] == ["3", "2", "1", "4000.0"]
    text = (tmp_path / "out" / "time_to_score.md").read_text()
    assert "| 3 of 6 (4 stopped early) | not known | 100 |  |" in text


def test_the_suite_measures_every_task_and_algorithm() -> None:
    cases = SUITES["score"]()
    found = {(case.env, case.settings.get("peer") or case.settings["algo"]) for case in cases}
    assert found == {(env, label) for env in time_to_score.SCORES for label in time_to_score.LABELS}
    assert len({case.key for case in cases}) == len(cases) == 8
    assert {case.beside for case in cases} <= {case.key for case in cases}


@pytest.mark.parametrize("spoil", ["speed", "runs", "missing"])
def test_refusals(
    tmp_path: Path, speed: Path, capsys: pytest.CaptureFixture[str], spoil: str
) -> None:
    write_run(tmp_path / "runs", "Ant-v5" if spoil == "runs" else ROBOT, "acktr", 0, [1.0] * 20)
    if spoil == "speed":
        speed.write_text('{"rows": [{"env": "HalfCheetah-v5"}]}')
    why = {
        "speed": "no report of scripts.bench --suite score",
        "runs": "no run of acktr or sb3-ppo on PongNoFrameskip-v4",
        "missing": "no such folder",
    }[spoil]
    runs = tmp_path / ("nothing" if spoil == "missing" else "runs")
    given = [str(runs), "--speed", str(speed), "--out", str(tmp_path / "out")]
    assert time_to_score.main(given) == 2
    err = capsys.readouterr().err
    assert err.startswith("time_to_score: error: ") and err.count("\n") == 1 and why in err
    assert not (tmp_path / "out").exists()
