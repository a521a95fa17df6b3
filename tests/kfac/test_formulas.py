"""The page of formulas names code and tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import acktr.kfac

TESTS = Path(__file__).parents[1]
KFAC = Path(acktr.kfac.__file__).parent
PAGE = (KFAC / "FORMULAS.md").read_text()
CURVATURE, LEARNING = PAGE.split("## Reinforcement learning")
ROW = re.compile(
    r"^\| (?!formula).* \| `([\w/]+\.py):([\w.]+)` \| `([\w/]+\.py)::(test_\w+)` \|$", re.M
)


def rows(text: str) -> int:
    return sum(line.startswith("| ") and "| formula |" not in line for line in text.splitlines())


def defined(path: Path) -> set[str]:
    """Functions, classes and their methods in a file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{x.name}" for x in node.body if isinstance(x, ast.FunctionDef)}
    return names


@pytest.mark.parametrize(
    ("text", "code", "tests"),
    [(CURVATURE, KFAC, TESTS / "kfac"), (LEARNING, KFAC.parent, TESTS)],
    ids=["curvature", "learning"],
)
def test_every_formula_names_its_code_and_its_test(text: str, code: Path, tests: Path) -> None:
    named = ROW.findall(text)
    assert len(named) == rows(text) > 15
    for file, name, test_file, test in named:
        assert name in defined(code / file), (file, name)
        assert f"def {test}(" in (tests / test_file).read_text(), (test_file, test)


def test_every_file_that_is_named_exists() -> None:
    for file in re.findall(r"`(test_\w+\.py)[`:]", PAGE):
        assert (TESTS / "kfac" / file).exists() or (TESTS / file).exists(), file
