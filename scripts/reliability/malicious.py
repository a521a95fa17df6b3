"""Run folders made to run code or to write elsewhere when somebody uses them: nothing happens."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.reliability import corruption
from scripts.reliability.processes import Command
from scripts.reliability.trials import Trial

SOUND = Path(__file__).resolve().parents[2] / "tests" / "runs" / "formats" / "2"
"""A run with a checkpoint."""

_COMMANDS = (
    "eval run --episodes 1",
    "train --resume run --total-timesteps 192",
    "export run --out out.onnx",
    "plot run --out out.png",
    "report run --out out",
)
_CODES = (0, 2, 70, 76)
_MODULE = """\
from pathlib import Path
Path({mark!r}).touch()
def __getattr__(name):
    return print
"""
"""A module that leaves a mark when it is imported."""

Fixture = Callable[[Path, Path], None]
"""Changes a run folder so that a mark, a file, would be made."""


class _Touch:
    """What a pickle of it does is make a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._mark}",)


def _setting(name: str, value: Any) -> Fixture:
    """A setting, in config.json and in the checkpoint, whose hashes fit."""

    def change(run: Path, mark: Path) -> None:
        config = json.loads((run / "config.json").read_text())
        _put(config, name, value)
        (run / "config.json").write_text(json.dumps(config))
        last = run / "checkpoints" / "last"
        files = corruption.read(last)
        meta = json.loads(files[corruption.META])
        _put(meta["config"], name, value)
        _sign(last, files | {corruption.META: json.dumps(meta).encode()})

    return change


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        tree = tree[parent]
    tree[last] = value


def _sign(last: Path, files: corruption.Files) -> None:
    corruption.write(last, corruption.signed(files, {}))


def _content(name: str, make: Callable[[Path], bytes], signed: bool = True) -> Fixture:
    """A file of the checkpoint, or of the run, replaced."""

    def change(run: Path, mark: Path) -> None:
        last = run / "checkpoints" / "last"
        if not (last / name).exists():
            (run / name).write_bytes(make(mark))
            return
        files = corruption.read(last) | {name: make(mark)}
        if signed and name != corruption.MANIFEST:
            _sign(last, files)
        else:
            corruption.write(last, files)

    return change


def _torch(mark: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"state": _Touch(mark)}, file)
    return file.getvalue()


def _pickled(mark: Path) -> bytes:
    return pickle.dumps(_Touch(mark))


def _numpy(mark: Path) -> bytes:
    file = io.BytesIO()
    np.savez(file, state=np.array([_Touch(mark)], dtype=object))
    return file.getvalue()


def _yaml(mark: Path) -> bytes:
    return f'!!python/object/apply:os.system ["touch {mark}"]\n'.encode()


def _expression(mark: Path) -> bytes:
    return f"__import__('os').system('touch {mark}')".encode()


def _object(key: str) -> Callable[[Path], bytes]:
    """JSON that some libraries make objects of."""
    return lambda mark: json.dumps({key: "os.system", "args": [f"touch {mark}"]}).encode()


def _state(key: str, value: str) -> Fixture:
    """A leaf of the state's tree replaced."""

    def change(run: Path, mark: Path) -> None:
        last = run / "checkpoints" / "last"
        files = corruption.read(last)
        tree = json.loads(files[corruption.TREE])
        tree["timesteps"] = {key: value.format(mark=mark)}
        _sign(last, files | {corruption.TREE: json.dumps(tree).encode()})

    return change


def _packed(name: str, make: Callable[[Path], bytes], attributes: int = 0) -> Fixture:
    """The checkpoint as one zip file with a member more."""

    def change(run: Path, mark: Path) -> None:
        last = run / "checkpoints" / "last"
        files = corruption.read(last)
        shutil.rmtree(last)
        with zipfile.ZipFile(last, "w") as packed:
            for each, data in files.items():
                packed.writestr(each, data)
            info = zipfile.ZipInfo(name)
            info.external_attr = attributes << 16
            packed.writestr(info, make(mark))
        os.rename(last, run.parent / "run.zip")
        shutil.rmtree(run)
        os.rename(run.parent / "run.zip", run)

    return change


def _link(name: str) -> Fixture:
    """A file of the run that is a link to one outside, which writing would change."""

    def change(run: Path, mark: Path) -> None:
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(mark)

    return change


def _module(name: str) -> Fixture:
    """A module in the run folder that an import might find."""

    def change(run: Path, mark: Path) -> None:
        (run / name).write_text(_MODULE.format(mark=str(mark)))

    return change


