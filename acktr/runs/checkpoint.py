"""Checkpoints: a folder, or one file, of tensors and JSON, written atomically and verified.

A checkpoint holds ``state.safetensors`` (tensors and arrays by path in the tree), ``state.json``
(the tree with everything else), ``meta.json`` and ``manifest.json`` (format version, size and
SHA-256 of the others). Reading one never runs code. The hashes guard against damage, not against
an author who recomputes them; what such an author can do is limited to wrong numbers.

``save_checkpoint`` writes a complete ``NAME.tmp-XXXXXXXX`` beside the target, renames an existing
``NAME`` to ``NAME.old``, the new one to ``NAME``, and removes ``NAME.old``. Whenever a crash stops
it, ``NAME`` or, if that name is missing, ``NAME.old`` is a complete checkpoint.

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
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import safetensors.torch
import torch

from acktr.envs import one_line
from acktr.files import read_limited, reason, sync_folder, write_atomic, write_synced
from acktr.runs.single_file import SUFFIX, is_packed, packed, unpacked

FORMAT = "acktr-checkpoint"
VERSION = 1

_TENSORS, _TREE, _META, _MANIFEST = "state.safetensors", "state.json", "meta.json", "manifest.json"
_CAPS = {_TENSORS: 4 << 30, _TREE: 64 << 20, _META: 4 << 20, _MANIFEST: 1 << 16}
_HEADER_CAP = 16 << 20
_ATTEMPTS = 5
_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool}
    | {torch.int64, torch.int32, torch.int16, torch.int8}
    | {torch.uint64, torch.uint32, torch.uint16, torch.uint8}
)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; one line naming the file and the reason."""


def save_checkpoint(folder: Path, state: Mapping[str, object], meta: Mapping[str, object]) -> None:
    """Write a checkpoint, replacing an older one of the same name (behind a symbolic link: there).

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
        _swap(temporary, target)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
        tensors = _decode_tensors(files[_TENSORS])
    with _sound(target / _TREE):
        state = _decode_object(files[_TREE], tensors)
        if tensors:
            raise ValueError("tensors left over")
    with _sound(target / _META):
        meta = _decode_object(files[_META], {})
    return state, meta


def checkpoint_exists(folder: Path) -> bool:
    """Whether ``load_checkpoint`` would find something to read (which may still be damaged)."""
    target = _target(folder)
    if target.is_file():
        return target.suffix == SUFFIX
    return any((path / _MANIFEST).is_file() for path in (target, _old(target)))


@contextmanager
def restoring(folder: Path) -> Iterator[None]:
    """Turn whatever a state that does not fit raises into a CheckpointError of one line."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: {one_line(error)}") from error


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
    old = _old(target)
    if not os.path.lexists(target):
        os.rename(temporary, target)
    else:
        if os.path.lexists(old):
            shutil.rmtree(old)
        os.rename(target, old)
        try:
            os.rename(temporary, target)
        except BaseException:
            os.rename(old, target)
            raise
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _encode_files(
    target: Path, state: Mapping[str, object], meta: Mapping[str, object]
) -> dict[str, bytes]:
    tensors: dict[str, torch.Tensor] = {}
    described = _encode(meta, "meta", tensors)
    if tensors:
        raise TypeError(f"{min(tensors)}: meta cannot hold tensors or arrays")
    tree = _encode(state, "state", tensors)
    files = {
        _TENSORS: safetensors.torch.save(tensors),
        _TREE: json.dumps(tree).encode(),
        _META: (json.dumps(described, indent=1) + "\n").encode(),
    }
    for name, data in files.items():
        if len(data) > _CAPS[name]:
            raise CheckpointError(f"{target / name}: {len(data)} bytes; at most {_CAPS[name]} fit")
    files[_MANIFEST] = _manifest(files)
    return files


def _manifest(files: Mapping[str, bytes]) -> bytes:
    """The one accepted spelling of a manifest of the three content files."""
    entries = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    content = {"format": FORMAT, "version": VERSION, "files": entries}
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _read_verified(target: Path) -> dict[str, bytes]:
    """The content files of a folder, checked against the manifest before anything is parsed."""
    manifest = _read_manifest(target)
    files = {name: _read(target / name) for name in (_TENSORS, _TREE, _META)}
    return _verified(target, files, manifest)


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
    _check_manifest(target / _MANIFEST, manifest)
    return _verified(target, files, manifest)


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


