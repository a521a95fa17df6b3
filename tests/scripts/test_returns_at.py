"""scripts/returns_at.py."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from acktr.report.statistics import interval, mean
from scripts import returns_at
from tests.tools.run_folders import write_run

ENV = "Walker2d-v5"
# 100 episodes in each quarter of 4,000 steps: the mean at a quarter's end is that of its level.
LEVELS = {"acktr": ([1.0, 3.0, 10.0, 10.0], [2.0, 7.0, 10.0, 10.0]), "a2c": ([0.5, 1.5, 2.0, 2.0],)}


def runs(root: Path) -> Path:
    """Two runs of one label and one of another, whose levels last a quarter each."""
    for label, made in LEVELS.items():
        for seed, levels in enumerate(made):
            returns = [level for level in levels for _ in range(100)]
            write_run(root, ENV, label, seed, returns, total=4000)
    return root


def made(out: Path) -> dict[tuple[str, int], list[float]]:
    rows = csv.DictReader((out / "returns_at.csv").open())
    return {
        (row["label"], int(row["step"])): [
            float(row[name]) for name in ("mean", "mean_low", "mean_high")
        ]
        for row in rows
    }


def test_cells_are_means_over_the_runs_with_their_intervals(tmp_path: Path) -> None:
    asked = [str(runs(tmp_path / "runs")), "--steps", "2000", "1000", "--out", str(tmp_path)]
    assert returns_at.main(asked) == 0
    found = made(tmp_path)
    assert sorted(found) == [(label, step) for label in ("a2c", "acktr") for step in (1000, 2000)]
    band = interval(mean, {ENV: np.array([3.0, 7.0])}, resamples=returns_at.RESAMPLES, seed=0)
    assert found["acktr", 2000] == pytest.approx([5.0, float(band.low), float(band.high)])
    assert found["acktr", 1000][0] == 1.5 and found["a2c", 2000] == [1.5, 1.5, 1.5]
    text = (tmp_path / "returns_at.md").read_text()
    assert "| environment | label | runs | 1,000 | 2,000 |" in text
    assert "| Walker2d-v5 | a2c | 1 | 0.50 | 1.50 |" in text
    assert "| Walker2d-v5 | acktr | 2 | 1.50 [1.00, 2.00] | 5.00 [3.00, 7.00] |" in text


def test_a_step_that_one_run_has_not_passed_is_empty(tmp_path: Path) -> None:
    root = runs(tmp_path / "runs")
    run = root / ENV / "acktr" / "seed1"
    lines = (run / "monitor.csv").read_text().splitlines(keepends=True)
    (run / "monitor.csv").write_text("".join(lines[: 2 + 150]))  # its last episode ends at 1,500
    (run / "eval.csv").unlink()
    asked = [str(root), "--steps", "10", "1000", "2000", "--labels", "acktr", "--out"]
    assert returns_at.main([*asked, str(tmp_path)]) == 0
    assert list(made(tmp_path)) == [("acktr", 1000)]
    text = (tmp_path / "returns_at.md").read_text()
    assert "| Walker2d-v5 | acktr | 2 |  | 1.50 [1.00, 2.00] |  |" in text and "a2c" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "4001"], "4,000 steps; asked for 4,001"),
        (["--steps", "0"], "--steps"),
        (["--steps", "10", "--labels", "trpo"], "no run of trpo; there are ['a2c', 'acktr']"),
        (["--steps", "10", "--labels", "a2c", "a2c"], "each value may be given once"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert returns_at.main([str(runs(tmp_path / "runs")), *options, "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("returns_at: ") and message in line
    assert not out.exists()
