"""What a checkpoint keeps, and which ones are refused."""

from __future__ import annotations

import json
import math
import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from acktr.runs.checkpoint import (
    CheckpointError,
    checkpoint_exists,
    load_checkpoint,
    save_checkpoint,
)

FILES = ("state.safetensors", "state.json", "meta.json", "manifest.json")
ROOT = Path(__file__).resolve().parents[2]


def same(a: Any, b: Any) -> bool:
    """Equal in type, structure and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        a_bytes = a.detach().contiguous().reshape(-1).view(torch.uint8)
        b_bytes = b.contiguous().reshape(-1).view(torch.uint8)
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a_bytes, b_bytes)
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    if isinstance(a, float):
        return bool(a.hex() == b.hex())
    return bool(a == b)


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 9))
    values = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype)


arrays = hnp.arrays(
    st.sampled_from(["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)
text = st.text(st.characters(), max_size=6) | st.sampled_from(
    ["__metadata__", "a/b", "", "\ud800", "%2F", "state/a", "a$tensor"]
)
keys = text.filter(lambda key: not key.startswith("$"))
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text
trees = st.recursive(
    scalars | tensors() | arrays,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(state=st.dictionaries(keys, trees, max_size=4), meta=st.dictionaries(keys, scalars))
def test_round_trip(tmp_path: Path, state: dict[str, Any], meta: dict[str, Any]) -> None:
    folder = tmp_path / "last"
    save_checkpoint(folder, state, meta)
    first = {name: (folder / name).read_bytes() for name in FILES}
    loaded_state, loaded_meta = load_checkpoint(folder)
    assert same(state, loaded_state)
    assert same(meta, loaded_meta)
    save_checkpoint(folder, loaded_state, loaded_meta)
    assert first == {name: (folder / name).read_bytes() for name in FILES}
    assert os.listdir(tmp_path) == ["last"]


def small() -> tuple[dict[str, Any], dict[str, Any]]:
    state = {
        "w": torch.arange(3.0),
        "n": np.arange(2),
        "big": 2**127 + 1,
        "lr": math.inf,
        "t": [1, 2],
    }
    return state, {"timesteps": 3, "env": "CartPole-v1"}


def test_views_parameters_and_numpy_scalars(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tied = torch.nn.Parameter(base)
    state = {"a": base.T, "b": base[:, 1], "c": tied, "d": tied, "e": np.float64(0.1)}
    save_checkpoint(tmp_path / "last", state | {"f": np.arange(4, dtype=">i4")[::2]}, {})
    loaded, _ = load_checkpoint(tmp_path / "last")
    assert torch.equal(loaded["a"], base.T)
    assert torch.equal(loaded["b"], base[:, 1])
    assert torch.equal(loaded["c"], base) and torch.equal(loaded["d"], base)
    assert type(loaded["c"]) is torch.Tensor and not loaded["c"].requires_grad
    assert type(loaded["e"]) is float and loaded["e"] == 0.1
    assert loaded["f"].tolist() == [0, 2] and loaded["f"].dtype == np.int32
    loaded["c"].add_(1)  # writable, and nothing else shares its memory
    assert torch.equal(loaded["d"], base)


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"a": {"b": {1, 2}}}, "state/a/b: a set"),
        ({"a": [object()]}, "state/a/0: a object"),
        ({"a": {1: 2}}, "state/a: key 1"),
        ({"a": {"$x": 2}}, "state/a: key '$x'"),
        ({"a": np.array(["x"])}, "state/a: an array of <U1"),
        ({"a": np.array([None])}, "state/a: an array of object"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "state/a: a torch.strided torch.complex64"),
        ({"a": torch.zeros(2).to_sparse()}, "state/a: a torch.sparse_coo"),
        ({"a": 1j}, "state/a: a complex"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path: Path, state: dict[str, Any], where: str) -> None:
    with pytest.raises(TypeError, match=re.escape(where)):
        save_checkpoint(tmp_path / "last", state, {})
    with pytest.raises(TypeError, match="meta/x: meta cannot hold"):
        save_checkpoint(tmp_path / "last", {}, {"x": torch.zeros(1)})
    assert os.listdir(tmp_path) == []


def refused(folder: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    save_checkpoint(folder, *small())
    for name in FILES:
        data = (folder / name).read_bytes()
        for length in range(len(data)):
            (folder / name).write_bytes(data[:length])
            refused(folder)
        (folder / name).write_bytes(data + b"\n")
        refused(folder)
        (folder / name).unlink()
        refused(folder)
        (folder / name).write_bytes(data)
    load_checkpoint(folder)


def test_every_bit_flip_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    save_checkpoint(folder, *small())
    for name in FILES:
        data = (folder / name).read_bytes()
        for position in range(len(data)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << (position % 8)
            (folder / name).write_bytes(damaged)
            refused(folder)
        (folder / name).write_bytes(data)
    load_checkpoint(folder)


def forge(folder: Path, **changed: bytes) -> None:
    """Replace files and write a manifest that agrees, as an author of a hostile file would."""
    import hashlib

    for name, data in changed.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        manifest["files"][name] = {"bytes": len(data), "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize(
    "tree",
    [
        b"[]",
        b"null",
        b"",
        b"{",
        b"\xff",
        b'{"a": {"$tensor": "state/missing"}}',
        b'{"a": {"$tensor": "state/w"}, "b": {"$tensor": "state/w"}}',
        b'{"a": {"$tensor": ["state/w"]}}',
        b'{"a": {"$array": 1}}',
        b'{"a": {"$what": 3}}',
        b'{"a": {"$tensor": "state/w", "b": 2}}',
        b'{"w": {"$tensor": "state/w"}}',
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' + b"9" * 10_000 + b"}",
    ],
)
def test_forged_trees_are_refused(tmp_path: Path, tree: bytes) -> None:
    folder = tmp_path / "last"
    save_checkpoint(folder, *small())
    forge(folder)
    load_checkpoint(folder)
    forge(folder, state__json=tree)
    refused(folder)


def test_forged_tensors_meta_and_manifest_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    save_checkpoint(folder, *small())
    good = {name: (folder / name).read_bytes() for name in FILES}
    for data in (
        b"",
        b"\xff" * 64,
        good["state.safetensors"][:-1],
        (1 << 40).to_bytes(8, "little"),
    ):
        forge(folder, state__safetensors=data)
        refused(folder)
    (folder / "state.safetensors").write_bytes(good["state.safetensors"])
    forge(folder, meta__json=b'{"hidden": {"$tuple": [1, 2]}}')  # as earlier versions wrote
    assert load_checkpoint(folder)[1] == {"hidden": [1, 2]}
    forge(folder, meta__json=b"[1]")
    refused(folder)
    (folder / "meta.json").write_bytes(good["meta.json"])
    for manifest in (b"[]", b"{}", b'{"format": "other"}', b"[" * 70_000):
        (folder / "manifest.json").write_bytes(manifest)
        refused(folder)
    (folder / "manifest.json").write_bytes(good["manifest.json"].replace(b"{", b"{ ", 1))
    refused(folder)


def test_unknown_version_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    save_checkpoint(folder, *small())
    manifest = folder / "manifest.json"
    good = manifest.read_text()
    for version, word in (
        ("3", "newer"),
        ("0", "unknown"),
        ("true", "unknown"),
        ("2.0", "unknown"),
    ):
        manifest.write_text(good.replace('"version": 2', f'"version": {version}'))
        said = f"format version '.*{version[0]}.*' is {word}; this program reads 1 to 2"
        with pytest.raises(CheckpointError, match="(?i)" + said):
            load_checkpoint(folder)


def test_foreign_things_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "missing")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder")
    (tmp_path / "folder" / "thesis.txt").write_text("x")
    for name in ("file", "folder"):
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            save_checkpoint(tmp_path / name, {}, {})
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "x"
    save_checkpoint(tmp_path / "last", *small())
    (tmp_path / "last" / "meta.json").unlink()
    os.mkfifo(tmp_path / "last" / "meta.json")
    refused(tmp_path / "last")


def test_a_symbolic_link_stays_one_and_its_target_is_replaced(tmp_path: Path) -> None:
    state, meta = small()
    save_checkpoint(tmp_path / "disk" / "there", state, meta)
    link = tmp_path / "last"
    link.symlink_to(tmp_path / "disk" / "there")
    for number in range(3):
        save_checkpoint(link, state, {"number": number})
        assert link.is_symlink() and checkpoint_exists(link)
        assert load_checkpoint(link)[1] == {"number": number}
        assert load_checkpoint(tmp_path / "disk" / "there")[1] == {"number": number}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "last"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["there"]


def test_a_checkpoint_that_is_replaced_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("acktr.runs.checkpoint")
    folder, original, read = tmp_path / "last", module._read_manifest, []
    save_checkpoint(folder, {"number": torch.tensor([0])}, {})

    def replaced(target: Path) -> Any:
        found = original(target)
        read.append(target)
        if len(read) < 3:
            save_checkpoint(folder, {"number": torch.tensor([len(read)])}, {})
        return found

    monkeypatch.setattr(module, "_read_manifest", replaced)
    assert load_checkpoint(folder)[0]["number"].tolist() == [2]
    assert len(read) == 3


def test_one_that_is_replaced_all_the_time_is_read_five_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("acktr.runs.checkpoint")
    folder, read = tmp_path / "last", []
    save_checkpoint(folder, {}, {})

    def damaged(target: Path) -> Any:
        read.append(target)
        save_checkpoint(folder, {"number": len(read)}, {})
        raise CheckpointError("damaged")

    monkeypatch.setattr(module, "_read_verified", damaged)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(folder)
    assert read == [folder] * 5


def test_the_root_is_no_checkpoint() -> None:
    assert not checkpoint_exists(Path("/"))


def test_size_caps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "last"
    save_checkpoint(folder, *small())
    monkeypatch.setitem(import_module("acktr.runs.checkpoint")._CAPS, "state.json", 10)
    refused(folder)
    with pytest.raises(CheckpointError, match=r"state\.json: \d+ bytes; at most 10 fit"):
        save_checkpoint(folder, *small())


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(Path("last"), *small())
    assert not checkpoint_exists(Path("best"))
    assert load_checkpoint(Path("last"))[1] == small()[1]


def test_nothing_in_the_packages_can_run_code_from_files() -> None:
    forbidden = re.compile(
        r"\b(pickle|cPickle|cloudpickle|dill|joblib|marshal|shelve)\b|(?<!\.)torch\.(load|save)\b"
        r"|allow_pickle\s*=\s*True|(?<![\w.])(eval|exec)\(|yaml\.load\b"
    )
    assert forbidden.search("torch.load(x)") and forbidden.search("import pickle")
    sources = [path for package in ("acktr", "envs") for path in (ROOT / package).rglob("*.py")]
    assert len(sources) > 3
    found = [
        f"{path.name}:{number}"
        for path in sources
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if forbidden.search(line)
    ]
    assert found == []
