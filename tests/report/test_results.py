"""Run folders are found and read."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from acktr.report.listing import card
from acktr.report.results import find_runs, read_result, read_results
from acktr.runs.folder import RunError
from tests.tools.run_folders import write_run


def test_result(tmp_path: Path) -> None:
    returns = [*[0.0] * 50, *range(100)]
    found = read_result(write_run(tmp_path, "ns/X-v0", "acktr-paper", 3, returns, algo="acktr"))
    assert (found.env, found.label, found.algo, found.seed) == (
        "ns/X-v0",
        "acktr-paper",
        "acktr",
        3,
    )
    assert (found.total_steps, found.steps, found.finished) == (10_000, 10_009, True)
    assert found.last100 == 49.5
    assert found.minutes == 150
    assert found.final is not None
    assert (found.final.mean, found.final.std, found.final.episodes) == (2.0, 1.0, 2)
    assert found.versions == {"git_commit": "abc", "torch": "2.0"}
    assert found.name == "ns/X-v0/acktr-paper/seed3"
    assert found.curve is not None
    assert found.curve.steps[-1] == 10_000 and found.curve.returns[-1] == 49.5


def test_unfinished(tmp_path: Path) -> None:
    begun = write_run(tmp_path, "X-v0", "a", 0, [1.0], evaluation=None)
    (begun / "monitor.csv").unlink()
    silent = write_run(tmp_path, "X-v0", "a", 1, [])
    early = write_run(tmp_path, "X-v0", "a", 2, [1.0])
    lines = (early / "eval.csv").read_text().splitlines(keepends=True)
    (early / "eval.csv").write_text("".join(lines[:2]))
    for run in (begun, silent, early):
        assert not read_result(run).finished
    assert read_result(begun).last100 is None
    assert read_result(silent).curve is None
    assert read_result(early).last100 == 1.0 and read_result(early).steps == 10_000


def test_steps_of_updates_count_where_no_episode_has_ended(tmp_path: Path) -> None:
    run = write_run(tmp_path, "X-v0", "a", 0, [], evaluation=None)
    assert read_result(run).steps == 0
    progress = run / "progress.csv"
    progress.write_text("timesteps,updates,train/std\n128,1,0.5\n256,2,0.5\n384,3,")
    assert read_result(run).steps == 256  # the last row is not whole
    assert "Trained by acktr for 256 of\n10,000 environment steps" in card(run)
    progress.write_text("timesteps,updates\nx,1\nx,2\n")
    assert read_result(run).steps == 0
    ended = write_run(tmp_path, "X-v0", "a", 1, [1.0], evaluation=None)
    (ended / "progress.csv").write_text("timesteps,updates\n128,1\n256,2\n")
    assert read_result(ended).steps == 10_000
    (ended / "progress.csv").write_text("timesteps,updates\n128,1\n20000,2\n")
    assert read_result(ended).steps == 20_000


@pytest.mark.parametrize(
    ("sessions", "words"),
    [
        (None, None),
        ([{"step": 4096, "torch": "2.1"}], None),
        ([(4000, 10_000)], "lengthened from 4,000 steps"),
        ([(4000, 8000), (8000, 10_000)], "lengthened from 4,000 steps"),
        ([(20_000, 10_000)], "shortened from 20,000 steps"),
        ([(10_000, 12_000)], None),  # it did not come to it
        ([("x", 10_000)], None),
        ("damaged", None),
    ],
)
def test_another_length(sessions: object, words: str | None, tmp_path: Path) -> None:
    run = write_run(tmp_path, "X-v0", "a", 0, [1.0])
    if isinstance(sessions, list):
        names = ("former_total_timesteps", "total_timesteps")
        each = [s if isinstance(s, dict) else dict(zip(names, s, strict=True)) for s in sessions]
        sessions = [{"step": 1, **one} for one in each]
    known = json.loads((run / "versions.json").read_text())
    if sessions is not None:
        (run / "versions.json").write_text(json.dumps({**known, "sessions": sessions}))
    assert read_result(run).replanned == words
    assert ("environment steps, " + (words or "seed")) in card(run)


def test_label(tmp_path: Path) -> None:
    labelled = write_run(tmp_path, "X-v0", "my.label_1", 0, [1.0], algo="trpo")
    assert read_result(labelled).label == "my.label_1"
    for other in ("X-v0/seed0", "a b/seed0", "there/best", "-x/seed0"):
        target = tmp_path / "other" / other
        shutil.copytree(labelled, target)
        assert read_result(target).label == "trpo", other


def test_find(tmp_path: Path) -> None:
    a = write_run(tmp_path / "runs", "X-v0", "a", 0, [1.0])
    b = write_run(tmp_path / "runs", "Y-v0", "b", 7, [1.0])
    (b / "monitor.csv").unlink()  # it has just begun
    inner = a / "checkpoints" / "last"
    inner.mkdir(parents=True)
    shutil.copy(a / "config.json", inner)
    (tmp_path / "runs" / "config.json").write_text("{}")  # no run: there is no monitor.csv
    shutil.copytree(a, a.with_name(".seed0.tmp-0123abcd"))  # of a killed scripts.peers
    (tmp_path / "runs" / "loop").symlink_to(tmp_path / "runs")
    assert find_runs([tmp_path / "runs"]) == [a, b]
    assert find_runs([b, tmp_path / "runs", a]) == [a, b]
    (tmp_path / "empty").mkdir()
    for path, why in ((tmp_path / "empty", "no run in it"), (tmp_path / "no", "no such folder")):
        with pytest.raises(RunError, match=why):
            find_runs([a, path])


def test_find_leaves_nothing_out_silently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, "X-v0", "a", 0, [1.0])
    closed = write_run(tmp_path, "X-v0", "b", 0, [1.0]).parent
    scandir = os.scandir

    def refuse(path: str) -> object:
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(RunError, match=rf"{re.escape(str(closed))}: cannot read: Permission"):
        find_runs([tmp_path])


def test_order_and_twins(tmp_path: Path) -> None:
    names = [("Y-v0", "a", 1), ("X-v0", "b", 10), ("X-v0", "b", 9), ("X-v0", "a", 3)]
    runs = [write_run(tmp_path / "one", *name, [1.0]) for name in names]
    counts: list[int] = []
    found = read_results(runs, counts.append)
    assert [(r.env, r.label, r.seed) for r in found] == sorted(names)
    assert counts == [0, 1, 2, 3]
    twin = write_run(tmp_path / "two", "X-v0", "b", 9, [1.0])
    with pytest.raises(ValueError, match=r"two runs of X-v0/b/seed9: .*one.* and .*two"):
        read_results([*runs, twin])


def edit_config(run: Path, **values: object) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("env", "a\nb", "env must be a printable name"),
        ("env", None, "env must be a printable name"),
        ("algo", 3, "algo must be a printable name"),
        ("seed", "0", "seed must be an integer"),
        ("seed", True, "seed must be an integer"),
        ("seed", -1, "seed must be an integer"),
        ("total_timesteps", 0, r"total_timesteps must be an integer in \[1"),
        ("total_timesteps", 1e6, "total_timesteps must be an integer"),
        pytest.param("total_timesteps", 10**400, "an integer of too many digits", id="digits"),
    ],
)
def test_bad_config_is_one_line(tmp_path: Path, key: str, value: object, why: str) -> None:
    run = write_run(tmp_path, "X-v0", "a", 0, [1.0])
    edit_config(run, **{key: value})
    with pytest.raises((ValueError, RunError), match=why) as caught:
        read_result(run)
    assert "\n" not in str(caught.value) and "config.json" in str(caught.value)


EVAL = "timesteps,mean_reward,std_reward,mean_length,episodes,returns\n"


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        (
            "eval.csv",
            "a,b\n1,2\n",
            "columns timesteps, mean_reward, std_reward, episodes",
        ),
        ("eval.csv", EVAL + "20000,x,0,5,1,1\n", "eval.csv: numbers are needed"),
        ("eval.csv", EVAL + "20000,nan,0,5,1,1\n", "must be finite"),
        ("eval.csv", EVAL + "20000,1\n", "line 2 has 2 fields"),
        ("eval.csv", EVAL + "x,1,0,5,1,1\n", "eval.csv: numbers are needed"),
        ("monitor.csv", "r,l,t\n1,2,nan\n", "r and t must be finite"),
        ("monitor.csv", "r,l\n", "columns r, l, t are needed"),
        ("moving_mean.csv", "a\n", "columns step, episodes, return are needed"),
        ("versions.json", "{", "not valid JSON"),
        ("versions.json", "[]", "must hold a JSON object"),
        ("versions.json", " " * (1 << 20) + "{}", "are allowed"),
    ],
)
def test_damaged_file_is_one_line(tmp_path: Path, name: str, content: str, why: str) -> None:
    run = write_run(tmp_path, "X-v0", "a", 0, [1.0])
    (run / name).write_text(content)
    with pytest.raises(ValueError, match=why) as caught:
        read_result(run)
    assert "\n" not in str(caught.value) and name in str(caught.value)
    assert str(caught.value).count(name) == 1


def test_versions_are_text_that_can_be_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path, "X-v0", "a", 0, [1.0])
    values = {"n": 2, "long": "x" * 500, "bad": "a\nb", "no": None, "list": [1], "k\n": "v"}
    (run / "versions.json").write_text(json.dumps(values))
    assert read_result(run).versions == {"n": "2", "long": "x" * 100}
    (run / "versions.json").unlink()
    assert read_result(run).versions == {}


@pytest.mark.parametrize(
    ("env", "pixels", "skip"),
    [
        ("Pixels/Hopper-v5", {"frame_skip": 4}, 4),
        ("gymnasium:Pixels/Hopper-v5", {"frame_skip": 4}, 4),
        ("Hopper-v5", {"frame_skip": 4}, 1),
        ("Pixels/Hopper-v5", {"frame_skip": "4"}, 1),
        ("Pixels/Hopper-v5", None, 1),
    ],
)
def test_steps_of_pictures_are_several(env: str, pixels: object, skip: int, tmp_path: Path) -> None:
    run = write_run(tmp_path, env, "acktr", 0, [1.0] * 20)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"pixels": pixels}))
    assert read_result(run).frame_skip == skip
    text = f"10,000 environment steps, each of them {skip} of the environment behind the pictures,"
    assert (text in card(run)) == (skip > 1)
