"""CSV files that grow by whole rows and survive a full disk, a kill and a resume."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from acktr.files import read_limited, reason, write_atomic

WINDOW = 100
"""Episodes over which returns are averaged."""

SIZE_CAP = 1 << 30
"""Bytes of the largest CSV file that is read."""

_END = 1 << 16
"""Bytes of a file's beginning and end that :func:`last_row` reads."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Content:
    """The contents of a CSV file."""

    comment: str | None
    """The first line if it starts with #."""
    columns: tuple[str, ...]
    """Names in the header line."""
    rows: list[dict[str, str]]
    """Complete rows; a last line without newline (a killed writer's) is left out."""


def read_table(path: Path) -> Content:
    """Read a CSV file with one header line.

    Raises:
        OSError: if it cannot be read or is larger than 1 GiB.
        ValueError: if it is not such a file; one line that names it.
    """
    try:
        text = read_limited(path, SIZE_CAP).decode("utf-8")
        text = text[: text.rfind("\n") + 1]
        comment = None
        if text.startswith("#"):
            comment, _, text = text.partition("\n")
        table = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file: {error}") from error
    if not table or len(set(table[0])) != len(table[0]):
        raise ValueError(f"{path}: no header line with distinct column names")
    columns = tuple(table[0])
    for number, row in enumerate(table[1:], 2 if comment is None else 3):
        if len(row) != len(columns):
            raise ValueError(f"{path}: line {number} has {len(row)} fields, not {len(columns)}")
    return Content(comment, columns, [dict(zip(columns, row, strict=True)) for row in table[1:]])


def last_row(path: Path) -> dict[str, str] | None:
    """The last complete row of a CSV file, read from its two ends only; None if there is none.

    For files that another process writes: whatever is missing, damaged or half-written is None.
    """
    try:
        with path.open("rb") as file:
            first = file.readline(_END)
            if first.startswith(b"#"):
                first = file.readline(_END)
            begin = file.tell()
            size = file.seek(0, os.SEEK_END)
            file.seek(max(begin - 1, size - _END))
            tail = file.read(_END)
        lines = tail[: tail.rfind(b"\n") + 1].decode("utf-8").split("\n")
        if len(lines) < 3:  # what is before the first newline may be the end of a longer line
            return None
        columns, row = csv.reader([first.decode("utf-8"), lines[-2]], strict=True)
    except (OSError, ValueError, csv.Error):
        return None
    return dict(zip(columns, row, strict=True)) if len(columns) == len(row) else None


class Table:
    """A CSV file; rows are added at its end and new columns widen it.

    It is made when the first row is added. Its first line is the ``comment``, starting with #; the
    first ``columns`` are given, and those that rows add follow, sorted. ``key`` is the column with
    the integer that :meth:`cut` compares. A write that fails is reported once as a warning; its
    rows are lost as a whole.
    """

    def __init__(
        self, path: Path, key: str, columns: Sequence[str], comment: str | None = None
    ) -> None:
        self._path, self._key, self._comment = path, key, comment
        self._first = tuple(columns)
        self._columns: tuple[str, ...] | None = None
        self._warned = False

    def require_new(self) -> None:
        """Raise ValueError if the file exists already."""
        if os.path.lexists(self._path):
            raise ValueError(f"{self._path}: exists already, and the run is not being resumed")

    def cut(self, limit: int) -> list[dict[str, str]]:
        """Drop rows whose key exceeds ``limit``, keep the file's comment and return what is left.

        Raises:
            OSError: if it cannot be read or rewritten.
            ValueError: if it is not a file of this table; one line.
        """
        if not self._path.exists() or self._path.stat().st_size == 0:
            return []
        content = read_table(self._path)
        if content.columns[: len(self._first)] != self._first:
            raise ValueError(f"{self._path}: columns must start with {','.join(self._first)}")
        try:
            kept = [row for row in content.rows if int(row[self._key]) <= limit]
        except ValueError as error:
            raise ValueError(f"{self._path}: column {self._key}: {error}") from error
        self._comment = content.comment
        self._rewrite(content.columns, kept)
        return kept

    def add(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Append rows; columns they lack stay empty."""
        try:
            self._widen(rows)
            assert self._columns is not None
            _append(self._path, _lines(self._columns, rows))
        except (OSError, ValueError) as error:
            if not self._warned:
                why = reason(error) if isinstance(error, OSError) else error
                _logger.warning("%s: cannot write, rows are lost: %s", self._path, why)
            self._warned = True

    def _widen(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Make the file, or give it the columns it lacks."""
        new = {name for row in rows for name in row}.difference(self._columns or ())
        if self._columns is not None and not new:
            return
        others = new.union(self._columns or ()).difference(self._first)
        old = [] if self._columns is None else read_table(self._path).rows
        self._rewrite((*self._first, *sorted(others)), old)

    def _rewrite(self, columns: tuple[str, ...], rows: Sequence[Mapping[str, str]]) -> None:
        comment = b"" if self._comment is None else self._comment.encode() + b"\n"
        header = _lines(columns, [dict(zip(columns, columns, strict=True))])
        write_atomic(self._path, comment + header + _lines(columns, rows))
        self._columns = columns


def _lines(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([row.get(name, "") for name in columns] for row in rows)
    return text.getvalue().encode()


def _append(path: Path, data: bytes) -> None:
    """Append all of the data or nothing."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        size = os.fstat(handle).st_size
        try:
            while data:
                data = data[os.write(handle, data) :]
        except OSError:
            os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)
