"""The folder of a run: the names of its files, its configuration, its lock and the versions."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acktr.config import Config, ConfigError, from_dict, refuse_imports
from acktr.files import is_label, read_limited, read_object, reason, safe_name, write_atomic
from acktr.runs.tables import read_table

if sys.platform != "win32":
    import fcntl

KEPT = 3
"""Checkpoints of the latest steps that a run keeps: last, last-1 and last-2."""

FORMER_TOTAL = "former_total_timesteps"
"""Key in the sessions of versions.json: the steps of the whole run before one that has others."""

INSTEAD = "continue a run with --resume PATH or choose another --run-dir or --seed"
"""What to do where there is a run already, on the command line."""

_STALE = re.compile(r"\..+\.tmp-[0-9a-f]{8}")
_COMMAND_CAP = 1 << 20
_FAULT_CAP = 1 << 16
_PACKAGES = ("acktr", "torch", "gymnasium", "ale-py", "mujoco", "numpy")


class RunError(RuntimeError):
    """A run folder that cannot be created, opened or read; the message is one line."""


class RunFolder:
    """The folder where a run keeps its files. TensorBoard events lie in the folder itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.versions = path / "versions.json"
        """Versions of Python and packages that the run was started with."""
        self.protocol = path / "protocol.json"
        """The preset, the device and the facts about the environment."""
        self.command = path / "command.txt"
        """The command line, one line per start of the run."""
        self.monitor = path / "monitor.csv"
        """One row per episode."""
        self.progress = path / "progress.csv"
        """One row per update."""
        self.evaluations = path / "eval.csv"
        """One row per evaluation."""
        self.fault = path / "fault.log"
        """Tracebacks of what ended training, the latest last."""
        self.curve = path / "curve.png"
        self.last = path / "checkpoints" / "last"
        """The latest checkpoint; the ones before it are beside it, last-1 and last-2."""
        self.best = path / "checkpoints" / "best"
        """The checkpoint with the best evaluation."""

    @classmethod
    def create(cls, path: Path, instead: str = INSTEAD) -> RunFolder:
        """Make the folder of a new run; an empty one may exist, or one of an :attr:`unborn` run.

        Args:
            path: The folder.
            instead: What to do if it is another run's.

        Raises:
            RunError: if it holds something else already or cannot be made.
        """
        folder = cls(path)
        folder.require_new(instead)
        try:
            path.mkdir(parents=True, exist_ok=True)
            for entry in path.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            (path / "checkpoints").mkdir()
        except OSError as error:
            raise _uncreatable(path, error) from error
        return folder

    def require_new(self, instead: str = INSTEAD) -> None:
        """Raise RunError if :meth:`create` would not make the folder, as it holds something."""
        try:
            if self.path.is_dir() and any(self.path.iterdir()) and not self.unborn:
                held = "already holds a run" if self.config.exists() else "is not empty"
                raise RunError(f"{self.path} {held}; {instead}")
        except OSError as error:
            raise _uncreatable(self.path, error) from error

    @property
    def unborn(self) -> bool:
        """Whether there is no more than what a run leaves that is killed before it is saved.

        That is some of the files that a start writes, and no row in any of them.
        """
        tables = (self.monitor, self.progress, self.evaluations)
        named = {self.config, self.versions, self.protocol, self.command, *tables}
        checkpoints = self.path / "checkpoints"
        for path in self.path.iterdir():
            if path.is_symlink() or path.is_dir() != (path == checkpoints):
                return False
            parts = path.iterdir() if path == checkpoints else ()
            if not all(_is_temporary(part, self.last.name) for part in parts):
                return False
            temporary = any(_is_temporary(path, f".{each.name}") for each in named)
            events = path.name.startswith("events.out.tfevents.")
            if not (path in named or path == checkpoints or temporary or events):
                return False
        return not any(map(_has_rows, tables))

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing run's folder.

        Raises:
            RunError: if there is no config.json in it.
        """
        if not (path / "config.json").is_file():
            why = "it has no config.json" if path.is_dir() else "there is no such folder"
            raise RunError(f"{path}: not a run folder ({why})")
        return cls(path)

    def write_config(self, config: Mapping[str, object]) -> None:
        """Write config.json. Raises RunError if that fails."""
        self.write_json(self.config, config)

    def write_json(self, path: Path, values: Mapping[str, object]) -> None:
        """Write one of the JSON files. Raises RunError if that fails."""
        _write(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())

    def write_command(self, argv: Sequence[str]) -> None:
        """Add a command line to command.txt. Raises RunError if that fails."""
        try:
            old = read_limited(self.command, _COMMAND_CAP) if self.command.exists() else b""
        except OSError as error:
            raise RunError(f"{self.command}: cannot read: {reason(error)}") from error
        _write(self.command, old + shlex.join(argv).encode("utf-8", "surrogateescape") + b"\n")

    def write_fault(self, text: str) -> bool:
        """Add an error to fault.log, of which the end is kept; whether that succeeded."""
        entry = text.encode("utf-8", "replace")[-_FAULT_CAP // 4 :] + b"\n"
        try:
            old = self.fault.read_bytes() if self.fault.exists() else b""
            write_atomic(self.fault, (old + entry)[-_FAULT_CAP:])
        except OSError:
            return False
        return True

    def read_config(self) -> dict[str, Any]:
        """Read config.json: a JSON object whose contents are not checked.

        Raises:
            RunError: if it cannot be read, is larger than 1 MiB or is no JSON object.
        """
        try:
            return read_object(self.config)
        except ValueError as error:
            raise RunError(str(error)) from error

    def name_in(self, config: Mapping[str, object], key: str) -> str:
        """A name in what config.json holds.

        Raises:
            ValueError: if it is no printable text of 1 to 100 characters.
        """
        value = config.get(key)
        if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= 100:
            raise ValueError(f"{self.config}: {key} must be a printable name")
        return value

    def last_evaluation(self) -> int:
        """Steps of the last evaluation in eval.csv; 0 without one that can be read."""
        try:
            steps = [int(row["timesteps"]) for row in read_table(self.evaluations).rows]
        except (OSError, ValueError, KeyError):
            return 0
        return max(steps, default=0)

    def evaluated(self, timesteps: int) -> float | None:
        """Mean return of the evaluation in eval.csv at so many steps; None if there is none."""
        try:
            rows = read_table(self.evaluations).rows
            returns = [row["returns"] for row in rows if int(row["timesteps"]) == timesteps][-1]
            mean = float(np.mean([float(value) for value in returns.split(";")]))
        except (OSError, ValueError, KeyError, IndexError):
            return None
        return mean if math.isfinite(mean) else None

    def sweep(self) -> None:
        """Remove what a killed writer of one of the files left."""
        with suppress(OSError):
            for path in self.path.iterdir():
                if _STALE.fullmatch(path.name):
                    path.unlink()


def run_path(run_dir: Path, config: Config, label: str | None = None) -> Path:
    """RUN_DIR/ENV/LABEL/seedN; the label is the algorithm if None.

    Characters of the environment that are not for file names are replaced by ``_``.

    Raises:
        ConfigError: The label is not the name of a folder.
    """
    name = config.algo if label is None else label
    if not is_label(name):
        raise ConfigError(
            f"label must be at most 80 letters, digits, '.', '_' and '-', with a letter or digit"
            f" first, got {name!r:.100}"
        )
    return run_dir / safe_name(config.env) / name / f"seed{config.seed}"


def stored_config(path: Path) -> Config:
    """The checked configuration in a run's config.json.

    Raises:
        RunError: There is no run, or its configuration cannot be used.
    """
    folder = RunFolder.open(path)
    try:
        config = from_dict(folder.read_config())
        refuse_imports(config)
    except ConfigError as error:
        raise RunError(f"{folder.config}: {error}") from error
    return config


@contextmanager
def new_folder(path: Path, held: ExitStack, instead: str = INSTEAD) -> Iterator[RunFolder]:
    """A new run's folder that is removed again, with parents made for it, if anything fails.

    Args:
        path: The folder.
        held: Where its lock is entered (:func:`locked`), which outlasts this.
        instead: As :meth:`RunFolder.create` has it.

    Raises:
        RunError: As :meth:`RunFolder.create`, or another process starts the same run.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    created = False
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _uncreatable(path, error) from error
        held.enter_context(locked(RunFolder(path)))  # before anything in it is changed
        folder = RunFolder.create(path, instead)
        created = True
        yield folder
    except BaseException:
        if created:
            shutil.rmtree(path, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()  # empty ones only
        raise


def _uncreatable(path: Path, error: OSError) -> RunError:
    return RunError(f"{path}: cannot create the run folder: {reason(error)}")


def _is_temporary(path: Path, name: str) -> bool:
    """Whether a path is that of a file or checkpoint with a name, half-written."""
    return re.fullmatch(re.escape(name) + r"\.tmp-[0-9a-f]{8}", path.name) is not None


def _has_rows(path: Path) -> bool:
    """Whether there is more in a CSV file than comments and a header line, or cannot be known."""
    try:
        lines = read_limited(path, _COMMAND_CAP).splitlines()
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return sum(not line.startswith(b"#") for line in lines) > 1


@contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Keep other processes from training the same run, where the system can.

    Raises:
        RunError: Another process trains it, or the folder cannot be opened.
    """
    if sys.platform == "win32":
        yield
        return
    try:
        handle = os.open(folder.path, os.O_RDONLY)
    except OSError as error:
        raise RunError(f"{folder.path}: cannot open: {reason(error)}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder.path}: another process is training this run") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def versions() -> dict[str, str | int | None]:
    """Versions of Python, the packages that matter and the source; None for what is missing."""
    numbers: dict[str, str | int | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            numbers[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            numbers[package] = None
    numbers["platform"] = platform.platform()
    numbers["cpu_count"] = os.cpu_count()
    numbers["torch_threads"] = torch.get_num_threads()
    numbers["git_commit"] = _git_commit(Path(__file__).resolve().parents[2])
    return numbers


def _git_commit(source: Path) -> str | None:
    """The commit of a source checkout, with -dirty if it was edited."""
    if not (source / ".git").exists():
        return None
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--exclude", "*"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomic(path, data)
    except OSError as error:
        raise RunError(f"{path}: cannot write: {reason(error)}") from error
