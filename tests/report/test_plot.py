from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from acktr.report.plot import plot_runs
from acktr.report.references import published_curves
from acktr.runs.folder import RunError, RunFolder
from acktr.runs.logger import RunLogger
from acktr.train import Episode, TrainStats
from tests.tools.run_folders import make_run


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_plotted_numbers(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", np.arange(30.0), 1, seed=1)  # steps 1000 to 30000
    b = make_run(tmp_path / "b", np.full(40, 2.0), 2, seed=2)  # steps 1000 to 20000
    c = make_run(tmp_path / "c", np.full(10, 5.0), 1, env="PongNoFrameskip-v4", seed=3)
    young = make_run(tmp_path / "seed7", np.empty(0))
    drawn = plot_runs([a, b, c, young], tmp_path / "x.png", published=["acktr"], title="$T$")
    numbers = drawn.numbers
    assert drawn.left_out == [f"{tmp_path.parent.name}/{tmp_path.name}/seed7"]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert numbers == tmp_path / "x.csv"
    rows = table(numbers)
    assert {(row["env"], row["kind"], row["name"]) for row in rows} == {
        ("HalfCheetah-v5", "run", "seed 1"),
        ("HalfCheetah-v5", "run", "seed 2"),
        ("HalfCheetah-v5", "mean", "acktr, mean of 2 runs"),
        *(
            (env, "published", curve.label)
            for env in ("HalfCheetah-v5", "PongNoFrameskip-v4")
            for curve in published_curves(env)
        ),
        ("PongNoFrameskip-v4", "run", "seed 3"),
        ("PongNoFrameskip-v4", "mean", "acktr, 1 run"),
    }
    first = [row for row in rows if row["name"] == "seed 1"]
    assert [float(row["return"]) for row in first] == [k / 2 for k in range(30)]
    assert [float(row["step"]) for row in first] == [1000.0 * (k + 1) for k in range(30)]
    mean = [row for row in rows if row["name"] == "acktr, mean of 2 runs"]
    assert float(mean[0]["step"]) == 1000 and float(mean[-1]["step"]) == 20000
    for row in mean:  # a's curve is (step / 1000 - 1) / 2, b's is 2
        expected = ((float(row["step"]) / 1000 - 1) / 2 + 2) / 2
        assert float(row["return"]) == pytest.approx(expected, abs=1e-6)


def test_svg_and_repeated_plots(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", np.arange(5000.0), 1)
    for _ in range(2):
        plot_runs([run], tmp_path / "x.svg")
    assert b"<svg" in (tmp_path / "x.svg").read_bytes()
    rows = [row for row in table(tmp_path / "x.csv") if row["kind"] == "run"]
    assert len(rows) == 2000
    assert (rows[0]["step"], rows[-1]["step"]) == ("1000", "5000000")


def test_runs_that_do_not_overlap_have_no_mean(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 100)):
        folder = RunFolder.create(tmp_path / name)
        folder.write_config({"env": "X-v0", "algo": "acktr", "seed": 0})
        with RunLogger(folder, "X-v0") as logger:
            for k in (1, 2):
                logger.write(TrainStats(first + k, k, {}, (Episode(1.0, 1, 0.0),)))
    plot_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "x.png")
    assert {row["kind"] for row in table(tmp_path / "x.csv")} == {"run"}


def test_numbers_are_not_left_without_their_picture(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "run", np.arange(9.0))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=r"folder\.png: cannot write: is a folder"):
        plot_runs([run], tmp_path / "folder.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "run"]


def test_refusals_write_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", np.arange(3.0))
    empty = make_run(tmp_path / "seed7", np.empty(0))
    odd = make_run(tmp_path / "c", np.arange(3.0), env="a\nb")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    out = tmp_path / "x.png"
    for runs, target, why in (
        ([run], tmp_path / "x.pdf", "must end in .png or .svg"),
        ([], out, "no runs"),
        ([empty], out, "seed7/monitor.csv: no episode has ended yet"),
        ([odd], out, "env must be a printable name"),
        ([run], run / "progress.png", "progress.csv: would be replaced"),
        ([run], tmp_path / "missing" / "x.png", "cannot write: No such file"),
    ):
        with pytest.raises(ValueError, match=why) as caught:
            plot_runs(runs, target)
        assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="no such folder"):
        plot_runs([tmp_path / "nowhere"], out)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
