"""Checkpoints: a folder, or one file, of tensors and JSON, written atomically and verified.

A checkpoint holds ``state.safetensors`` (tensors and arrays by path in the tree), ``state.json``
(the tree with everything else), ``meta.json`` and ``manifest.json`` (format version, size and
SHA-256 of the others). Reading one never runs code. The hashes guard against damage, not against
an author who recomputes them; what such an author can do is limited to wrong numbers.

``save_checkpoint`` writes a complete ``NAME.tmp-XXXXXXXX`` beside the target, renames an existing
``NAME`` to ``NAME.old``, the new one to ``NAME``, and removes ``NAME.old``; where older ones are
kept it becomes ``NAME-1``, and what had that name ``NAME-2``. Whenever a crash stops it, ``NAME``
or, if that name is missing, ``NAME.old`` is a complete checkpoint.

A name that ends in ``.zip`` means one file that holds the four (:mod:`acktr.runs.single_file`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from acktr.envs import one_line
from acktr.files import parse_json, read_limited, reason, sync_folder, write_atomic, write_synced
from acktr.runs.single_file import SUFFIX, is_packed, packed, unpacked
from acktr.runs.trees import decode, decode_tensors, encode, encode_tensors

FORMAT = "acktr-checkpoint"
VERSION = 2
"""Format that is written; all from 1 on are read. Version 2 may hold environments' states."""

_TENSORS, _TREE, _META, _MANIFEST = "state.safetensors", "state.json", "meta.json", "manifest.json"
_CAPS = {_TENSORS: 4 << 30, _TREE: 64 << 20, _META: 4 << 20, _MANIFEST: 1 << 16}
_ATTEMPTS = 5


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; one line naming the file and the reason."""


def save_checkpoint(
    folder: Path, state: Mapping[str, object], meta: Mapping[str, object], older: int = 0
) -> None:
    """Write a checkpoint, replacing an older one of the same name (behind a symbolic link: there).

    That and the ones before it are kept as ``NAME-1``, ``NAME-2``, ..., as many as ``older``, if
    it is a folder.

    Both trees are made of dicts with string keys (no ``$`` first), lists, int, float, bool, str and
    None; ``state`` may also hold tensors and arrays (saved contiguous, without gradient). All of
    it comes back exactly, except that tuples become lists and NumPy scalars Python numbers.

    Raises:
        CheckpointError: if it cannot be written; an older checkpoint is intact then.
        TypeError: if a tree holds something else; the message names where.
    """
    target = _target(folder)
    files = _encode_files(target, state, meta)
    if target.suffix == SUFFIX:
        _save_file(target, files)
        return
    temporary = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(target)
        _sweep(target)
        temporary.mkdir()
        for name, data in files.items():
            write_synced(temporary / name, data)
        sync_folder(temporary)
        _finish_shift(target, older)
        _swap(temporary, target)
        with suppress(OSError):  # the next writer finishes it
            _finish_shift(target, older)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def checkpoint_path(path: object) -> Path:
    """Where a checkpoint is written or read, as the interface in Python was given it.

    Raises:
        TypeError: It is no name of a file or folder.
    """
    if isinstance(path, str | os.PathLike):
        return Path(path)
    raise TypeError(
        f"an agent is saved to a path and loaded from one, got {type(path).__name__}: write"
        " 'agent.zip' for one file (its bytes: Path('agent.zip').read_bytes()), 'agent' for a"
        " folder"
    )


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a checkpoint: ``(state, meta)``, tensors on the CPU.

    Raises:
        CheckpointError: if there is none, or any file is damaged, foreign or too large.
    """
    target = _target(folder)
    if target.is_file():
        files = _read_file(target)
    else:
        target, files = _read_current(target)
    with _sound(target / _TENSORS):
        tensors = decode_tensors(files[_TENSORS])
    with _sound(target / _TREE):
        state = decode(files[_TREE], tensors)
        if tensors:
            raise ValueError("tensors left over")
    with _sound(target / _META):
        meta = decode(files[_META], {})
    return state, meta


def finish_swap(folder: Path, older: int = 0) -> None:
    """Finish what a killed writer left: the checkpoint that it had just replaced.

    That becomes ``NAME-1`` and the ones before it move on, as many as ``older``; with 0 it goes.

    Raises:
        CheckpointError: It cannot be moved or removed.
    """
    target = _target(folder)
    try:
        if target.parent.is_dir():
            _finish_shift(target, older)
            _sweep(target)
    except OSError as error:
        raise _unwritable(folder, error) from error


