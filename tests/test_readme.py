"""The Python examples of the README run as printed (with fewer steps)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from acktr.cli.main import COMMANDS

README = Path(__file__).parent.parent / "README.md"


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(examples())))
def test_example_runs(number: int, tmp_path: Path) -> None:
    code = examples()[number].replace("100_000", "3_000").replace("90_000", "2_000")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_there_are_examples() -> None:
    assert len(examples()) == 3


def test_every_command_of_the_table_exists() -> None:
    assert set(re.findall(r"`acktr (\w+)", README.read_text())) == set(COMMANDS)
