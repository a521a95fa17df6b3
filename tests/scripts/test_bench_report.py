"""The report's numbers follow from the windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import report
from scripts.bench.cases import Case, Timing, limits
from scripts.bench.report import share_table
from scripts.common import ScriptError, save

TIMING = Timing(threads=2, seconds=1, windows=3, warm_up=1, warm_up_updates=1)
MESSAGES = {"calls": 52.0, "bytes": 1.14e6, "seconds": 0.0056}
SHARES = {"env": 0.5, "act": 0.25, "batch": 0.0, "rest": 0.25}


def training(key: str, env: str, num_envs: int = 4) -> Case:
    return Case(
        key=key,
        what=key.upper(),
        kind="training",
        env=env,
        num_envs=num_envs,
        num_steps=5,
        settings={},
    )


def outcome(*rates: float, parts: dict[str, float] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"rates": rates, "updates": 10, "seconds": 2.0, "peak_mib": 1234.6}
    found |= {"steps": 5000, "processor": 3.5}
    return found if parts is None else {**found, "shares": parts}


@pytest.fixture
def document() -> dict[str, Any]:
    ours = [training("acktr", "A-v0"), training("a2c-equal", "A-v0"), training("other", "B-v0", 8)]
    outcomes = {
        "acktr": outcome(1200, 1000, 900, parts=SHARES),
        "a2c-equal": outcome(1250, 1300, 900, parts=SHARES),
        "other": outcome(50, 70, 60, parts={**SHARES, "policy": 0.0}) | {"messages": MESSAGES},
        "environment-A-v0-4": outcome(6000, 4000, 4500),
        "compute-acktr": outcome(1500, 1500, 1500),
        "compute-a2c-equal": {"failure": "RuntimeError: no"},
    }
    skipped = {"compute-other": "nothing installed"}
    about = report.about("python -m scripts.bench", TIMING, 1)
    about["machine"]["load_average_before"] = [0.1, 0.2, 0.3]
    return {
        "suite": "mujoco",
        **about,
        **report.results([*ours, *limits(ours)], outcomes, skipped),
    }


def test_medians_extremes_and_ratios(document: dict[str, Any]) -> None:
    rows = {row["key"]: row for row in document["rows"]}
    assert list(rows) == ["acktr", "a2c-equal", "other"]
    assert rows["a2c-equal"]["steps_per_second"] == {
        "median": 1250,
        "min": 900,
        "max": 1300,
        "windows": [1250, 1300, 900],
    }
    assert rows["acktr"]["ratio"] == 1 and rows["a2c-equal"]["ratio"] == 1.25
    assert rows["other"]["ratio"] is None  # another environment
    assert rows["acktr"]["milliseconds_per_update"] == 200
    assert document["ratios"] == [
        {"what": "time per step, ACKTR over A2C at the same batch", "value": 1.25}
    ]


def test_the_limit_is_that_of_one_after_the_other(document: dict[str, Any]) -> None:
    (limit,) = document["limits"]  # the others lack a part
    assert limit["what"] == "ACKTR"
    assert limit["limit"] == pytest.approx(1125)  # 1 / (1/4500 + 1/1500)
    assert limit["achieved"] == 1000 and limit["part"] == pytest.approx(1000 / 1125)


def test_the_tables_show_them(document: dict[str, Any]) -> None:
    text = report.markdown(document)
    for line in (
        "Command: `python -m scripts.bench`",
        "| ACKTR | A-v0 | 4 x 5 | 1,000 [900, 1,200] | 1.00 | 200.0 | 700 | 1,235 |",
        "| A2C-EQUAL | A-v0 | 4 x 5 | 1,250 [900, 1,300] | 1.25 | 200.0 | 700 | 1,235 |",
        "| OTHER | B-v0 | 8 x 5 | 60 [50, 70] |  | 200.0 | 700 | 1,235 |",
        "- time per step, ACKTR over A2C at the same batch: 1.250",
        "| what | environment | environments | act | batch | policy | rest of update |",
        "| ACKTR | A-v0 | 50.0 | 25.0 | 0.0 |  | 25.0 |",
        "| ACKTR | A-v0 | 4 x 5 | 4,500 [4,000, 6,000] | 1,500 [1,500, 1,500] | 1,125 | 1,000"
        " | 88.9 % |",
        "| OTHER | B-v0 | 52.0 | 1.14 | 5.6 |",
        "- OTHER, computation: skipped, nothing installed",
        "- A2C-EQUAL, computation A-v0: failed: RuntimeError: no",
    ):
        assert f"{line}\n" in text
    assert "load_average_before [0.1, 0.2, 0.3]" in text and "torch threads 2." in text


def test_a_part_without_a_heading_is_no_part_that_is_left_out() -> None:
    row = {"what": "x", "env": "y", "shares": {"env": 0.5, "new": 0.5}}
    with pytest.raises(ValueError, match="parts of the time without a heading: new"):
        share_table([row])


def test_files_are_written_whole_or_refused_in_one_line(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    save(tmp_path / "a" / "b", report.files(document))
    assert json.loads((tmp_path / "a" / "b" / "mujoco.json").read_text()) == document
    assert (tmp_path / "a" / "b" / "mujoco.md").read_text() == report.markdown(document)
    (tmp_path / "file").touch()
    with pytest.raises(ScriptError, match=r"file/mujoco\.json: cannot write: ") as caught:
        save(tmp_path / "file", report.files(document))
    assert "\n" not in str(caught.value)
