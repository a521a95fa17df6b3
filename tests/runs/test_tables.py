from __future__ import annotations

import csv
from pathlib import Path

import pytest

from acktr.runs.tables import last_row, read_table


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("a,b\n1,2\n3,4\n", {"a": "3", "b": "4"}),
        ("a,b\n1,2\n", {"a": "1", "b": "2"}),
        ("a,b\n1,2\n3,4", {"a": "1", "b": "2"}),  # half-written
        ("#{}\na,b\n1,2\n", {"a": "1", "b": "2"}),
        ("a,b\n1,\n", {"a": "1", "b": ""}),
        ("a,b\n", None),
        ("a,b", None),
        ("", None),
        ("#x\n", None),
        ("a,b\n1,2,3\n", None),
        ("a,b\n1\n", None),
        ('a,b\n1,"2\n', None),
        ("a,b\n\n", None),
    ],
)
def test_last_row(text: str, row: dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    assert last_row(path) == row


def test_last_row_of_no_text(tmp_path: Path) -> None:
    assert last_row(tmp_path / "none.csv") is None
    assert last_row(tmp_path) is None
    (tmp_path / "t.csv").write_bytes(b"a,b\n\xff,2\n")
    assert last_row(tmp_path / "t.csv") is None


def test_last_row_of_a_large_file_is_that_of_the_whole_table(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["n", "text"])
        for number in range(5_000):
            writer.writerow([number, "x" * (number % 60)])
            if number % 500 == 0:
                file.flush()
                assert last_row(path) == read_table(path).rows[-1]
    assert path.stat().st_size > 2 * (1 << 16)
    assert last_row(path) == read_table(path).rows[-1]


def test_last_row_longer_than_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1," + "x" * (1 << 17) + "\n")
    assert last_row(path) is None
