"""CSV files that grow by whole rows and survive a full disk, a kill and a resume."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from acktr.envs import SUCCESS
from acktr.files import (
    append_whole,
    plain_text,
    read_limited,
    reason,
    spreadsheet_text,
    write_atomic,
)

WINDOW = 100
"""Episodes over which returns are averaged."""


def tag_of(group: str, key: str) -> str:
    """The tag of the mean over episodes of a number of their last infos.

    Args:
        group: rollout or eval.
        key: Of the info; is_success has the tags of Stable-Baselines3.
    """
    if key == SUCCESS:
        return "eval/success_rate" if group == "eval" else "rollout/success_rate"
    return f"{group}/mean_{key}" if group == "eval" else f"{group}/{key}_mean"


SIZE_CAP = 1 << 30
"""Bytes of the largest CSV file that is read."""

MOST_WAITING = 20_000
"""Rows of one file that wait for a disk that is full."""

_BLOCK = 1 << 20
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
    columns = _columns(path, table[0] if table else [])
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
        header, row = csv.reader([first.decode("utf-8"), lines[-2]], strict=True)
        columns = _columns(path, header)
    except (OSError, ValueError, csv.Error):
        return None
    return dict(zip(columns, row, strict=True)) if len(columns) == len(row) else None


class Table:
    """A CSV file; rows are added at its end and new columns widen it.

    It is made when the first row is added. Its first line is the ``comment``, starting with #; the
    first ``columns`` are given, and those that rows add follow, sorted. ``key`` is the column with
    the integer that :meth:`cut` compares; it never falls. Rows that cannot be written (a full disk)
    are kept, up to a number, and written with later ones; a warning says so.
    """

    def __init__(
        self, path: Path, key: str, columns: Sequence[str], comment: str | None = None
    ) -> None:
        self._path, self._key, self._comment = path, key, comment
        self._first = tuple(columns)
        self._columns: tuple[str, ...] | None = None
        self._waiting: list[Mapping[str, str]] = []
        self._failing = False

    def require_new(self) -> None:
        """Raise ValueError if the file exists already."""
        if os.path.lexists(self._path):
            raise ValueError(f"{self._path}: exists already, and the run is not being resumed")

    def cut(self, limit: int, last: int) -> list[dict[str, str]]:
        """Drop rows whose key exceeds ``limit``, and return the ``last`` rows that are left.

        Only the end of the file is read, whatever its size.

        Raises:
            OSError: if it cannot be read or cut.
            ValueError: if it is not a file of this table; one line.
        """
        if not self._path.exists() or self._path.stat().st_size == 0:
            return []
        with self._path.open("r+b") as file:
            content, begin = _head(self._path, file)
            if content.columns[: len(self._first)] != self._first:
                raise ValueError(f"{self._path}: columns must start with {','.join(self._first)}")
            kept, end = self._kept(file, content, begin, limit, last)
            file.truncate(end)
        self._comment, self._columns = content.comment, content.columns
        return kept

    def add(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Append rows; columns they lack stay empty."""
        self._waiting += rows
        self.flush()

    def flush(self) -> None:
        """Write the rows that wait; a failure is a warning, and they are kept."""
        if not self._waiting:
            return
        try:
            self._widen(self._waiting)
            assert self._columns is not None
            append_whole(self._path, _lines(self._columns, self._waiting))
        except (OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError):
                self._columns = None  # it was deleted, and begins again
            if not self._failing:
                why = reason(error) if isinstance(error, OSError) else error
                _logger.warning("%s: cannot write, rows are written later: %s", self._path, why)
            self._failing = True
            if len(self._waiting) > MOST_WAITING:
                lost = len(self._waiting) - MOST_WAITING // 2
                del self._waiting[:lost]
                _logger.warning("%s: still cannot write, %d rows are lost", self._path, lost)
            return
        self._failing = False
        self._waiting = []

    def _kept(
        self, file: BinaryIO, content: Content, begin: int, limit: int, last: int
    ) -> tuple[list[dict[str, str]], int]:
        """The last rows within the limit, and where in the file they end."""
        size, block = file.seek(0, os.SEEK_END), _BLOCK
        while True:
            start = max(begin, size - block)
            file.seek(start)
            lines = file.read(size - start).splitlines(keepends=True)
            if start > begin:
                start += len(lines.pop(0))  # the end of a row
            if lines and not lines[-1].endswith(b"\n"):
                lines.pop()  # a killed writer's
            rows = _rows(self._path, content.columns, lines)
            try:
                count = sum(1 for row in rows if int(row[self._key]) <= limit)
            except ValueError as error:
                raise ValueError(f"{self._path}: column {self._key}: {error}") from error
            if count >= max(last, 1) or start == begin:
                end = start + sum(map(len, lines[:count]))
                return rows[max(count - last, 0) : count], end
            block *= 4

    def _widen(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Make the file, or give it the columns it lacks."""
        new = {name for row in rows for name in row}.difference(self._columns or ())
        if self._columns is not None and not new:
            return
        others = new.union(self._columns or ()).difference(self._first)
        columns = (*self._first, *sorted(others))
        comment = [] if self._comment is None else [self._comment.encode() + b"\n"]
        names = {name: spreadsheet_text(name) for name in columns}
        header = _lines(columns, [names])
        write_atomic(self._path, chain(comment, [header], self._widened(columns)))
        self._columns = columns

    def _widened(self, columns: tuple[str, ...]) -> Iterator[bytes]:
        """The rows of the file, some at a time, with more columns."""
        if self._columns is None:
            return
        with self._path.open("rb") as file:
            content, _ = _head(self._path, file)
            while lines := file.readlines(_BLOCK):
                yield _lines(columns, _rows(self._path, content.columns, lines))


def _head(path: Path, file: BinaryIO) -> tuple[Content, int]:
    """Comment and columns of a CSV file, without rows, and where the rows begin."""
    try:
        line, comment = file.readline(_END).decode("utf-8"), None
        if line.startswith("#"):
            comment, line = line.rstrip("\n"), file.readline(_END).decode("utf-8")
        header = next(csv.reader([line], strict=True), []) if line.endswith("\n") else []
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file: {error}") from error
    return Content(comment, _columns(path, header), []), file.tell()


def _columns(path: Path, header: Sequence[str]) -> tuple[str, ...]:
    names = tuple(map(plain_text, header))
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{path}: no header line with distinct column names")
    return names


def _rows(path: Path, columns: Sequence[str], lines: Sequence[bytes]) -> list[dict[str, str]]:
    """The rows of complete lines; ValueError if one is something else."""
    try:
        table = list(csv.reader([line.decode("utf-8") for line in lines], strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file: {error}") from error
    for row in table:
        if len(row) != len(columns):
            line = ",".join(row)
            raise ValueError(f"{path}: row {line!r:.80} has {len(row)} fields, not {len(columns)}")
    return [dict(zip(columns, row, strict=True)) for row in table]


def _lines(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([row.get(name, "") for name in columns] for row in rows)
    return text.getvalue().encode()