def older_checkpoints(folder: Path, older: int) -> list[Path]:
    """The older ones of a name that are there, the newest first; they may be damaged."""
    target = _target(folder)
    names = [_old(target), *(_older(target, age) for age in range(1, older + 1))]
    return [path for path in names if (path / _MANIFEST).is_file()]


def checkpoint_exists(folder: Path) -> bool:
    """Whether ``load_checkpoint`` would find something to read (which may still be damaged)."""
    target = _target(folder)
    if target.is_file():
        return target.suffix == SUFFIX
    return any((path / _MANIFEST).is_file() for path in (target, _old(target)))


def set_aside(folder: Path) -> None:
    """Rename what has a checkpoint's name and is none, or a damaged one, to ``NAME.damaged``.

    Raises:
        CheckpointError: It cannot be renamed.
    """
    target = _target(folder)
    damaged = target.with_name(f"{target.name}.damaged")
    try:
        if os.path.lexists(target):
            shutil.rmtree(damaged, ignore_errors=True)
            os.rename(target, damaged)
    except OSError as error:
        raise _unwritable(folder, error) from error


@contextmanager
def restoring(folder: Path) -> Iterator[None]:
    """Turn whatever a state that does not fit raises into a CheckpointError of one line."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # a forged state reaches code that no writer's state reaches
        kind = "" if isinstance(error, ValueError) else f"does not fit: {type(error).__name__}: "
        raise CheckpointError(f"{folder}: {kind}{one_line(error):.500}") from error


def require_replaceable(folder: Path) -> None:
    """Raise CheckpointError if what has a checkpoint's name is something that is never replaced."""
    try:
        _refuse_foreign(_target(folder))
    except OSError as error:
        raise _unwritable(folder, error) from error


def _target(folder: Path) -> Path:
    """Where a checkpoint lies: an absolute path that is no symbolic link."""
    target = os.path.abspath(folder)
    return Path(os.path.realpath(target) if os.path.islink(target) else target)


def _read_current(target: Path) -> tuple[Path, dict[str, bytes]]:
    """A checkpoint's folder and verified files, read again if a writer replaced it meanwhile."""
    for _ in range(_ATTEMPTS - 1):
        present, stamp = _present(target), _stamp(target)
        try:
            return present, _read_verified(present)
        except CheckpointError:
            if _stamp(target) == stamp:
                raise
    present = _present(target)
    return present, _read_verified(present)


def _present(target: Path) -> Path:
    alone = not os.path.lexists(target) and os.path.lexists(_old(target))
    return _old(target) if alone else target


def _stamp(target: Path) -> tuple[int, int] | None:
    """Identity and time of the manifest, which a newer checkpoint changes; None without one."""
    try:
        manifest = (target / _MANIFEST).stat()
    except OSError:
        return None
    return manifest.st_ino, manifest.st_mtime_ns


@contextmanager
def _sound(path: Path) -> Iterator[None]:
    """Turn whatever a file that no writer wrote may raise into a CheckpointError."""
    try:
        yield
    except Exception as error:
        raise _bad(path, "not valid") from error