def _verified(target: Path, files: dict[str, bytes], manifest: bytes) -> dict[str, bytes]:
    if _manifest(files) != manifest:
        raise _bad(target, "a file differs from its size or SHA-256 in manifest.json")
    return files


def _read_manifest(target: Path) -> bytes:
    """The manifest of a folder, of which format and version are checked alone."""
    if not target.is_dir():
        raise CheckpointError(f"{target}: no checkpoint folder here")
    data = _read(target / _MANIFEST)
    _check_manifest(target / _MANIFEST, data)
    return data


def _check_manifest(path: Path, data: bytes) -> None:
    """Refuse manifests of other formats or versions."""
    with _sound(path):
        content = json.loads(data)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _bad(path, "not a checkpoint manifest")
    version = content.get("version")
    if type(version) is not int or version != VERSION:
        raise CheckpointError(
            f"{path}: format version {str(version)[:20]!r} is unknown; this program reads {VERSION}"
        )


def _read(path: Path) -> bytes:
    try:
        return read_limited(path, _CAPS[path.name])
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the checkpoint: {reason(error)}") from error


def _encode(node: object, path: str, tensors: dict[str, torch.Tensor]) -> object:
    """The tree as JSON values; where a tensor or array was stands the path that names it."""
    if isinstance(node, Mapping):
        for key in node:
            if type(key) is not str or key.startswith("$"):
                raise TypeError(f"{path}: key {key!r:.80} must be a str without $ at its beginning")
        # Quoted, so that the paths of two tensors never are the same.
        names = {key: quote(key, safe="", errors="surrogatepass") for key in node}
        return {key: _encode(node[key], f"{path}/{names[key]}", tensors) for key in node}
    if isinstance(node, list | tuple):
        return [_encode(item, f"{path}/{index}", tensors) for index, item in enumerate(node)]
    if isinstance(node, torch.Tensor):
        tensors[path] = _plain(node, path)
        return {"$tensor": path}
    if isinstance(node, np.ndarray):
        try:
            array = np.array(node, dtype=node.dtype.newbyteorder("="), order="C")
            tensors[path] = _plain(torch.from_numpy(array), path)
        except (TypeError, ValueError):
            raise TypeError(f"{path}: an array of {node.dtype} cannot be saved") from None
        return {"$array": path}
    value = node.item() if isinstance(node, np.bool_ | np.integer | np.floating) else node
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{path}: a {type(node).__name__} cannot be saved")


def _plain(tensor: torch.Tensor, path: str) -> torch.Tensor:
    """A contiguous CPU copy that shares memory with nothing."""
    if tensor.layout != torch.strided or tensor.dtype not in _DTYPES or tensor.is_meta:
        raise TypeError(f"{path}: a {tensor.layout} {tensor.dtype} tensor cannot be saved")
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _decode_tensors(data: bytes) -> dict[str, torch.Tensor]:
    if int.from_bytes(data[:8], "little") > _HEADER_CAP:
        raise ValueError("header too large")
    # Clones lie in torch's own aligned memory: products of unaligned ones may round differently.
    return {name: value.clone() for name, value in safetensors.torch.load(data).items()}


def _decode_object(data: bytes, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    tree = _decode(json.loads(data), tensors)
    if not isinstance(tree, dict):
        raise ValueError("state and meta are objects")
    return tree


def _decode(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Inverse of ``_encode``; takes what it uses out of ``tensors``, so nothing is used twice."""
    if isinstance(node, list):
        return [_decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    if node.keys() == {"$tensor"}:
        return tensors.pop(node["$tensor"])
    if node.keys() == {"$array"}:
        return tensors.pop(node["$array"]).numpy()
    if node.keys() == {"$tuple"}:  # as earlier versions wrote
        return _decode(node["$tuple"], tensors)
    if any(key.startswith("$") for key in node):
        raise ValueError("an unknown tag")
    return {key: _decode(value, tensors) for key, value in node.items()}
