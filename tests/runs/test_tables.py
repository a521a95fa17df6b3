from __future__ import annotations

import csv
from importlib import import_module
from pathlib import Path

import pytest

from acktr.files import plain_text, spreadsheet_text
from acktr.runs.tables import Table, last_row, read_table


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


def rising(path: Path, count: int) -> Table:
    """Rows with n = 0, 1, ... and a text of about 60 characters."""
    table = Table(path, "n", ("n", "text"), comment="#{}")
    table.add([{"n": str(n), "text": "x" * (50 + n % 20)} for n in range(count)])
    return table


@pytest.mark.parametrize("limit", [-1, 0, 7, 1_500, 1_998, 1_999, 3_000])
def test_cut_reads_the_end_and_keeps_what_the_whole_table_says(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("acktr.runs.tables"), "_BLOCK", 1 << 10)
    path = tmp_path / "t.csv"
    rising(path, 2_000)
    whole = [row for row in read_table(path).rows if int(row["n"]) <= limit]
    head = path.read_bytes().splitlines(keepends=True)[:2]
    with path.open("a") as file:
        file.write("2000,half")
    table = Table(path, "n", ("n", "text"))
    assert table.cut(limit, 100) == whole[-100:]
    assert read_table(path).rows == whole
    assert path.read_bytes().splitlines(keepends=True)[:2] == head
    table.add([{"n": "3001", "other": "1"}])
    assert [row["other"] for row in read_table(path).rows] == [""] * len(whole) + ["1"]
    assert read_table(path).comment == "#{}"


def test_a_table_larger_than_what_is_read_at_once_can_be_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.csv"
    rising(path, 1000)
    monkeypatch.setattr(import_module("acktr.runs.tables"), "SIZE_CAP", 10_000)
    table = Table(path, "n", ("n", "text"))
    assert table.cut(998, 1)[0]["n"] == "998"
    table.add([{"n": "999", "wider": "1"}])
    monkeypatch.undo()
    assert [int(row["n"]) for row in read_table(path).rows] == list(range(1000))


def test_numbers_of_a_spreadsheet_stay_numbers() -> None:
    assert [spreadsheet_text(text) for text in ("=1", "a=1", "", "'a")] == ["'=1", "a=1", "", "''a"]
    for text in ("=1", "+1", "-1", "@1", "\t1", "a", "", "'a", "'"):
        assert plain_text(spreadsheet_text(text)) == text
