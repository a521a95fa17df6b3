"""Updates and examples to a loss against the batch size."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from scripts.contest import Outcome, Row
from scripts.supervised.batch_scaling import critical_batch, critical_batches, main, reached


def curve(batch: int, least: float = 40.0, critical: float = 500.0) -> int:
    return round(least * (1 + critical / batch))


def test_the_critical_batch_of_a_curve_is_found() -> None:
    batches = [250, 500, 1000, 2000, 4000, 8000]
    assert critical_batch(batches, [curve(b) for b in batches]) == pytest.approx(500, rel=0.02)
    assert critical_batch(batches, [8000 // b for b in batches]) == math.inf  # no end in sight
    assert critical_batch(batches, [7] * 6) == pytest.approx(0, abs=1e-9)  # nothing is gained


def test_what_a_run_needed_is_read_at_its_first_evaluation_below_the_loss() -> None:
    def rows(*losses: float) -> list[Row]:
        return [Row(10 * n, float(n), loss, 0.0) for n, loss in enumerate(losses)]

    outcomes = {
        batch: Outcome(runs={("kfac", 0): rows(9, 5, last, 2), ("sgd", 0): rows(9, 8, 7, 6)})
        for batch, last in ((100, 3), (200, 1))
    }
    found = reached(outcomes, 3.0)
    assert [(one.updates, one.examples, one.seconds) for one in found] == [
        *((20, 2000, 2.0), (None, None, None)),
        *((20, 4000, 2.0), (None, None, None)),
    ]
    assert critical_batches(found, "kfac")[0] == pytest.approx(0, abs=1e-9)
    assert critical_batches(found, "sgd") == {}


def test_files_are_written_and_finished_runs_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["autoencoder", "--out", str(tmp_path), "--optimizers", "sgd", "kfac", "--seeds", "0"]
    argv += ["--updates", "6", "--tune-updates", "2", "--eval-every", "2", "--batches", "32"]
    assert main(argv) == 0
    first = capsys.readouterr()
    assert main([*argv, "64"]) == 0
    second = capsys.readouterr()
    assert "seed 0" in first.err and second.err.count("kfac seed 0") == 1  # the new batch alone
    rows = list(csv.DictReader((tmp_path / "scaling.csv").open()))
    assert [(row["optimizer"], row["batch"]) for row in rows] == [
        (name, batch) for batch in ("32", "64") for name in ("sgd", "kfac")
    ]
    assert all(int(row["examples"]) == int(row["updates"]) * int(row["batch"]) for row in rows)
    assert (tmp_path / "summary.md").read_text() == second.out
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in ("figure", "curves"))


def test_runs_end_at_the_goal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the tuning too, of which the one with the fewest updates to it is chosen."""
    argv = ["autoencoder", "--out", str(tmp_path), "--optimizers", "sgd", "--seeds", "0"]
    argv += ["--updates", "40", "--tune-updates", "12", "--eval-every", "2", "--batches", "32"]
    assert main([*argv, "--goal", "40"]) == 0
    (row,) = csv.DictReader((tmp_path / "scaling.csv").open())
    updates = int(row["updates"])
    assert 0 < updates < 40 and float(row["final_train_loss"]) <= 40
    tuned = {}
    for path in (tmp_path / "batch32" / "tune" / "sgd").iterdir():
        last = list(csv.DictReader(path.read_text().splitlines()[1:]))[-1]
        tuned[path.stem] = (int(last["update"]), float(last["train_loss"]))
    there = {name: updates for name, (updates, loss) in tuned.items() if loss <= 40}
    (run,) = (tmp_path / "batch32" / "runs" / "sgd").iterdir()
    chosen = list(csv.DictReader(run.read_text().splitlines()[1:]))[-1]["setting"]
    assert there[chosen] == min(there.values()) < max(u for u, _ in tuned.values())
    assert "40" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [(("--batches", "4000"), "has 512 images"), (("--batches", "32", "32"), "given once")],
)
def test_bad_options_end_with_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert main(["autoencoder", "--out", str(tmp_path / "out"), *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "out").exists()
