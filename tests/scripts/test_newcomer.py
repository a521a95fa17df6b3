"""The programs of the first day: how their ends are told apart. All of them run in a campaign."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.newcomer import PRELUDE, PROGRAMS, WRONG, outcome, programs, run


def test_programs_are_whole() -> None:
    assert [len(programs(path)) for path in (PROGRAMS, WRONG)] == [60, 57]
    found = programs() | programs(WRONG)
    for name, code in found.items():
        compile(PRELUDE + code, name, "exec")


@pytest.mark.parametrize(
    ("name", "how", "words"),
    [
        ("n_steps=32", "says", "unknown argument n_steps; write num_steps"),
        ("load what is not there", "says", "nothing: no checkpoint here"),
        ("save to a BytesIO", "says", "an agent is saved to a path and loaded from one, got Byt"),
        ("model.gamma = 0.9", "says", "gamma cannot be set in an agent that is made"),
        ("observation_space, action_space, num_envs, logger", "works", "(4,) Discrete(2) 8 None"),
    ],
)
def test_how_programs_end(
    name: str, how: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # which the program changes
    found = outcome((programs() | programs(WRONG))[name], tmp_path)
    assert found[0] == how and found[1].startswith(words)


def test_a_program_that_dies_is_told_at_once() -> None:
    how, words, seconds = run("import os; os.kill(os.getpid(), 9)")
    assert (how, words) == ("fails", "the process ended with code -9") and seconds < 60
    assert run("print(1)")[:2] == ("works", "1")
