"""The regression study reads its sets, trains all splits at once, resumes and reports."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from scripts.bayes import report
from scripts.bayes.__main__ import main
from scripts.bayes.data import load
from scripts.bayes.methods import METHODS
from scripts.bayes.training import Budget, Score, Training, predictive_log_likelihood
from scripts.common import ScriptError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with two small sets, of a line with noise; the last input is constant."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("yacht", 60), ("boston", 40)):
        x = np.concatenate([rng.normal(3, 5, (count, 3)), np.ones((count, 1))], 1)
        y = x @ [1.0, -2.0, 0.5, 0.0] + rng.normal(0, 1, count) + 100
        order = np.stack([rng.permutation(count) for _ in range(3)]).astype(np.int32)
        parts = {"train_idx": order[:, :-10], "test_idx": order[:, -10:]}
        np.savez(folder / f"{name}.npz", X=x, y=y, **parts)
    return folder


def test_parts_are_standardised_by_their_training_rows(data: Path) -> None:
    splits = load(data, "yacht", 2)
    raw = np.load(data / "yacht.npz")
    assert (splits.data_size, splits.count, splits.inputs) == (50, 2, 4)
    for s in range(2):
        train, test = raw["train_idx"][s], raw["test_idx"][s]
        mean, std = raw["X"][train].mean(0), raw["X"][train].std(0)
        std[std == 0] = 1
        for found, rows in ((splits.x_train, train), (splits.x_test, test)):
            wanted = ((raw["X"][rows] - mean) / std).astype(np.float32)
            np.testing.assert_allclose(found[:, s].numpy(), wanted, atol=1e-6)
        y, scale = raw["y"], raw["y"][train].std()
        assert float(splits.scale[s]) == pytest.approx(scale)
        wanted = ((y[test] - y[train].mean()) / scale).astype(np.float32)
        np.testing.assert_allclose(splits.y_test[:, s].numpy(), wanted, atol=1e-5)
    assert not splits.x_test[..., -1].any()


def test_splits_are_trained_apart(data: Path) -> None:
    """Data of one split that are not finite spoil that split alone."""
    splits = load(data, "yacht")
    splits.y_train[:, 1] = torch.nan
    training = Training("dropout", splits, Budget(1, 10, 5, (6.0, 6.0), 0))
    training.epoch()
    finite = [score.finite for score in training.scores()]
    assert finite == [True, False, True]


def test_log_likelihood_is_that_of_the_mixture() -> None:
    outputs, target = torch.tensor([[[0.0]], [[2.0]]]), torch.tensor([[0.5]])
    precisions = torch.tensor([[1.0], [4.0]])
    found = predictive_log_likelihood(outputs, target, precisions)
    density = (stats.norm.pdf(0.5, 0, 1) + stats.norm.pdf(0.5, 2, 0.5)) / 2
    assert float(found) == pytest.approx(math.log(density), rel=1e-6)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (3, 3), (9, 1), (0, 20), (4, 7)])
def test_sign_test(better: int, worse: int) -> None:
    count = better + worse
    wanted = stats.binomtest(better, count).pvalue if count else 1.0
    assert report.sign_test(better, worse) == pytest.approx(wanted, abs=1e-12)


def test_pairs_count_the_better_splits_of_each_measure() -> None:
    def scores(rmse: list[float], likelihood: list[float]) -> list[Score]:
        pairs = enumerate(zip(rmse, likelihood, strict=True))
        return [Score(split, r, ll, 0.0, 1.0) for split, (r, ll) in pairs]

    mvg = scores([1.0, 2.0, 3.0], [-1.0, -1.0, -3.0])
    bbb = scores([2.0, 3.0, 1.0], [-2.0, -1.0, -4.0])
    rmse, likelihood = report.pairs({("yacht", "bbb"): bbb, ("yacht", "mvg"): mvg})
    assert (rmse.method, rmse.other, rmse.better, rmse.splits) == ("mvg", "bbb", 2, 3)
    assert rmse.difference == pytest.approx(0.0)
    assert rmse.error == pytest.approx(1.0)
    assert (likelihood.better, likelihood.splits, likelihood.p) == (2, 2, 0.5)
    lost = [*mvg[:2], Score(2, math.nan, math.nan, math.nan, math.nan)]
    assert report.pairs({("yacht", "bbb"): bbb, ("yacht", "mvg"): lost}) == []
    assert report.summary(lost, "rmse") == "diverged"


def run(data: Path, out: Path, *options: str) -> int:
    arguments = ("--data", str(data), "--out", str(out), "--sets", "yacht", *options)
    return main(["uci", *arguments])


def test_every_method_is_trained_and_finished_cells_are_kept(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(data, out, "--epochs", "2", "--splits", "2") == 0
    files = {path: path.stat().st_mtime_ns for path in out.glob("yacht/*.csv")}
    assert {path.stem for path in files} == set(METHODS)
    for path in files:
        rows = list(csv.DictReader(path.read_text().splitlines()[1:]))
        assert [row["split"] for row in rows] == ["0", "1"]
        assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    text = (out / "summary.md").read_text()
    assert text == capsys.readouterr().out
    assert all(f"| mvg - {method} |" in text for method in METHODS if method != "mvg")
    assert "| mvg-factored - bbb |" in text and "| mvg-factored - mvg |" not in text
    assert "paper (recalled): mvg" in text
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    (out / "yacht" / "ffg.csv").unlink()
    assert run(data, out, "--epochs", "2", "--splits", "2") == 0
    assert (out / "summary.md").read_text() == text
    kept = {path: path.stat().st_mtime_ns for path in files if path.stem != "ffg"}
    assert kept == {path: time for path, time in files.items() if path.stem != "ffg"}
    capsys.readouterr()
    assert run(data, out, "--epochs", "3", "--splits", "2") == 2
    assert "made with epochs 2, not 3" in capsys.readouterr().err


def test_bad_input_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    cases = {
        "yacht has 3 splits, not 4": ("--splits", "4"),
        "--noise-prior": ("--noise-prior", "0", "1"),
        "each value may be given once": ("--methods", "mvg", "mvg"),
        "invalid choice: 'svi'": ("--methods", "svi"),
        "energy.npz: no such file; --data is a folder with NAME.npz": ("--sets", "energy"),
    }
    for message, options in cases.items():
        assert run(data, out, *options) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not out.exists()
    assert main(["vime"]) == 2


@pytest.mark.parametrize(
    "broken",
    [
        {"train_idx": np.array([[0, 60]])},
        {"test_idx": np.array([0, 1])},
        {"y": np.zeros((60, 1))},
        {"X": np.full((60, 4), np.nan)},
        {"X": np.zeros((60, 4), dtype=np.int64)},
    ],
)
def test_another_layout_is_refused(data: Path, broken: dict[str, np.ndarray]) -> None:
    with np.load(data / "yacht.npz") as known:
        np.savez(data / "yacht.npz", **{**known, **broken})
    with pytest.raises(ScriptError, match=r"yacht\.npz: "):
        load(data, "yacht")
