"""One file in place of a folder: a zip whose members are not compressed.

Nothing in it can grow when it is read, so that its own size bounds the memory. Everything is
checked before it is read: how many members the directory lists, their names and their sizes.
"""

from __future__ import annotations

import io
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".zip"
"""End of the names of such files."""

_DATE = (1980, 1, 1, 0, 0, 0)
_END, _WIDE_END = b"PK\x05\x06", b"PK\x06\x07"
_END_SIZE, _WIDE_SIZE = 22, 20
_MOST_DIRECTORY = 4096


def packed(files: Mapping[str, bytes]) -> bytes:
    """The file with these members; the same members give the same bytes.

    Raises:
        ValueError: They are too large for one file (2 GiB).
    """
    buffer = io.BytesIO()
    try:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED, allowZip64=False) as archive:
            for name, data in files.items():
                archive.writestr(zipfile.ZipInfo(name, _DATE), data)
    except zipfile.LargeZipFile:
        raise ValueError("more than 2 GiB do not fit into one file: give a folder") from None
    return buffer.getvalue()


def unpacked(path: Path, caps: Mapping[str, int]) -> dict[str, bytes]:
    """The members of a file of :func:`packed`.

    Args:
        path: The file.
        caps: The names of all members, and the most bytes that each may have.

    Raises:
        OSError: It cannot be read.
        ValueError: It is something else.
        zipfile.BadZipFile: It is damaged.
    """
    with _opened(path, caps) as archive:
        return {member.filename: archive.read(member) for member in archive.infolist()}


def is_packed(path: Path, caps: Mapping[str, int]) -> bool:
    """Whether there is a file with these members, sound or not."""
    if not path.is_file():
        return False
    try:
        with _opened(path, caps):
            return True
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


@contextmanager
def _opened(path: Path, caps: Mapping[str, int]) -> Iterator[zipfile.ZipFile]:
    """A file whose members are as :func:`packed` writes them, by its directory."""
    with path.open("rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise ValueError("not a regular file")
        _check_directory(file, info.st_size, len(caps))
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if sorted(member.filename for member in members) != sorted(caps):
                raise ValueError("other members than those of a checkpoint")
            for member in members:
                plain = member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1
                if not plain or member.file_size != member.compress_size:
                    raise ValueError(f"{member.filename} is compressed or encrypted")
                if member.file_size > min(caps[member.filename], info.st_size):
                    raise ValueError(f"{member.filename} is too large")
            yield archive


def _check_directory(file: BinaryIO, size: int, members: int) -> None:
    """Refuse directories of another number of members before zipfile makes a list of them."""
    tail = _END_SIZE + _WIDE_SIZE
    file.seek(max(0, size - tail))
    end = file.read(tail)
    record = end[-_END_SIZE:]
    if len(end) < tail or record[:4] != _END or end.startswith(_WIDE_END):
        raise ValueError("not a zip file without comment and 64-bit sizes")
    entries, directory = record[10:12], record[12:16]
    if int.from_bytes(entries, "little") != members:
        raise ValueError("another number of members than a checkpoint has")
    if int.from_bytes(directory, "little") > _MOST_DIRECTORY:
        raise ValueError("its directory is too large")
