"""The figure of the README comes from what lies in results/."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts import overview

ROOT = Path(__file__).parents[2]


def test_it_draws_the_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "overview.png"
    arguments = ["overview", "--results", str(ROOT / "results"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    overview.main()
    made, kept = out.read_bytes(), (ROOT / "results" / "overview.png").read_bytes()
    assert made[:8] == b"\x89PNG\r\n\x1a\n"
    assert made[:33] == kept[:33]  # of one size; the pixels depend on installed fonts
