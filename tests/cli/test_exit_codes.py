"""The table of exit codes in the README; what brings them about is tested where it happens."""

from __future__ import annotations

import errno
import io
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from acktr.cli import commands
from acktr.cli.launch import RANK_LOST, ProcessesFailed, _explained
from acktr.cli.main import main
from acktr.compare.comparison import RunsFailed
from acktr.config import ConfigError
from acktr.envs import EnvError, EnvFault
from acktr.interrupts import STOPPED, Stopped
from acktr.runs.checkpoint import CheckpointError
from acktr.runs.folder import RunError
from acktr.runs.session import TrainingFault
from tests.tools.command_line import ROOT, call, environment

CAUSES: list[tuple[int, BaseException | None]] = [
    (0, None),
    (1, RunsFailed("one of two")),
    *((2, kind("no")) for kind in (ConfigError, EnvError, RunError, CheckpointError)),
    (2, PermissionError(13, "Permission denied", "a file")),
    (70, TrainingFault("broke down", environment=False)),
    *((STOPPED[number], Stopped(number)) for number in STOPPED),
    (76, TrainingFault("failed", environment=True)),
    (76, EnvFault("failed")),
    (141, BrokenPipeError()),
]


def doing(cause: BaseException | None) -> Callable[..., str]:
    def run(*_: object) -> str:
        if cause is not None:
            raise cause
        return "done"

    return run


@pytest.mark.parametrize(("code", "cause"), CAUSES, ids=lambda value: repr(value)[:40])
def test_cause_has_its_code(
    code: int,
    cause: BaseException | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("acktr.cli.main._discard", lambda stream: None)  # pytest's own
    monkeypatch.setitem(commands.COMMANDS, "eval", doing(cause))
    found, out, err = call(capsys, "eval", "run")
    assert found == code
    assert out == ("done\n" if code == 0 else "")
    assert err.count("\n") == (0 if code in (0, 141) else 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("words", ["foo", "train --foo"])
def test_codes_stay_where_nobody_reads_standard_error(words: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "acktr", *words.split()],
            env=environment(),
            stderr=full,
            check=False,
        )
    assert done.returncode == 2


@pytest.mark.parametrize(("code", "cause"), CAUSES[1:-1], ids=lambda value: repr(value)[:40])
def test_causes_without_standard_error(
    code: int, cause: BaseException | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("acktr.cli.main._discard", lambda stream: None)  # pytest's own
    monkeypatch.setitem(commands.COMMANDS, "eval", doing(cause))
    monkeypatch.setattr("sys.stderr", Gone())
    assert main(["eval", "run"]) == code


@pytest.mark.parametrize("code", [0, 2, 76, RANK_LOST])
def test_the_first_of_several_processes_gives_its_code(
    code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has said why itself."""

    def launch(*_: object) -> None:
        if code:
            raise SystemExit(code)

    monkeypatch.setattr(commands, "launch", launch)
    words = ("train", "--env", "CartPole-v1", "--nproc", "2")
    assert call(capsys, *words) == (code, "", "")


def test_a_process_that_was_killed_is_named_with_what_is_left(tmp_path: Path) -> None:
    """Also where the others, whom the agent ended, come first."""
    failures = {
        0: SimpleNamespace(exitcode=RANK_LOST, timestamp=2),
        1: SimpleNamespace(exitcode=-signal.SIGKILL, timestamp=1),
    }
    good = tmp_path / "last"
    for kept in ("there is no checkpoint yet", f"last good checkpoint: {good}"):
        error = _explained(failures, 2, tmp_path, good)
        assert str(error) == f"process 1 of 2 was killed by SIGKILL; {kept}"
        assert isinstance(error, ProcessesFailed) and error.code == RANK_LOST
        good.mkdir(exist_ok=True)


def test_table_is_complete() -> None:
    text = (ROOT / "acktr/cli/README.md").read_text()
    section = text[text.index("## Exit codes") : text.index("## Several processes")]
    listed = [int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)]
    assert listed == sorted({code for code, _ in CAUSES} | {RANK_LOST})  # of test_processes.py
    for number, code in STOPPED.items():
        (row,) = [row for row in section.splitlines() if row.startswith(f"| {code} |")]
        assert signal.Signals(number).name in row