def _bad(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: {why}; the checkpoint is damaged or not from this program")


def _unwritable(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{folder}: cannot write the checkpoint: {reason(error)}")


def _old(target: Path) -> Path:
    return target.parent / f"{target.name}.old"


def _older(target: Path, age: int) -> Path:
    return target.parent / f"{target.name}-{age}"


def _refuse_foreign(target: Path) -> None:
    """Never replace a folder that is not a checkpoint."""
    if not os.path.lexists(target) or (target / _MANIFEST).is_file():
        return
    if not target.is_dir() or any(target.iterdir()):
        raise OSError(None, "something that is not a checkpoint has this name")


def _sweep(target: Path) -> None:
    """Remove what killed writers left (one writer per checkpoint name is assumed)."""
    stale = re.compile(re.escape(target.name) + r"\.tmp-[0-9a-f]{8}")
    for path in target.parent.iterdir():
        if stale.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _swap(temporary: Path, target: Path) -> None:
    """Put the new one in its place, and the one that was there aside."""
    old = _old(target)
    if not os.path.lexists(target):
        os.rename(temporary, target)
    else:
        os.rename(target, old)
        try:
            os.rename(temporary, target)
        except BaseException:
            os.rename(old, target)
            raise
    sync_folder(target.parent)


def _finish_shift(target: Path, older: int) -> None:
    """Give what stands aside the first of the older names, moving others on; the last one goes.

    Nothing is done before there is a target, without which what stands aside is the newest.
    """
    old = _old(target)
    if not (os.path.lexists(target) and os.path.lexists(old)):
        return
    names = [_older(target, age) for age in range(1, older + 1)]
    free = next((place for place, path in enumerate(names) if not os.path.lexists(path)), older)
    if free == older:  # the last one goes, under a name that the next writer sweeps
        gone = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
        os.rename(names[-1] if names else old, gone)
        shutil.rmtree(gone, ignore_errors=True)
    for path, following in reversed(list(pairwise([old, *names[: free + 1]]))):
        os.rename(path, following)


def _encode_files(
    target: Path, state: Mapping[str, object], meta: Mapping[str, object]
) -> dict[str, bytes]:
    described, misplaced = encode(meta, "meta", indent=1)
    if misplaced:
        raise TypeError(f"{min(misplaced)}: meta cannot hold tensors or arrays")
    tree, tensors = encode(state, "state")
    files = {_TENSORS: encode_tensors(tensors), _TREE: tree, _META: described + b"\n"}
    for name, data in files.items():
        if len(data) > _CAPS[name]:
            raise CheckpointError(f"{target / name}: {len(data)} bytes; at most {_CAPS[name]} fit")
    files[_MANIFEST] = _manifest(files, VERSION)
    return files


def _manifest(files: Mapping[str, bytes], version: int) -> bytes:
    """The one accepted spelling of a manifest of the three content files."""
    entries = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    content = {"format": FORMAT, "version": version, "files": entries}
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _read_verified(target: Path) -> dict[str, bytes]:
    """The content files of a folder, checked against the manifest before anything is parsed."""
    manifest, version = _read_manifest(target)
    files = {name: _read(target / name) for name in (_TENSORS, _TREE, _META)}
    return _verified(target, files, manifest, version)


def _read_file(target: Path) -> dict[str, bytes]:
    """The content files in one file, checked likewise."""
    try:
        files = unpacked(target, _CAPS)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot read the checkpoint: {reason(error)}") from error
    except Exception as error:  # whatever zipfile makes of a damaged or hostile file
        why = str(error) if type(error) is ValueError else "not a sound zip file"
        raise _bad(target, why) from error
    manifest = files.pop(_MANIFEST)
    version = _check_manifest(target / _MANIFEST, manifest)
    return _verified(target, files, manifest, version)


def _save_file(target: Path, files: Mapping[str, bytes]) -> None:
    """Write one file, replacing an older checkpoint of the name and nothing else."""
    try:
        if os.path.lexists(target) and not is_packed(target, _CAPS):
            raise OSError(None, "something that is not a checkpoint has this name")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, packed(files))
    except ValueError as error:
        raise CheckpointError(f"{target}: {error}") from error
    except OSError as error:
        raise _unwritable(target, error) from error


def _verified(
    target: Path, files: dict[str, bytes], manifest: bytes, version: int
) -> dict[str, bytes]:
    if _manifest(files, version) != manifest:
        raise _bad(target, "a file differs from its size or SHA-256 in manifest.json")
    return files


def _read_manifest(target: Path) -> tuple[bytes, int]:
    """The manifest of a folder, of which format and version are checked alone, and the version."""
    if not target.is_dir():
        raise CheckpointError(f"{target}: no checkpoint here")
    data = _read(target / _MANIFEST)
    return data, _check_manifest(target / _MANIFEST, data)


def _check_manifest(path: Path, data: bytes) -> int:
    """The version; refuses manifests of other formats or of unknown versions."""
    with _sound(path):
        content = parse_json(data)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _bad(path, "not a checkpoint manifest")
    version = content.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        newer = type(version) is int and version > VERSION
        raise CheckpointError(
            f"{path}: format version {str(version)[:20]!r} is {'newer' if newer else 'unknown'};"
            f" this program reads 1 to {VERSION}"
        )
    return version


def _read(path: Path) -> bytes:
    try:
        return read_limited(path, _CAPS[path.name])
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the checkpoint: {reason(error)}") from error
