"""scripts/six_games.py."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from acktr.report.references import published_curves
from scripts import six_games
from tests.tools.run_folders import write_run

GAME = "PongNoFrameskip-v4"
SCHEDULE = six_games.SCHEDULE


def stopped(root: Path, returns: list[float], until: float = 1.0, **changes: object) -> Path:
    """A run of a game on the whole schedule that has made a part of it, without an evaluation."""
    algo, env = str(changes.get("algo", "acktr")), str(changes.get("env", GAME))
    total = int(str(changes.get("total", SCHEDULE)))
    run = write_run(
        root, env, algo, int(str(changes.get("seed", 0))), returns, evaluation=None, algo=algo
    )
    config = (run / "config.json").read_text().replace("10000", str(total))
    (run / "config.json").write_text(config)
    rows = [
        f"{value!r},5,{k},{int(until * SCHEDULE * k / len(returns))}\n"
        for k, value in enumerate(returns, 1)
    ]
    (run / "monitor.csv").write_text("#{}\nr,l,t,step\n" + "".join(rows))
    return run


def made(root: Path) -> list[dict[str, str]]:
    assert six_games.main([str(root / "runs"), "--out", str(root / "out")]) == 0
    return list(csv.DictReader((root / "out" / "games.csv").open()))


def test_a_run_says_how_far_it_is_and_what_it_returned_on_the_way(tmp_path: Path) -> None:
    # 100 episodes for each tenth of what was done, so that the mean is that of one level there.
    levels = [-20.0, -18.0, -10.0, 0.0, 19.0]
    returns = [level for level in levels for _ in range(100)]
    stopped(tmp_path / "runs", returns, until=0.25)
    rows = made(tmp_path)
    (ours,) = [row for row in rows if row["by"] == "ours"]
    found = [ours[name] for name in ("algo", "seed", "steps", "at_1000000", "at_2000000")]
    assert found == ["acktr", "0", "2500000", "-18.0", "0.0"]
    assert ours["at_4000000"] == "" and ours["last"] == "19.0"
    # A2C ends at some 18.5: 98 of the last 100 have 19.
    for source in ("OpenAI Baselines", "Wu et al. 2017"):
        assert 2_480_000 <= int(ours[f"passes_a2c_of_{source}"]) <= 2_500_000
    text = (tmp_path / "out" / "games.md").read_text()
    assert "| Pong | ACKTR | ours | 0 | 2.50M | -18.0 | 0.0 |  | 19.0 |" in text


def test_published_rows_are_those_of_the_curves(tmp_path: Path) -> None:
    stopped(tmp_path / "runs", [0.0] * 100)
    rows = {(row["algo"], row["by"]): row for row in made(tmp_path)}
    assert len(rows) == 5
    for algo in ("acktr", "a2c"):
        for curve in published_curves(GAME, [algo]):
            row = rows[algo, curve.source]
            at = np.interp(1e6, curve.steps, curve.returns)
            assert float(row["at_1000000"]) == pytest.approx(at, abs=0.01)
            tenth = curve.returns[curve.steps > 0.9 * curve.steps[-1]]
            assert len(tenth) >= 4
            assert float(row["last"]) == pytest.approx(tenth.mean(), abs=0.01)
    # pixels_and_curves: 2.4M and 4.2M of the published curves
    assert rows["acktr", "Wu et al. 2017"]["passes_a2c_of_Wu et al. 2017"] == "2400000"
    passed = int(rows["acktr", "OpenAI Baselines"]["passes_a2c_of_OpenAI Baselines"])
    assert 4_100_000 < passed < 4_300_000
    assert rows["acktr", "ours"]["passes_a2c_of_Wu et al. 2017"] == ""
    assert "never" in (tmp_path / "out" / "games.md").read_text()


def test_our_a2c_is_one_more_end_to_pass(tmp_path: Path) -> None:
    stopped(tmp_path / "runs", [-20.0] * 100 + [-10.0] * 100)
    for seed, level in enumerate((-16.0, -14.0)):
        stopped(tmp_path / "runs", [level] * 100, algo="a2c", seed=seed, until=0.5)
    rows = made(tmp_path)
    assert [row["passes_a2c_of_ours"] for row in rows if row["by"] == "ours"] == ["7500000", "", ""]
    picture = (tmp_path / "out" / "games.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    made(tmp_path)
    assert (tmp_path / "out" / "games.png").read_bytes() == picture


def test_a_line_ends_where_its_run_has_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tmp_path / "runs", [0.0] * 100, until=0.3)
    drawn = []
    monkeypatch.setattr(six_games, "picture", lambda figure, kind: drawn.append(figure) or b"")
    made(tmp_path)
    (axis,) = [axis for axis in drawn[0].axes if axis.get_visible()]
    ends = [line.get_xdata()[-1] for line in axis.lines]
    assert len(ends) == 5 and ends[-1] == 3_000_000 and min(ends[:-1]) > 9_000_000


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"algo": "trpo"}, "no run of acktr or a2c on a game with published curves"),
        ({"env": "FreewayNoFrameskip-v4"}, "no run of acktr or a2c on a game with published"),
        ({"total": 1_000_000}, "the schedule must be of 10,000,000 steps"),
    ],
)
def test_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], why: str
) -> None:
    stopped(tmp_path / "runs", [0.0] * 10, **changes)
    assert six_games.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("six_games: error: ") and err.count("\n") == 1 and why in err
    assert not (tmp_path / "out").exists()


def test_a_run_without_an_episode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped(tmp_path / "runs", [])
    assert six_games.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 2
    assert "no episode has ended yet" in capsys.readouterr().err
