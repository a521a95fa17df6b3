"""The nightly tier starts, skips what is done, and counts what is wrong as wrong."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from acktr.cli import main as cli
from acktr.envs.errors import EnvFault
from acktr.rollout import Collector
from scripts.reliability import __main__ as reliability
from scripts.reliability import checkpoints, malicious, numerics, soak, splits
from scripts.reliability.failpoints import Watch
from scripts.reliability.fingerprints import differing, fingerprint
from scripts.reliability.processes import alive, descendants, gone
from scripts.reliability.trials import Outcome, Part, Trial, done, forked

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it is for Linux")


def deadly() -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


def slow() -> str:
    if os.fork() == 0:
        time.sleep(60)
    time.sleep(60)
    return "never"


def wrong() -> str:
    raise AssertionError("a\nline")


def work(trial: Trial, here: Path) -> str | Outcome:
    (here / "made").touch()
    if trial.what == "some":
        return Outcome("2 of 3", 2)
    deeds: dict[str, Callable[[], str]] = {"wrong": wrong, "deadly": deadly, "slow": slow}
    return deeds.get(trial.what, lambda: "well")()


def part(*names: str, limit: float = 20.0) -> Part:
    trials = [Trial(name, number, 3) for number, name in enumerate(names)]
    return Part("kills", "all", 9, lambda count, scratch: trials[:count], work, limit)


def test_trials_are_done_once_and_what_is_wrong_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reliability, "PARTS", (part("well", "wrong", "some", "deadly"),))
    asked = ["--out", str(tmp_path), "--parts", "kills", "--trials"]
    assert reliability.main([*asked, "1"]) == 0
    assert reliability.main([*asked, "4"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("kills 1/1") == 1 and captured.err.count("kills 3/3") == 1
    rows = done(tmp_path / "kills.csv")
    assert [row.outcome.wrong for row in rows] == [0, 1, 2, 1]
    assert [row.outcome.said for row in rows[:3]] == ["well", "AssertionError: a line", "2 of 3"]
    assert "| kills | all | 4 | 12 | 4 | 0.0 |" in captured.out
    assert "- kills, wrong, seed 1: AssertionError: a line" in captured.out
    scratch = tmp_path / "scratch" / "kills"
    assert sorted(path.name for path in scratch.iterdir()) == ["deadly-3", "some-2", "wrong-1"]
    before = (tmp_path / "kills.csv").read_bytes()
    assert reliability.main([*asked, "4"]) == 1  # still
    assert (tmp_path / "kills.csv").read_bytes() == before
    assert reliability.main(["--parts", "nothing"]) == 2


def test_what_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    before = descendants(os.getpid())
    outcome = forked(slow, tmp_path / "log", 0.3)
    assert (outcome.said, outcome.wrong) == ("not done in 0.3 s", 1)
    assert not gone(descendants(os.getpid()) - before, 2.0)
    assert os.getpid() in alive([os.getpid()])


def test_a_run_with_another_number_differs(tmp_path: Path) -> None:
    shutil.copytree(malicious.SOUND, tmp_path / "run")
    before = fingerprint(tmp_path / "run")
    assert fingerprint(malicious.SOUND) == before
    table = tmp_path / "run" / "progress.csv"
    lines = table.read_text().splitlines()
    lines[-1] = lines[-1].replace(lines[-1].split(",")[3], "0.125")
    table.write_text("\n".join(lines) + "\n")
    (tmp_path / "run" / ".progress.csv.tmp-12345678").touch()
    assert differing(before, fingerprint(tmp_path / "run")) == "files, progress"


def test_death_comes_at_the_call_that_is_asked_for(tmp_path: Path) -> None:
    def killed(point: str) -> list[str]:
        for path in tmp_path.iterdir():
            path.unlink()

        def write() -> str:
            Watch(tmp_path, point, 2).install()
            for name in "abc":
                (tmp_path / f"x.tmp-0000000{name}").touch()
                os.rename(tmp_path / f"x.tmp-0000000{name}", tmp_path / name)
            return "done"

        forked(write, tmp_path / "said.txt", 20.0)
        return sorted(path.name for path in tmp_path.iterdir() if path.name != "said.txt")

    assert killed("before rename x.tmp > b") == ["a", "b", "c"]  # there is no second one
    assert killed("") == ["a", "b", "c"]
    assert len(killed("before open x.tmp")) == 3  # Path.touch opens by a number

    def half() -> str:
        Watch(tmp_path, "half write a", 1).install()
        handle = os.open(tmp_path / "a", os.O_WRONLY | os.O_TRUNC)
        os.write(handle, b"12345678")
        return "done"

    assert forked(half, tmp_path / "said.txt", 20.0).wrong
    assert (tmp_path / "a").read_bytes() == b"1234"


def test_a_split_that_loses_an_episode_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial("CartPole-v1 a2c", 0)
    assert splits.split(trial, tmp_path).startswith("split at")
    load = Collector.load_state_dict

    def forget(self: Collector, state: dict[str, object]) -> None:
        load(self, {**state, "envs": None, "unsaved": "forgotten"})

    monkeypatch.setattr(Collector, "load_state_dict", forget)
    with pytest.raises((AssertionError, EnvFault)):
        splits.split(trial, tmp_path)


def test_hostile_factors_go_through_all_rungs(tmp_path: Path) -> None:
    outcome = numerics.hostile_factors(Trial("cases 0 to 59", 0, 60), tmp_path)
    assert outcome.wrong == 0, outcome.said
    for rung in ("as it is", "in float64", "with jitter", "kept its former"):
        assert rung in outcome.said


def test_nan_is_put_where_an_algorithm_has_it(tmp_path: Path) -> None:
    trials = numerics.plan_nan(200, tmp_path)
    kinds = {(kind, algo) for kind, _, algo in (trial.what.split() for trial in trials)}
    assert len(trials) == 200 and len({trial.name for trial in trials}) == 200
    assert {algo for kind, algo in kinds if kind == "factor"} == {"acktr"}
    assert {algo for kind, algo in kinds if kind == "curvature"} == {"trpo"}
    struck = next(trial for trial in trials if trial.what == "curvature CartPole-v1 trpo")
    assert numerics.injected(struck, tmp_path).endswith("exit code 0")


def test_a_file_that_is_being_written_is_no_leak() -> None:
    def rows(**late: float) -> list[dict[str, float]]:
        usual = {"rss_mb": 100.0, "files": 7.0, "threads": 2.0, "processes": 1.0}
        rows = [{"seconds": 60.0 * k, "steps": 500.0 * k, **usual} for k in range(40)]
        return [row | late if k >= 30 else row for k, row in enumerate(rows)]

    once = rows()
    once[35]["files"] = 8.0
    assert soak.judged(once, 600) == "memory +0.00% to 100 MB, speed +0.0%"
    for name, value in (("files", 8.0), ("threads", 3.0), ("processes", 2.0), ("rss_mb", 106.0)):
        with pytest.raises(AssertionError, match="memory grew" if name == "rss_mb" else name):
            soak.judged(rows(**{name: value}), 600)


def test_the_cost_of_checkpoints_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands run in this process, which spares their start."""
    ran = []

    def command(words: list[str]) -> None:
        ran.append(words[1])
        assert cli.main(words) == 0

    monkeypatch.setattr(checkpoints, "_command", command)
    asked = ["--envs", "CartPole-v1", "--steps", "300", "--out", str(tmp_path)]
    assert checkpoints.main(asked) == 0
    assert ran == ["--env", "--resume"]
    row = (tmp_path / "checkpoints.md").read_text().splitlines()[8]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    name, size, seconds, share, resume, whole = cells
    assert name == "CartPole-v1"
    assert 0.1 < float(size) < 5 and 0 < float(seconds) < 5
    assert 0 < float(resume) <= float(whole) < 60
    assert share.endswith("%")


def test_a_command_that_fails_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--envs", "CartPole-v1", "--steps", "2000000", "--out", str(tmp_path / "out")]
    assert checkpoints.main(asked) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "stop_at must be in [1, total_timesteps]" in err
    assert not (tmp_path / "out").exists()
