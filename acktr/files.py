"""Reading files that cannot be trusted and writing files that cannot be left half-written."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

MOST_VALUES = 1 << 20
"""Values of one JSON text: numbers, texts, lists and objects."""

DEEPEST = 64
"""Objects and lists within each other in a JSON text."""

_MOST_DIGITS = 78
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


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


def parse_json(data: bytes) -> Any:
    """The value of a JSON text that nobody vouches for.

    Raises:
        ValueError: if it is none, has a key twice, more than :data:`MOST_VALUES` values, more than
            :data:`DEEPEST` objects and lists within each other, or an integer of over 256 bits.
    """
    # No fewer than its values: each but the first follows such a sign.
    if 1 + data.count(b",") + data.count(b"[") + data.count(b"{") > MOST_VALUES:
        raise ValueError("too many values")
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_distinct_keys, parse_int=_integer)
    except RecursionError:
        raise ValueError("nested too deep") from None
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            item
            for node in level
            if isinstance(node, dict | list)
            for item in (node.values() if isinstance(node, dict) else node)
        ]
    if any(isinstance(node, dict | list) for node in level):
        raise ValueError("nested too deep")
    return value


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > _MOST_DIGITS:
        raise ValueError("an integer of too many digits")
    return int(text)


def _distinct_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r:.80} stands twice in one object")
    return content


def read_object(path: Path, limit: int = 1 << 20) -> dict[str, Any]:
    """The object in a JSON file of at most ``limit`` bytes; its contents are not checked.

    Raises:
        ValueError: if it cannot be read, is no JSON object or has a key twice; one line that
            names it.
    """
    try:
        content = parse_json(read_limited(path, limit))
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {reason(error)}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return content


def write_synced(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a new file, all at once or part by part, and wait until it is on the disk."""
    with path.open("xb") as file:
        file.writelines([data] if isinstance(data, bytes) else data)
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


def append_whole(path: Path, data: bytes) -> None:
    """Append all of the data to a file that exists, or nothing.

    Raises:
        OSError: if it cannot be written; the file is as it was then.
    """
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


def write_atomic(path: Path, data: bytes | Iterable[bytes]) -> None:
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


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write or replace several files: all are whole under other names before the first is renamed.

    Raises:
        OSError: if one cannot be written; nothing is left then, and old files are intact.
    """
    temporary = {path: path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}") for path in files}
    made: list[Path] = []
    try:
        for path, data in files.items():
            if path.is_dir():
                raise IsADirectoryError(None, "is a folder", str(path))
            write_synced(temporary[path], data)
        for path, whole in temporary.items():
            if not os.path.lexists(path):
                made.append(path)
            os.replace(whole, path)
    except BaseException:
        for path in (*temporary.values(), *made):
            with contextlib.suppress(OSError):
                path.unlink()
        raise
    for folder in {path.parent for path in files}:
        sync_folder(folder)


def safe_name(text: str) -> str:
    """Text with characters that are not for file names replaced by ``_``."""
    return re.sub(r"[^\w.\-]", "_", text)


def is_label(text: str) -> bool:
    """Whether runs may be called so: 1 to 80 of A-Z a-z 0-9 . _ - and no sign first."""
    return _LABEL.fullmatch(text) is not None


def blanked(text: str) -> str:
    """Text with blanks for what cannot be printed."""
    return "".join(c if c.isprintable() else " " for c in text)


def message(text: str, most: int = 2000) -> str:
    """Text as one line that drives no terminal: control characters escaped, the middle left out."""
    line = "".join(c if c.isprintable() else _escaped(c) for c in text)
    half = most // 2
    return line if len(line) <= most else f"{line[:half]} [...] {line[-half:]}"


def _escaped(character: str) -> str:
    return " " if character.isspace() else character.encode("unicode_escape").decode("ascii")


def spreadsheet_text(text: str) -> str:
    """Text that no spreadsheet takes for a formula: with an apostrophe before what begins one."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def plain_text(text: str) -> str:
    """Inverse of :func:`spreadsheet_text`."""
    return text[1:] if text.startswith("'") and text[1:].startswith(_FORMULA) else text


def reason(error: OSError) -> str:
    """The reason of an operating-system error, without number and path."""
    return error.strerror or str(error) or type(error).__name__


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names, for example acktr.actor.lr."""
    settings: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            settings |= flat(value, f"{prefix}{key}.")
        else:
            settings[prefix + key] = value
    return settings
