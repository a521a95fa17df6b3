"""The page of formulas names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import acktr.kfac

HERE = Path(__file__).parent
PAGE = (Path(acktr.kfac.__file__).parent / "FORMULAS.md").read_text()


def test_every_formula_names_a_test_that_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "formula" not in line]
    assert len(named) == len(rows) > 30
    for file, test in named:
        assert f"def {test}(" in (HERE / file).read_text(), (file, test)


def test_every_file_that_is_named_exists() -> None:
    for file in re.findall(r"`(test_\w+\.py)[`:]", PAGE):
        assert (HERE / file).exists(), file
