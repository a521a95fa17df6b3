"""Reading files that cannot be trusted and writing files that cannot be left half-written."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from pathlib import Path


def read_limited(path: Path, limit: int) -> bytes:
    """Read a regular file of at most ``limit`` bytes.

    Raises:
        OSError: if it cannot be read, is not a regular file or is too large; ``strerror`` says so.
    """
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise OSError(None, "not a regular file", str(path))
    if info.st_size > limit:
        raise OSError(None, f"{info.st_size} bytes; at most {limit} are allowed", str(path))
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(None, f"more than the {limit} bytes allowed", str(path))
    return data


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk (a no-op where folders cannot be opened)."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Write or replace a file; whoever reads it sees the old or the new one, never a part.

    Raises:
        OSError: if it cannot be written; an old file is intact then.
    """
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        write_synced(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def safe_name(text: str) -> str:
    """Text with characters that are not for file names replaced by ``_``."""
    return re.sub(r"[^\w.\-]", "_", text)


def reason(error: OSError) -> str:
    """The reason of an operating-system error, without number and path."""
    return error.strerror or str(error) or type(error).__name__
