"""The page of ``acktr doctor`` and its exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from acktr.cli import doctor
from acktr.doctor import Finding
from tests.tools.command_line import call, environment

LINE = re.compile(r"(ok|warning|problem) +\S.*|  +-> .*")


def test_here(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Tests need what training needs."""
    code, out, err = call(capsys, "doctor", "--run-dir", str(tmp_path / "runs"))
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].startswith("acktr ") and lines[-1].endswith(", problems: 0")
    assert len(lines) < 50 and all(LINE.fullmatch(line) for line in lines[1:-1])
    statuses = {line[9:24].strip(): line[:9].strip() for line in lines[1:-1]}
    for name in ("torch", "gymnasium", "Atari", "MuJoCo", "workers", "processor", "run folder"):
        assert statuses[name] in ("ok", "warning")
    assert re.search(r"cores for this process \d", out)
    assert not (tmp_path / "runs").exists()


def test_nothing_is_installed(tmp_path: Path) -> None:
    """Without a single package it says so; also to a stream that has no letters but ASCII's."""
    place = tmp_path / "für"
    place.mkdir()
    done = subprocess.run(
        [sys.executable, "-S", "-m", "acktr", "doctor", "--run-dir", str(place)],
        env=environment(PYTHONIOENCODING="ascii"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert re.search(r"^problem  torch +not installed\n +-> pip install \"torch", done.stdout, re.M)
    assert re.search(r"^warning  MuJoCo +not looked at, as it needs gymnasium", done.stdout, re.M)
    assert re.search(r"^ok       run folder .*f\\xfcr", done.stdout, re.M)
    assert re.search(r"^warning  text +output ascii", done.stdout, re.M)
    assert done.stderr.count("\n") == 1 and "acktr: problems here: torch, numpy" in done.stderr


class TestFound:
    @pytest.fixture(autouse=True)
    def found(self, monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
        found = [Finding("a", "ok", "good"), Finding("b", "warning", "so so", "do this")]

        def examine(run_dir: Path) -> Iterator[Finding]:
            assert run_dir == Path("runs")
            yield from found

        monkeypatch.setattr(doctor, "examine", examine)
        return found

    def test_warnings_are_allowed(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, err = call(capsys, "doctor")
        assert (code, err) == (0, "")
        assert out.splitlines()[1:] == [
            "ok       a                good",
            "warning  b                so so",
            "                          -> do this",
            "ok: 1, warnings: 1, problems: 0",
        ]

    def test_problems_are_not(
        self, capsys: pytest.CaptureFixture[str], found: list[Finding]
    ) -> None:
        found.append(Finding("c", "problem", "bad\x1b[2J\nvery", "that"))
        code, out, err = call(capsys, "doctor")
        assert (code, err) == (1, "acktr: problems here: c\n")
        assert "problem  c                bad\\x1b[2J very\n" in out

    def test_json(self, capsys: pytest.CaptureFixture[str], found: list[Finding]) -> None:
        code, out, _ = call(capsys, "doctor", "--json")
        assert code == 0
        assert json.loads(out) == {"ok": True, "findings": [vars(finding) for finding in found]}

    @pytest.mark.parametrize("words", [("--run",), ("x",), ("--jso",)])
    def test_bad_words(self, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
        code, out, err = call(capsys, "doctor", *words)
        assert (code, out) == (2, "")
        assert re.match("acktr( doctor)?: error: .*" + words[0], err.splitlines()[-1])

    def test_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = call(capsys, "doctor", "--help")
        assert code == 0 and "--run-dir" in out
