"""Mutants are drawn by group, and the score counts those that no test found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import mutants

CODES = {
    "acktr.kfac.trust.x_scale__mutmut_1": 1,
    "acktr.kfac.trust.x_scale__mutmut_2": 0,
    "acktr.kfac.trust.x_scale__mutmut_3": -24,
    "acktr.kfac.trust.x_scale__mutmut_4": None,
    "acktr.rollout.buffer.x_gae__mutmut_1": 33,
    "acktr.rollout.buffer.x_gae__mutmut_2": -11,
    "acktr.config.presets.x_merge__mutmut_1": None,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What mutmut leaves: a file per module."""
    for name in ("kfac/trust", "rollout/buffer", "config/presets"):
        own = {k: v for k, v in CODES.items() if k.startswith(f"acktr.{name.replace('/', '.')}.")}
        path = tmp_path / "mutants" / "acktr" / f"{name}.py.meta"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"exit_code_by_key": own, "durations_by_key": {}}))
    return tmp_path / "mutants"


def test_as_many_are_drawn_of_each_group_by_the_seed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def drawn(*options: str) -> list[str]:
        assert mutants.main(["draw", "--mutants", str(folder), *options]) == 0
        return capsys.readouterr().out.split()

    assert sorted(drawn()) == sorted(CODES)
    two = drawn("--count", "2")
    assert [mutants.group_of(name) for name in two] == [
        "K-FAC",
        "K-FAC",
        "returns and rollout",
        "returns and rollout",
        "configuration",
    ]
    assert drawn("--count", "2") == two
    assert len({tuple(drawn("--count", "1", "--seed", str(seed))) for seed in range(9)}) > 1


def test_the_score_counts_what_was_tested(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mutants.main(["table", "--mutants", str(folder), "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "| K-FAC | 4 | 3 | 2 | 66.7% [20.8%, 93.9%] |" in text
    assert "| returns and rollout | 2 | 2 | 1 | 50.0% [9.5%, 90.5%] |" in text
    assert "configuration" not in text.partition("The 2 that live")[0]
    assert "- `acktr.kfac.trust.x_scale__mutmut_2`: lives" in text
    assert "- `acktr.rollout.buffer.x_gae__mutmut_1`: not reached" in text
    rows = (tmp_path / "out" / "mutants.csv").read_text().splitlines()
    assert rows[1:] == [
        "acktr.kfac.trust.x_scale__mutmut_1,K-FAC,found",
        "acktr.kfac.trust.x_scale__mutmut_2,K-FAC,lives",
        'acktr.kfac.trust.x_scale__mutmut_3,K-FAC,"found, by time"',
        "acktr.rollout.buffer.x_gae__mutmut_1,returns and rollout,not reached",
        'acktr.rollout.buffer.x_gae__mutmut_2,returns and rollout,"found, by a crash"',
    ]


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mutants.main(["draw", "--mutants", str(tmp_path)]) == 2
    assert "has no mutants: `mutmut run` makes them" in capsys.readouterr().err
    (tmp_path / "x.py.meta").write_text("[1]")
    assert mutants.main(["draw", "--mutants", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "x.py.meta").write_text('{"a": 1}')
    assert mutants.main(["draw", "--mutants", str(tmp_path)]) == 2
    assert "x.py.meta: not a file of mutmut: 'exit_code_by_key'\n" in capsys.readouterr().err
    (tmp_path / "x.py.meta").write_text(
        '{"exit_code_by_key": {"acktr.kfac.a.x_b__mutmut_1": null}}'
    )
    assert mutants.main(["table", "--mutants", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert "no mutant was tested" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
