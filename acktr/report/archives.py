"""Archives of runs: the folders of a campaign in one .zip, read as the folders are.

``results/mujoco/runs.zip`` stands for the folder of its runs and ``runs.zip/Hopper-v5/acktr`` for a
folder in it. An archive may come from anywhere, so that its size, its number of files and their
names are checked before anything is unpacked.
"""

from __future__ import annotations

import io
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from acktr.files import blanked, read_limited, reason
from acktr.runs.folder import RunError

SUFFIX = ".zip"
"""Ending of an archive's name."""
MOST_FILES = 50_000
"""Files of the largest archive that is read."""
MOST_BYTES = 1 << 29
"""Bytes of the largest archive that is read, packed and unpacked."""

_LONGEST_NAME = 500
_EPOCH = (1980, 1, 1, 0, 0, 0)
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 1
_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError)


@contextmanager
def unpacked(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Folders for paths of which some are archives, or folders in archives.

    Archives are unpacked into temporary folders, which are removed in the end. Messages of RunError
    and ValueError that are raised meanwhile name the archive instead.

    Raises:
        ValueError: An archive is damaged, too large or holds a name that leads elsewhere.
    """
    homes: dict[Path, Path] = {}
    folders = []
    with tempfile.TemporaryDirectory(prefix="acktr-") as temporary:
        try:
            for path in paths:
                archive = next(
                    (p for p in (path, *path.parents) if p.suffix == SUFFIX and p.is_file()), None
                )
                if archive is None:
                    folders.append(path)
                    continue
                if archive not in homes:
                    # Numbered, so that runs are in the order of the archives.
                    homes[archive] = Path(temporary, f"{len(homes):09}", archive.name)
                    _unpack(archive, homes[archive])
                folders.append(homes[archive] / path.relative_to(archive))
            yield folders
        except (RunError, ValueError) as error:
            if not homes:
                raise
            message = str(error)
            for archive, home in homes.items():
                message = message.replace(str(home), str(archive))
            kind = RunError if isinstance(error, RunError) else ValueError
            raise kind(message) from error


def read_archive(path: Path) -> dict[str, bytes]:
    """The files of an archive by their names in it, such as Hopper-v5/acktr/seed0/eval.csv.

    Raises:
        ValueError: It cannot be read, is damaged, too large, or a name leads out of it; one line.
    """
    try:
        data = read_limited(path, MOST_BYTES)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [e for e in archive.infolist() if not e.filename.endswith("/")]
            _check(entries)
            contents = {}
            for entry in entries:
                # Reading so many bytes unpacks no more, even if the entry lies about its size.
                with archive.open(entry) as file:
                    content = contents[entry.filename] = file.read(entry.file_size)
                if len(content) != entry.file_size:
                    raise ValueError(f"{entry.filename} is cut off")
            return contents
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {reason(error)}") from error
    except _DAMAGED as error:
        raise ValueError(f"{path}: not an archive of runs: {blanked(str(error)):.200}") from error


def pack(files: Mapping[str, bytes]) -> bytes:
    """An archive of the files, by their names in it; the same files give the same bytes.

    What an older archive held keeps its bytes in a newer one, so that git stores the difference.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # on Windows too
            archive.writestr(entry, files[name], zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()


def _unpack(archive: Path, home: Path) -> None:
    files = read_archive(archive)
    try:
        home.mkdir(parents=True)
        for name, content in files.items():
            target = home / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                file.write(content)
    except OSError as error:
        raise ValueError(f"{archive}: cannot unpack: {reason(error)}") from error


def _check(entries: Sequence[zipfile.ZipInfo]) -> None:
    """Refuse, before anything is unpacked, what is too much or would lie elsewhere."""
    size = sum(entry.file_size for entry in entries)
    if len(entries) > MOST_FILES or size > MOST_BYTES:
        raise ValueError(
            f"{len(entries)} files of {size} bytes; at most {MOST_FILES} of {MOST_BYTES} are read"
        )
    names = set()
    for entry in entries:
        name = entry.filename
        odd = "\\" in name or ":" in name or not name.isprintable() or len(name) > _LONGEST_NAME
        if odd or any(part in ("", ".", "..") for part in name.split("/")):
            raise ValueError(f"the name {name!r:.100} leads elsewhere")
        if name in names:
            raise ValueError(f"{name} is in it twice")
        names.add(name)
        if entry.compress_type not in _METHODS or entry.flag_bits & _ENCRYPTED:
            raise ValueError(f"{name} is encrypted or packed by another method than deflate")