def _spoken(name: str) -> Fixture:
    """A file whose lines a shell or a spreadsheet would run."""

    def change(run: Path, mark: Path) -> None:
        text = f"=cmd|'/C touch {mark}'!A0\n$(touch {mark})\n`touch {mark}`\n; touch {mark}\n"
        (run / name).write_text(text)

    return change


FIXTURES: dict[str, Fixture] = {
    "env of a module": _setting("env", "evil:CartPole-v1"),
    "env of a path": _setting("env", "../evil"),
    "env of a package": _setting("env", "evil.sub:X-v0"),
    "env of a class": _setting("env", "evil:Evil"),
    "env an expression": _setting("env", "__import__('evil')"),
    "wrapper": _setting("wrappers", ["evil:Wrapper"]),
    "wrapper of the system": _setting("wrappers", ["os:system"]),
    "network": _setting("network.custom", "evil:Net"),
    "network of two": _setting("network.custom", "evil:Actor,evil:Critic"),
    "entry point": _setting("env_kwargs", {"entry_point": "evil:Env"}),
    "vector entry point": _setting("env_kwargs", {"vector_entry_point": "evil:Env"}),
    "id in the arguments": _setting("env_kwargs", {"id": "evil:X-v0"}),
    "activation": _setting("network.activation", "evil.relu"),
    "algorithm": _setting("algo", "evil:Learner"),
    "device": _setting("device", "evil:0"),
    "recorded keys": _setting("record", ["__import__('evil')"]),
    "masks": _setting("masks", "evil:mask"),
    "torch pickle": _content(corruption.TENSORS, _torch),
    "pickle": _content(corruption.TENSORS, _pickled),
    "numpy objects": _content(corruption.TENSORS, _numpy),
    "pickle for a tree": _content(corruption.TREE, _pickled),
    "pickle for meta": _content(corruption.META, _pickled),
    "pickle for the manifest": _content(corruption.MANIFEST, _pickled),
    "pickle for config": _content("config.json", _pickled),
    "YAML for config": _content("config.json", _yaml),
    "YAML for meta": _content(corruption.META, _yaml),
    "YAML for a tree": _content(corruption.TREE, _yaml),
    "expression for config": _content("config.json", _expression),
    "expression for meta": _content(corruption.META, _expression),
    "py/object": _content(corruption.META, _object("py/object")),
    "py/reduce": _content("config.json", _object("py/reduce")),
    "__class__": _content("config.json", _object("__class__")),
    "_target_": _content("config.json", _object("_target_")),
    "state $os": _state("$os", "touch {mark}"),
    "state $tensor elsewhere": _state("$tensor", "../../../../{mark}"),
    "state $array": _state("$array", "cos\nsystem\n(S'touch {mark}'\ntR."),
    "zip, data of pickle": _packed("data", _pickled),
    "zip, member elsewhere": _packed("../../struck", lambda mark: b"x"),
    "zip, absolute member": _packed("/tmp/acktr-struck", lambda mark: b"x"),
    "zip, link": _packed("state.link", lambda mark: str(mark).encode(), 0o120777),
    "link for progress.csv": _link("progress.csv"),
    "link for curve.png": _link("curve.png"),
    "link for command.txt": _link("command.txt"),
    "module in the run": _module("gymnasium.py"),
    "sitecustomize in the run": _module("sitecustomize.py"),
    "command.txt": _spoken("command.txt"),
    "monitor.csv": _spoken("monitor.csv"),
    "eval.csv": _spoken("eval.csv"),
}
"""What is tried."""


def plan(count: int, scratch: Path) -> list[Trial]:
    """So many fixtures."""
    return [Trial(name, 0) for name in list(FIXTURES)[:: max(1, len(FIXTURES) // count)][:count]]


def used(trial: Trial, here: Path) -> str:
    """Use the run with every command: no mark is left, and there is no traceback."""
    mark = here / "struck"
    (here / "evil.py").write_text(_MODULE.format(mark=str(mark)))
    codes = []
    for words in _COMMANDS:
        shutil.rmtree(here / "run", ignore_errors=True)
        (here / "run").unlink(missing_ok=True)
        shutil.copytree(SOUND, here / "run")
        FIXTURES[trial.what](here / "run", mark)
        command = Command(words.split(), here, lambda: sys.path.insert(0, str(here)))
        codes.append(command.wait(120))
        assert not mark.exists(), f"acktr {words}: it was run, or a file outside was written"
        assert not Path("/tmp/acktr-struck").exists(), f"acktr {words}: written elsewhere"
        assert "Traceback" not in command.said, f"acktr {words}: {command.said[-500:]}"
        assert codes[-1] in _CODES, f"acktr {words}: exit code {codes[-1]}"
    return f"exit codes {' '.join(map(str, codes))}"
