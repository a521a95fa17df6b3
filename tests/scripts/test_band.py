"""scripts/band.py."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from scripts import band
from tests.tools.run_folders import write_run

ENV = "PongNoFrameskip-v4"


def made(root: Path, ours: list[list[float]], theirs: list[list[float]], env: str = ENV) -> None:
    """Runs of 10,000 steps with 100 episodes of each return, so that the means are those."""
    for label, runs in (("fast", ours), ("plain", theirs)):
        for seed, levels in enumerate(runs):
            write_run(root, env, label, seed, [level for level in levels for _ in range(100)])


def run(root: Path, *more: str, points: str = "4") -> int:
    given = [str(root / "runs"), "--label", "fast", "--within", "plain", "--points", points]
    return band.main([*given, "--out", str(root / "out"), *more])


def test_mean_against_the_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(
        tmp_path / "runs",
        ours=[[0.0, 2.0, 9.0, 4.0], [1.0, 4.0, 1.0, 5.0]],
        theirs=[[0.75, 3.5, 1.0, 4.5], [2.0, 3.0, 4.25, 4.5], [1.0, 9.0, 2.0, 4.5]],
    )
    assert run(tmp_path) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "band.csv").open()))
    assert [[float(value) for key, value in row.items() if key != "env"] for row in rows] == [
        [2500, 0.5, 0.75, 2.0, -0.25],
        [5000, 3.0, 3.0, 9.0, 0.0],
        [7500, 5.0, 1.0, 4.25, 0.75],
        [10_000, 4.5, 4.5, 4.5, 0.0],
    ]
    assert capsys.readouterr().out == (
        f"{ENV}: between at 2 of 4 points; above at 1, by at most 0.75; "
        "below at 1, by at most 0.25\n"
    )


def test_steps_before_a_first_return_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", ENV, "fast", 0, [1.0, 2.0])  # the first episode ends at 5,000
    write_run(tmp_path / "runs", ENV, "plain", 0, [1.0] * 20)
    assert run(tmp_path) == 0
    rows = csv.DictReader((tmp_path / "out" / "band.csv").open())
    assert [(row["steps"], row["mean"]) for row in rows] == [
        ("5000", "1.0"),
        ("7500", "1.0"),
        ("10000", "1.5"),
    ]


def test_environments_are_compared_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "runs", [[1.0]], [[1.0]])
    made(tmp_path / "runs", [[2.0]], [[1.0]], env="BreakoutNoFrameskip-v4")
    write_run(tmp_path / "runs", ENV, "other", 0, [7.0] * 10, evaluation=None)  # is left out
    assert run(tmp_path) == 0
    assert capsys.readouterr().out == (
        "BreakoutNoFrameskip-v4: between at 0 of 4 points; above at 4, by at most 1; below at 0\n"
        f"{ENV}: between at 4 of 4 points; above at 0; below at 0\n"
    )


def refusal(root: Path, capsys: pytest.CaptureFixture[str], *more: str, points: str = "4") -> str:
    assert run(root, *more, points=points) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert not (root / "out").exists()
    return captured.err


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    assert "no such folder" in refusal(tmp_path, capsys)
    write_run(runs, ENV, "fast", 0, [1.0] * 10)
    assert f"{ENV}: no run of plain" in refusal(tmp_path, capsys)
    write_run(runs, ENV, "plain", 0, [1.0] * 10)
    assert "must be two labels" in refusal(tmp_path, capsys, "--within", "fast")
    assert "--points: needs an integer in [1, 1000], got '0'" in refusal(
        tmp_path, capsys, points="0"
    )
    write_run(runs, ENV, "plain", 1, [1.0] * 10, total=20_000)
    assert "of one length" in refusal(tmp_path, capsys)
    write_run(runs, ENV, "fast", 1, [1.0] * 10, evaluation=None)
    assert "fast/seed1: not finished" in refusal(tmp_path, capsys)
