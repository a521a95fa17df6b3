"""The figure of the README comes from what lies in results/."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from acktr.report.references import published_curves
from scripts import overview

ROOT = Path(__file__).parents[2]


def test_it_draws_the_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "overview.png"
    figures, picture = [], overview.picture
    monkeypatch.setattr(
        overview, "picture", lambda figure, kind: figures.append(figure) or picture(figure, kind)
    )
    assert overview.main(["--results", str(ROOT / "results"), "--out", str(out)]) == 0
    made, kept = out.read_bytes(), (ROOT / "results" / "overview.png").read_bytes()
    assert made[:8] == b"\x89PNG\r\n\x1a\n"
    assert made[:33] == kept[:33]  # of one size; the pixels depend on installed fonts
    (left, right) = [axis for axis in figures[0].axes if axis.get_visible()]

    with (ROOT / "results" / "mujoco" / "aggregate.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["statistic"] == "IQM"]
    for metric, drawn in zip(("last100", "eval"), left.containers, strict=True):
        wanted = {row["label"]: row for row in rows if row["metric"] == metric}
        points, _, (bars,) = drawn.lines
        for row, x, (low, high) in zip(
            (wanted[label] for label in overview.LABELS),
            points.get_xdata(),
            bars.get_segments(),
            strict=True,
        ):
            ends = [float(row[key]) for key in ("value_low", "value", "value_high")]
            assert [low[0], x, high[0]] == pytest.approx(ends)

    *published, ours = right.lines
    curves = published_curves(overview.GAME)
    for line, curve in zip(published, curves, strict=True):
        assert np.array_equal(line.get_xydata()[-1], [curve.steps[-1], curve.returns[-1]])
    steps, score = ours.get_xydata()[-1]
    assert 9_900_000 < steps <= 10_000_000 and score > 0


def test_what_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert overview.main(["--results", str(tmp_path), "--out", str(tmp_path / "a.png")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("overview: error: ") and err.count("\n") == 1
