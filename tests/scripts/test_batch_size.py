"""scripts/batch_size.py."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from acktr.report.curves import aligned
from scripts import batch_size
from tests.tools.run_folders import write_run

ENV = "BreakoutNoFrameskip-v4"


def a_run(root: Path, algo: str, steps: int, returns: list[float], **changes: Any) -> Path:
    env, seed = changes.pop("env", ENV), changes.pop("seed", 0)
    run = write_run(root, env, f"{algo}-{steps}", seed, returns, algo=algo, **changes)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"num_envs": 32, "num_steps": steps}))
    return run


@pytest.fixture
def speed(tmp_path: Path) -> Path:
    rows = [
        {
            "settings": {"algo": algo, "num_envs": 32, "num_steps": 5, "micro_batch": part},
            "steps_per_second": {"median": median},
        }
        for algo, part, median in (("acktr", None, 900.0), ("acktr", 8, 1.0), ("a2c", None, 1200.0))
    ]
    path = tmp_path / "batch.json"
    path.write_text(json.dumps({"rows": rows}))
    return path


def test_figure_and_table(tmp_path: Path, speed: Path) -> None:
    for algo, steps, level in (("acktr", 5, 3.0), ("acktr", 20, 5.0), ("a2c", 5, 2.0)):
        a_run(tmp_path / "runs", algo, steps, [level] * 200)
    out = tmp_path / "out"
    given = [str(tmp_path / "runs"), "--speed", str(speed), "--out", str(out)]
    assert batch_size.main(given) == 0
    rows = list(csv.DictReader((out / "batch_size.csv").open()))
    assert [(r["algo"], r["batch"], r["last100"], r["steps_per_second"]) for r in rows] == [
        ("acktr", "160", "3.0", "900.0"),
        ("acktr", "640", "5.0", ""),
        ("a2c", "160", "2.0", "1200.0"),
    ]
    first = (out / "batch_size.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert batch_size.main(given) == 0
    assert (out / "batch_size.png").read_bytes() == first


def test_curves_are_means_over_seeds_where_all_have_a_return(tmp_path: Path) -> None:
    a_run(tmp_path, "acktr", 5, [1.0] * 50)  # the first episode ends at 200
    a_run(tmp_path, "acktr", 5, [4.0] * 10, seed=1)  # at 1000
    points = batch_size.read_points([tmp_path])
    steps, returns = aligned([point.curve for point in points])
    assert steps.tolist() == list(range(1000, 10_001, 10))
    assert returns.mean(axis=0).tolist() == [2.5] * len(steps)


def test_steps_to_a_return(tmp_path: Path, speed: Path) -> None:
    a_run(tmp_path / "runs", "acktr", 5, [0.0] * 100 + [3.0] * 100)  # an episode every 50 steps
    a_run(tmp_path / "runs", "a2c", 5, [0.0] * 200)
    out = tmp_path / "out"
    given = [str(tmp_path / "runs"), "--speed", str(speed), "--out", str(out)]
    assert batch_size.main([*given, "--threshold", "1.5"]) == 0
    rows = csv.DictReader((out / "batch_size.csv").open())
    assert [row["steps_to_1.5"] for row in rows] == ["7500", ""]  # 50 of the last 100 have 3


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        ("algo", "a run of trpo, not of acktr or a2c"),
        ("env", "the runs must be of one environment"),
        ("length", "the runs must be of one length, not of 9000, 10000 steps"),
        ("unfinished", "not finished"),
        ("speed", "no report of scripts.bench --suite batch"),
        ("missing", "no such folder"),
    ],
)
def test_bad_input_ends_with_one_line_and_code_2(
    tmp_path: Path, speed: Path, capsys: pytest.CaptureFixture[str], spoil: str, why: str
) -> None:
    runs = tmp_path / "runs"
    run = a_run(runs, "acktr", 5, [1.0] * 9)
    if spoil == "algo":
        a_run(runs, "trpo", 5, [1.0] * 9)
    elif spoil == "env":
        a_run(runs, "a2c", 5, [1.0] * 9, env="PongNoFrameskip-v4")
    elif spoil == "length":
        a_run(runs, "a2c", 5, [1.0] * 9, total=9000)
    elif spoil == "unfinished":
        (run / "eval.csv").unlink()
    elif spoil == "speed":
        speed.write_text("{}")
    elif spoil == "missing":
        runs = tmp_path / "nothing"
    out = tmp_path / "out"
    assert batch_size.main([str(runs), "--speed", str(speed), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("batch_size: error: ") and err.count("\n") == 1 and why in err
    assert not out.exists()
