"""Compact copies of runs are small and say the same as the runs."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from acktr.report.archives import read_archive, unpacked
from acktr.report.curves import MOVING_MEAN, Curve, curve, load_monitor
from acktr.report.page import ReportSettings, write_report
from acktr.report.references import Reference
from scripts.collect import curve_csv, main
from tests.tools.run_folders import write_run


def compact(runs: Path, archive: Path) -> int:
    return main([str(runs), "--out", str(archive)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}


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


def test_report_of_compact_copies_is_that_of_the_runs(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compact(runs, tmp_path / "runs.zip") == 0
    size = sum(map(len, read_archive(tmp_path / "runs.zip").values()))
    said = f"{tmp_path / 'runs.zip'}: 5 runs, {size / 1e6:.2f} MB unpacked\n"
    assert capsys.readouterr().out == said
    references = {"Hopper": Reference("Hopper", 0.0, 1000.0, (400.0, 700.0), "")}
    settings = ReportSettings(references, resamples=200)
    for name in ("runs", "runs.zip"):
        write_report([tmp_path / name], tmp_path / f"of {name}", settings, ["acktr", "report"])
    of_runs, of_copies = (contents(tmp_path / f"of {name}") for name in ("runs", "runs.zip"))
    assert of_runs == of_copies
    assert b"(2/2)" in of_runs["report.md"] and b"a2c/seed2" in of_runs["report.md"]


def test_compact_copies_are_small_and_say_what_they_are(runs: Path, tmp_path: Path) -> None:
    assert compact(runs, tmp_path / "x.zip") == 0
    files = read_archive(tmp_path / "x.zip")
    with unpacked([tmp_path / "x.zip" / "Hopper-v5" / "acktr" / "seed0"]) as (target,):
        copy, last = contents(target), load_monitor(target)
    names = {"config.json", "versions.json", "monitor.csv", "eval.csv", "command.txt"}
    assert set(copy) == names | {"moving_mean.csv", "progress.csv"}
    assert sum(map(len, copy.values())) < 30_000
    all_ = load_monitor(runs / "Hopper-v5" / "acktr" / "seed0")
    for kept, whole in zip(astuple(last), astuple(all_), strict=True):
        np.testing.assert_array_equal(kept, whole[-100:])
    assert b"last 100 episodes" in copy["monitor.csv"].splitlines()[0]
    assert len(copy["progress.csv"].splitlines()) == 26
    assert str(runs).encode() not in copy["command.txt"]
    few = "Hopper-v5/acktr/seed1/monitor.csv"
    assert files[few] == (runs / few).read_bytes()
    assert "Hopper-v5/acktr/seed1/moving_mean.csv" not in files


def test_compact_copy_of_an_unfinished_run_ends_where_it_is(runs: Path, tmp_path: Path) -> None:
    run = runs / "Hopper-v5" / "a2c" / "seed2"
    lines = (run / "monitor.csv").read_text().splitlines(keepends=True)
    (run / "monitor.csv").write_text("".join(lines[: 2 + 1250]))
    assert compact(runs, tmp_path / "x.zip") == 0
    with unpacked([tmp_path / "x.zip" / "Hopper-v5" / "a2c" / "seed2"]) as (copy,):
        steps = curve(copy).steps
    assert steps[-1] == 100_000 and len(steps) == 500


def test_compact_copies_can_be_copied_again(runs: Path, tmp_path: Path) -> None:
    assert compact(runs, tmp_path / "one.zip") == compact(tmp_path / "one.zip", tmp_path / "2.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    assert len(read_archive(tmp_path / "2.zip")) == 5 * 6 + 3 - 1


def test_finished_runs_are_added_to_an_archive(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run by run it becomes, byte for byte, the archive of all of them."""
    one, all_ = tmp_path / "results" / "one.zip", tmp_path / "all.zip"
    for label in ("a2c", "acktr"):
        assert compact(runs / "Hopper-v5" / label, one) == 0
    assert compact(runs, all_) == 0
    assert one.read_bytes() == all_.read_bytes()
    run = runs / "Hopper-v5" / "acktr" / "seed0"
    for file in ("progress.csv", "command.txt"):
        (run / file).unlink()
    assert compact(run, one) == 0  # an older copy goes as a whole
    assert set(read_archive(all_)) - set(read_archive(one)) == {
        f"Hopper-v5/acktr/seed0/{file}" for file in ("progress.csv", "command.txt")
    }
    one.write_bytes(b"PK")
    capsys.readouterr()
    assert compact(runs, one) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not an archive of runs" in error
    assert one.read_bytes() == b"PK"


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("monitor.csv", b"r,l\n", "columns r, l, t are needed"),
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
    name: str,
    content: bytes,
    why: str,
) -> None:
    folders = [runs / "Hopper-v5" / "acktr" / f"seed{seed}" for seed in (0, 1)]
    (folders[1] / name).write_bytes(content)
    assert main([*map(str, folders), "--out", str(tmp_path / "x.zip")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("collect: error: ") and len(error.splitlines()) == 1
    assert why in error and str(folders[1] / name) in error
    assert not (tmp_path / "x.zip").exists()


def test_no_run_is_overwritten(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in runs.rglob("*.*")}
    assert main([str(runs), "--out", str(runs)]) == 2
    assert "the name must end in .zip" in capsys.readouterr().err
    for env in ("Hop:per-v5", "Hop_per-v5"):
        write_run(tmp_path / env, env, "acktr", 0, np.ones(9), evaluation=None)
    same = [str(tmp_path / env) for env in ("Hop:per-v5", "Hop_per-v5")]
    assert main([*same, "--out", str(tmp_path / "out.zip")]) == 2
    assert "another run goes to" in capsys.readouterr().err
    assert main([str(runs)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert {path: path.read_bytes() for path in runs.rglob("*.*")} == before
    assert not (tmp_path / "out.zip").exists()


def test_stored_curve_comes_back_bit_for_bit(tmp_path: Path) -> None:
    found = Curve(np.array([5, 9]), np.array([1, 100]), np.array([1 / 3, -1e-17]))
    (tmp_path / MOVING_MEAN).write_bytes(curve_csv(found))
    again = curve(tmp_path)
    assert again.steps.tolist() == [5, 9] and again.episodes.tolist() == [1, 100]
    assert again.returns.tolist() == [1 / 3, -1e-17]
