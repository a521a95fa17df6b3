"""Damaged and forged checkpoints, and settings and command lines that make no sense.

Every function takes a ``random.Random``, so that a case is its seed. Damaged files are what a bad
disk leaves: the hashes do not fit. Forged ones are what an author makes who knows the format: they
do.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

Files = dict[str, bytes]
"""The four files of a checkpoint by name."""

TENSORS, TREE, META, MANIFEST = "state.safetensors", "state.json", "meta.json", "manifest.json"

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.0, -0.5, 1e308, -1e308, 5e-324),
    *(math.nan, math.inf, -math.inf, 2**31, 2**63, -(2**63) - 1, 2**200, 10**400),
    *("", "x", "auto", "nan", "\x1b[31m\n", "=cmd|' /C calc'!A0", "../../x", "é", "\ud800"),
    *("a" * 70_000, "os:system", [], {}, [[]], {"": 0}, [0] * 1000, {"a": {"b": [None]}}),
    *({"$tensor": "state/network/x"}, {"$array": 1}, {"$tuple": []}, {"$os": "rm"}),
)
"""Values that a file may have anywhere."""


def read(folder: Path) -> Files:
    """The files of a checkpoint."""
    return {name: (folder / name).read_bytes() for name in (TENSORS, TREE, META, MANIFEST)}


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace the files of a folder by these."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (TENSORS, TREE, META, MANIFEST):
        (folder / name).unlink(missing_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def damaged(files: Files, rng: random.Random) -> tuple[str, Files]:
    """What a bad disk leaves of a checkpoint, and a word for it."""
    name = rng.choice(sorted(files))
    changes: tuple[Callable[[bytes, random.Random], bytes], ...] = (
        *(_flipped, _cut, _zeroed, _lengthened, _repeated, _shuffled),
    )
    if rng.random() < 0.1:
        return f"{name} gone", {key: data for key, data in files.items() if key != name}
    if rng.random() < 0.1:
        other = rng.choice(sorted(set(files) - {name}))
        return f"{name} is {other}", {**files, name: files[other]}
    change = rng.choice(changes)
    return f"{name} {change.__name__.strip('_')}", {**files, name: change(files[name], rng)}


def forged(files: Files, rng: random.Random) -> tuple[str, Files]:
    """A checkpoint that its author changed, with the right hashes, and a word for it."""
    kind = rng.choice(["state", "state", "meta", "tensors", "tensors", "text", "names"])
    found = dict(files)
    if kind in ("state", "meta"):
        name = TREE if kind == "state" else META
        tree = mutated(json.loads(files[name]), rng)
        found[name] = json.dumps(tree).encode("utf-8", "surrogatepass")
    elif kind == "tensors":
        found[TENSORS] = _tensors(files[TENSORS], rng)
    elif kind == "text":
        name = rng.choice([TREE, META])
        found[name] = _text(files[name], rng)
    else:
        found = _moved(files, rng)
    return kind, signed(found, _manifest(rng))


def signed(files: Files, changes: Mapping[str, Any]) -> Files:
    """The files with a manifest of their sizes and hashes, in which something is replaced."""
    entries = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
        if name != MANIFEST
    }
    content = json.loads(files[MANIFEST]) | {"files": entries} | changes
    return {**files, MANIFEST: (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()}


def mutated(tree: Any, rng: random.Random) -> Any:
    """JSON values with one to three of them replaced, removed, added, renamed or exchanged."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = list(_places(tree))
        if not places:
            return rng.choice(HOSTILE)
        parent, key = rng.choice(places)
        what = rng.choice(["replace", "replace", "scale", "remove", "add", "rename", "exchange"])
        if what == "replace":
            parent[key] = copy.deepcopy(rng.choice(HOSTILE))
        elif what == "scale":
            parent[key] = _scaled(parent[key], rng)
        elif what == "remove":
            del parent[key]
        elif what == "exchange":
            other, place = rng.choice(places)
            parent[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(parent[key])
        elif isinstance(parent, list):
            parent.insert(key, copy.deepcopy(rng.choice(HOSTILE)))
        elif what == "add":
            parent[rng.choice(["x", "", "$tensor", "a" * 300])] = rng.choice(HOSTILE)
        else:
            parent[f"{key}_"] = parent.pop(key)
    return tree


def settings(values: Mapping[str, Any], rng: random.Random) -> bytes:
    """A file of settings that makes no sense, or just about."""
    if rng.random() < 0.7:
        return json.dumps(mutated(dict(values), rng)).encode("utf-8", "surrogatepass")
    return _text(json.dumps(values, indent=1).encode(), rng)


def command(words: list[str], rng: random.Random) -> list[str]:
    """A command line in which words are replaced, removed, repeated or exchanged."""
    words = list(words)
    for _ in range(rng.choice([1, 1, 2])):
        place = rng.randrange(len(words))
        what = rng.choice(["replace", "remove", "repeat", "exchange", "cut", "value"])
        if what == "replace":
            words[place] = str(_word(rng))
        elif what == "remove" and len(words) > 1:
            del words[place]
        elif what == "repeat":
            words.insert(place, words[place])
        elif what == "exchange":
            other = rng.randrange(len(words))
            words[place], words[other] = words[other], words[place]
        elif what == "cut":
            words[place] = words[place][: rng.randrange(1 + len(words[place]))]
        else:
            words[place] = f"{words[place].partition('=')[0]}={_word(rng)}"
    return words


def _word(rng: random.Random) -> str:
    chosen = rng.choice(HOSTILE)
    if isinstance(chosen, int) and abs(chosen) > 10**4000:
        return "1" + "0" * 5000
    text = chosen if isinstance(chosen, str) else json.dumps(chosen)
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def _flipped(data: bytes, rng: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _zeroed(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    count = min(rng.choice([1, 64, 512, 4096]), len(data) - start)
    return data[:start] + bytes(count) + data[start + count :]


def _lengthened(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice([b"\n", b"\0" * 512, b"}", data[:64]])


def _repeated(data: bytes, rng: random.Random) -> bytes:
    start, end = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
    return data[:end] + data[start:]


def _shuffled(data: bytes, rng: random.Random) -> bytes:
    half = rng.randrange(1, len(data))
    return data[half:] + data[:half]


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every value in a tree, as what holds it and its key there."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


def _scaled(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return rng.choice(HOSTILE)
    if isinstance(value, int):
        return rng.choice([value + 1, -value, value * 2**40, value * 10**30, value + 0.5])
    return rng.choice([-value, value * 1e300, value * 1e-300, math.nan, value + 1e-9])


def _text(data: bytes, rng: random.Random) -> bytes:
    """JSON that is none, or that a parser has trouble with."""
    kind = rng.randrange(7)
    if kind == 0:
        return _flipped(data, rng)
    if kind == 1:
        return _cut(data, rng)
    if kind == 2:  # deep
        depth = rng.choice([65, 500, 5_000, 100_000])
        left, right = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
        return b'{"x":' + left * depth + b"0" + right * depth + b"}"
    if kind == 3:  # many
        unit = rng.choice([b"[],", b"{},", b"0,", b'"",', b'{"a":0},'])
        return b'{"x":[' + unit * rng.choice([1_000] * 9 + [200_000]) + b"0]}"
    if kind == 4:  # a key twice
        return b'{"seed": 1,' + data.lstrip()[1:] if data.lstrip().startswith(b"{") else data
    if kind == 5:
        return rng.choice([b"", b"null", b"[]", b"0", b'"x"', b"{}", b"\xff\xfe{}", b"{}{}", b"\0"])
    return data.replace(rng.choice([b"0", b"1", b"null", b"true"]), b"9" * rng.choice([30, 6_000]))


def _tensors(data: bytes, rng: random.Random) -> bytes:
    tensors = safetensors.torch.load(data)
    names = sorted(tensors)
    if not names:
        return data
    name = rng.choice(names)
    what = rng.randrange(8)
    if what == 0:
        tensors[name] = (
            tensors[name].double()
            if tensors[name].dtype != torch.float64
            else (tensors[name].half())
        )
    elif what == 1:
        tensors[name] = torch.zeros(rng.choice([(), (0,), (1,), (3, 5), (2, 2, 2, 2), (10_000,)]))
    elif what == 2:
        del tensors[name]
    elif what == 3:
        tensors["state/extra"] = tensors.pop(name)
    elif what == 4:
        other = rng.choice(names)
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif what == 5:
        return (rng.choice([0, 7, 1 << 20, 1 << 40, 1 << 63])).to_bytes(8, "little") + data[8:]
    else:
        value = rng.choice([math.nan, math.inf, -math.inf, 3e38, -1.0, 0.0, 255.0])
        tensors[name] = _filled(tensors[name], value, rng)
    return bytes(safetensors.torch.save(tensors))


def _filled(tensor: torch.Tensor, value: float, rng: random.Random) -> torch.Tensor:
    """A value in one place or everywhere; for integers a number that they can hold."""
    tensor = tensor.clone()
    if not tensor.is_floating_point():
        value = 0.0 if not math.isfinite(value) else min(max(value, 0.0), 100.0)
    flat = tensor.view(-1)
    where = slice(None) if rng.random() < 0.5 or not flat.numel() else rng.randrange(flat.numel())
    flat[where] = value
    return tensor


def _moved(files: Files, rng: random.Random) -> Files:
    """Two tensors of the tree exchanged, or one used twice."""
    tree = json.loads(files[TREE])
    leaves = [place for place in _places(tree) if place[1] == "$tensor"]
    if len(leaves) > 1:
        (one, _), (other, _) = rng.sample(leaves, 2)
        if rng.random() < 0.7:
            one["$tensor"], other["$tensor"] = other["$tensor"], one["$tensor"]
        else:
            one["$tensor"] = other["$tensor"]
    return {**files, TREE: json.dumps(tree).encode()}


def _manifest(rng: random.Random) -> dict[str, Any]:
    """Seldom something else in the manifest than a writer puts there."""
    if rng.random() > 0.1:
        return {}
    key = rng.choice(["version", "version", "format", "files", "extra"])
    values = [value for value in HOSTILE if not isinstance(value, int) or abs(value) < 10**4000]
    return {key: rng.choice([*values, 1, 2, 3])}
