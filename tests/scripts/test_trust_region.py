"""The study of the trust region measures what a step really costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scripts.trust_region import PROBLEMS, main, ratios, steps


def test_a_step_costs_what_was_promised() -> None:
    rows = steps("actor-critic, two heads", "short steps", 4)
    assert [row.step for row in rows] == [0, 1, 2, 3]
    assert rows[0].measured
    found = ratios(rows)
    assert len(found) == 4
    torch.testing.assert_close(found, torch.ones(4), rtol=0.2, atol=0)


def test_the_study_writes_a_table_and_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.trust_region.PROBLEMS", dict(list(PROBLEMS.items())[:1]))
    assert main(["--out", str(tmp_path), "--steps", "2"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "figure.png",
        "table.csv",
        "table.md",
    ]
    table = (tmp_path / "table.csv").read_text().splitlines()
    assert len(table) == 1 + 3 * 2
    assert "| MLP | default |" in (tmp_path / "table.md").read_text()
