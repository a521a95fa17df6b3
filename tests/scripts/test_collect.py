"""Compact copies of runs are small and say the same as the runs."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from acktr.report.curves import curve, load_monitor
from acktr.report.page import ReportSettings, write_report
from acktr.report.references import Reference
from scripts.collect import collect_compact, main
from tests.tools.run_folders import write_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Runs of many and of few episodes, and an unfinished one of many."""
    root = tmp_path / "runs"
    for label, seed, episodes, done in (
        ("acktr", 0, 3000, True),
        ("acktr", 1, 1000, True),
        ("a2c", 0, 1001, True),
        ("a2c", 1, 40, True),
        ("a2c", 2, 2500, False),
    ):
        generator = np.random.default_rng(10 * seed + episodes)
        returns = (np.linspace(0, 900, episodes) + generator.normal(0, 99, episodes)).round(6)
        evaluation = (800.0, 900.0) if done else None
        run = write_run(
            root, "Hopper-v5", label, seed, returns, total=200_000, evaluation=evaluation
        )
        rows = "".join(f"{k},{k}\n" for k in range(1, 700))
        (run / "progress.csv").write_text("timesteps,updates\n" + rows)
        (run / "checkpoints").mkdir()
    return root


def test_report_of_compact_copies_is_that_of_the_runs(runs: Path, tmp_path: Path) -> None:
    said = collect_compact([runs], tmp_path / "copies")
    size = sum(path.stat().st_size for path in (tmp_path / "copies").rglob("*.*"))
    assert said == f"{tmp_path / 'copies'}: 5 runs, {size / 1e6:.2f} MB\n"
    references = {"Hopper": Reference("Hopper", 0.0, 1000.0, (400.0, 700.0), "")}
    settings = ReportSettings(references, resamples=200)
    for name in ("runs", "copies"):
        write_report([tmp_path / name], tmp_path / f"of {name}", settings, ["acktr", "report"])
    reports = [
        {path.name: path.read_bytes() for path in (tmp_path / f"of {name}").iterdir()}
        for name in ("runs", "copies")
    ]
    assert reports[0] == reports[1]
    assert b"(2/2)" in reports[0]["report.md"] and b"a2c/seed2" in reports[0]["report.md"]


def test_compact_copies_are_small_and_say_what_they_are(runs: Path, tmp_path: Path) -> None:
    collect_compact([runs], tmp_path / "copies")
    target = tmp_path / "copies" / "Hopper-v5" / "acktr" / "seed0"
    names = {"config.json", "versions.json", "monitor.csv", "eval.csv", "command.txt"}
    names |= {"moving_mean.csv", "progress.csv"}
    assert {path.name for path in target.iterdir()} == names
    assert sum(path.stat().st_size for path in target.iterdir()) < 30_000
    last, all_ = load_monitor(target), load_monitor(runs / "Hopper-v5" / "acktr" / "seed0")
    for kept, whole in zip(astuple(last), astuple(all_), strict=True):
        np.testing.assert_array_equal(kept, whole[-100:])
    assert "last 100 episodes" in (target / "monitor.csv").read_text().splitlines()[0]
    assert len((target / "progress.csv").read_text().splitlines()) == 26
    assert str(runs) not in (target / "command.txt").read_text()
    few = Path("Hopper-v5/acktr/seed1/monitor.csv")
    assert (tmp_path / "copies" / few).read_bytes() == (runs / few).read_bytes()
    assert not (tmp_path / "copies" / few).with_name("moving_mean.csv").exists()


def test_compact_copy_of_an_unfinished_run_ends_where_it_is(runs: Path, tmp_path: Path) -> None:
    run = runs / "Hopper-v5" / "a2c" / "seed2"
    lines = (run / "monitor.csv").read_text().splitlines(keepends=True)
    (run / "monitor.csv").write_text("".join(lines[: 2 + 1250]))
    collect_compact([runs], tmp_path / "copies")
    steps = curve(tmp_path / "copies" / "Hopper-v5" / "a2c" / "seed2").steps
    assert steps[-1] == 100_000 and len(steps) == 500


def test_compact_copies_can_be_copied_again(runs: Path, tmp_path: Path) -> None:
    collect_compact([runs], tmp_path / "one")
    collect_compact([tmp_path / "one"], tmp_path / "two")
    one, two = (
        {
            str(path.relative_to(tmp_path / name)): path.read_bytes()
            for path in (tmp_path / name).rglob("*.*")
        }
        for name in ("one", "two")
    )
    assert one == two and len(one) == 5 * 6 + 3 - 1


def test_a_newer_copy_replaces_all_of_an_older_one(runs: Path, tmp_path: Path) -> None:
    run, copy = (root / "Hopper-v5" / "acktr" / "seed0" for root in (runs, tmp_path / "copies"))
    collect_compact([run], tmp_path / "copies")
    lines = (run / "monitor.csv").read_text().splitlines(keepends=True)
    (run / "monitor.csv").write_text("".join([*lines[:12], "5.0,5,9999,200000\n"]))
    (run / "progress.csv").unlink()
    collect_compact([run], tmp_path / "copies")
    assert {path.name for path in copy.iterdir()} == {
        *("config.json", "versions.json", "command.txt", "monitor.csv", "eval.csv")
    }


@pytest.mark.parametrize("flags", [[], ["--compact"]])
@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("monitor.csv", b"r,l\n", "columns r, l and t are needed"),
        ("eval.csv", b"timesteps,mean_reward\n1\n", "line 2 has 1 fields"),
        ("progress.csv", b"", "no header line"),
        ("progress.csv", b"\xff\n", "not a CSV file"),
        ("config.json", b"[]", "must hold a JSON object"),
    ],
)
def test_damaged_runs_are_refused_before_anything_is_written(
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    name: str,
    content: bytes,
    why: str,
) -> None:
    folders = [runs / "Hopper-v5" / "acktr" / f"seed{seed}" for seed in (0, 1)]
    (folders[1] / name).write_bytes(content)
    assert main([*map(str, folders), *flags, "--out", str(tmp_path / "copies")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("collect: error: ") and len(error.splitlines()) == 1
    assert why in error and str(folders[1] / name) in error
    assert not (tmp_path / "copies").exists()


def test_no_run_is_overwritten(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in runs.rglob("*.*")}
    assert main([str(runs), "--compact", "--out", str(runs)]) == 2
    assert "is a run, not a copy of one; choose another --out" in capsys.readouterr().err
    same = [str(runs / "Hopper-v5" / label / "seed0") for label in ("acktr", "a2c")]
    assert main([*same, "--out", str(tmp_path / "out")]) == 2  # OUT/ENV/seed0 both
    assert "another run goes to" in capsys.readouterr().err
    assert main([same[0]]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert {path: path.read_bytes() for path in runs.rglob("*.*")} == before
    assert not (tmp_path / "out").exists()
