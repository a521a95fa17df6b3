"""The commands that look at runs and presets."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from acktr.config import Config, from_dict, preset, to_dict
from acktr.report import listing
from acktr.report.listing import MARK, aligned_text
from acktr.report.results import find_runs
from tests.tools.command_line import RUN, call, table


def test_list(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = here / "runs/CartPole-v1/other/seed1"
    shutil.copytree(RUN, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"gamma": 0.5, "seed": 1}))
    (other / "eval.csv").unlink()
    code, out, err = call(capsys, "list")
    assert (code, err) == (0, "")
    head, first, second = out.splitlines()
    assert head.split() == [
        "run",
        "steps",
        "last",
        "100",
        "evaluation",
        "best",
        "minutes",
        "changed",
        "from",
        "the",
        "preset",
    ]
    assert first.startswith(f"{RUN} ") and "num_envs=4" in first and "gamma" not in first
    assert "gamma=0.5" in second and "(" in second and " - " in second
    rows = json.loads(call(capsys, "list", "runs", "--json", "--sort", "evaluation")[1])
    assert [row["label"] for row in rows] == ["acktr", "other"]
    evaluations = [float(row["mean_reward"]) for row in table(RUN / "eval.csv")]
    assert (rows[0]["evaluation"], rows[0]["best"]) == (evaluations[-1], max(evaluations))
    assert rows[0]["finished"] and not rows[1]["finished"]
    assert rows[1]["changed"]["gamma"] == 0.5
    assert call(capsys, "list", "nowhere")[0] == 2
    shutil.make_archive("packed", "zip", here / "runs")
    lines = call(capsys, "list", "packed.zip")[1].splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        *("CartPole-v1/acktr/seed0", "CartPole-v1/other/seed1"),
    ]


def test_a_list_reads_a_file_once_and_makes_a_preset_once(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What made the list of a large archive slow."""
    shutil.copytree(RUN, here / "runs/CartPole-v1/acktr/seed1")
    runs = find_runs([Path("runs")])
    read: list[Path] = []
    made: list[str] = []

    def opened(path: Path, mode: str = "r") -> Any:
        read.append(path)
        return open(path, mode)

    def counted(env: str, algo: str, name: str) -> tuple[Config, str]:
        made.append(env)
        return preset(env, algo, name)

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(listing, "preset", counted)
    listing._preset.cache_clear()
    rows = [listing.row(run) for run in runs]
    assert [each.evaluation for each in rows] == [rows[0].evaluation] * 2
    assert len(read) == len(set(read)) and made == ["CartPole-v1"]


@pytest.mark.parametrize("env", ["antigravity:X-v0", "antigravity:Hopper-v5"])
def test_an_environment_in_a_module_is_not_imported(
    env: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file names a module: what is not the preset of any environment is listed without it."""
    stored = from_dict(json.loads((RUN / "config.json").read_text()))
    own = replace(preset("X-v0", "acktr")[0], env=env, gamma=0.5, wrappers=("antigravity:W",))
    (RUN / "config.json").write_text(json.dumps(to_dict(replace(own, seed=stored.seed))))
    code, out, _ = call(capsys, "list", "--json")
    assert code == 0 and "antigravity" not in sys.modules
    assert json.loads(out)[0]["changed"] == {"gamma": 0.5, "wrappers": ["antigravity:W"]}


def test_diff(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = here / "other"
    shutil.copytree(RUN, other)
    assert call(capsys, "diff", str(RUN), str(other))[:2] == (0, "no difference\n")
    config = json.loads((other / "config.json").read_text())
    config["acktr"]["actor"]["damping"] = 0.5
    (other / "config.json").write_text(json.dumps(config | {"gamma": 0.5}))
    versions = json.loads((other / "versions.json").read_text())
    (other / "versions.json").write_text(json.dumps({**versions, "torch": "1.0"}))
    lines = call(capsys, "diff", str(RUN), str(other))[1].splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        *("gamma", "acktr.actor.damping", "versions.torch"),
    ]
    assert lines[1].split()[1:] == ["0.99", "0.5"]
    files = [str(path / "config.json") for path in (RUN, other)]
    assert len(call(capsys, "diff", *files)[1].splitlines()) == 3
    assert "not a run folder" in call(capsys, "diff", str(RUN), "nowhere")[2]


def test_presets(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = call(capsys, "presets")
    assert code == 0 and "acktr      paper    MuJoCo" in out
    code, out, _ = call(capsys, "presets", "Hopper-v5", "--algo", "trpo")
    assert code == 0 and from_dict(json.loads(out)) == preset("Hopper-v5", "trpo")[0]
    assert call(capsys, "presets", "CartPole-v1", "--preset", "paper")[0] == 2
    code, out, err = call(capsys, "presets", "cartpole")
    assert (code, out) == (2, "") and "unknown environment 'cartpole'" in err


def test_card(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "card", str(RUN))
    page = RUN / "README.md"
    assert (code, out) == (0, f"{page}\n")
    text = page.read_text()
    front, rest = text.removeprefix("---\n").split("---\n", 1)
    last = table(RUN / "eval.csv")[-1]
    assert f'value: "{float(last["mean_reward"]):.2f} +/- {float(last["std_reward"]):.2f}"' in front
    assert MARK in rest and "# ACKTR in CartPole-v1" in rest and "| num\\_envs | 4 |" in rest
    assert call(capsys, "card", str(RUN))[0] == 0 and page.read_text() == text
    (here / "mine.md").write_text("mine")
    code, _, err = call(capsys, "card", str(RUN), "--out", "mine.md")
    assert code == 2 and "is no card of a run" in err
    assert (here / "mine.md").read_text() == "mine"


def test_plot_over_time(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "plot", str(RUN), "--x", "time", "--out", "time.png")[0] == 0
    rows = [row for row in table(here / "time.csv") if row["kind"] == "run"]
    seconds = [float(row["t"]) for row in table(RUN / "monitor.csv")]
    assert float(rows[-1]["minute"]) == pytest.approx(seconds[-1] / 60, rel=1e-6)
    assert call(capsys, "plot", str(RUN), "--out", "time.png", "--no-published")[0] == 0
    assert "step" in table(here / "time.csv")[0]


def test_aligned_text() -> None:
    assert aligned_text(("a", "b"), [("long", "1"), ("x", "100")]) == (
        "a       b\nlong    1\nx     100"
    )
