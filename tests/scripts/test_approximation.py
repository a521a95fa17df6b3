"""The study of approximations measures what it says and writes a table and a figure."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scripts.approximation import study
from scripts.approximation.__main__ import main
from scripts.approximation.digits import digits

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--width", "3", "--hidden", "4", "--samples", "60", "--steps", "5")
SIZES = (2, 3, 1, 2)


def positive(size: int = 8) -> Tensor:
    root = torch.randn(
        size, 2 * size, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    return root @ root.mT / size


def test_completion_keeps_the_band_and_has_a_tridiagonal_inverse() -> None:
    matrix = positive()
    found = study.tridiagonal_completion(matrix, SIZES)
    layer = torch.arange(4).repeat_interleave(torch.tensor(SIZES))
    near = (layer[:, None] - layer).abs() <= 1
    torch.testing.assert_close(found[near], matrix[near])
    inverse = torch.linalg.inv(found)
    assert inverse[~near].abs().max() < 1e-12
    assert torch.linalg.inv(matrix)[~near].abs().max() > 0.01


def test_block_diagonal_and_means_of_layers() -> None:
    matrix = positive()
    found = study.block_diagonal(matrix, SIZES)
    pieces = [found[:2, :2], found[2:5, 2:5], found[5:6, 5:6], found[6:, 6:]]
    assert sum(float(p.square().sum()) for p in pieces) == pytest.approx(
        float(found.square().sum())
    )
    torch.testing.assert_close(found[2:5, 2:5], matrix[2:5, 2:5])
    means = study.layer_means(matrix, SIZES)
    torch.testing.assert_close(means[1, 3], matrix[2:5, 6:].abs().mean())


def test_the_exact_matrix_has_no_error_and_the_order_is_right() -> None:
    settings = study.Settings(samples=60, steps=5, width=3, hidden=4)
    problem = study.trained(settings)
    fisher = study.exact_fisher(problem)
    named = [(n, p) for n, p in problem.model.named_parameters() if p.requires_grad]
    assert [name for name, _ in named] == [
        f"{i}.{k}" for i in (2, 4, 6) for k in ("weight", "bias")
    ]
    assert problem.sizes == (12, 12, 12)
    found = dict(study.candidates(problem, fisher, 0.01))
    assert tuple(found) == study.METHODS
    exact = found["exact"]
    eye = torch.eye(36, dtype=torch.float64)
    for name, candidate in found.items():
        torch.testing.assert_close(candidate.matrix @ candidate.inverse, eye, rtol=0, atol=1e-8)
        row = study.compare(problem, exact, name, candidate, 0.01)
        if name == "exact":
            assert max(row.matrix, row.blocks, row.inverse) < 1e-12
            assert row.cosine == pytest.approx(1) and row.decrease == pytest.approx(1)
        else:
            assert row.matrix > 0.01 and row.inverse > 0.01
            assert 0 < row.decrease < 1 and row.cosine < 1
    # Written out: the decrease along a direction, and with the exact Fisher from autograd.
    direction = found["K-FAC"].inverse @ problem.gradient
    scores = torch.linspace(-5, 5, 20001, dtype=torch.float64)
    slope = problem.gradient @ direction
    curved = direction @ (fisher + 0.01 * eye) @ direction
    best = float((scores * slope - scores.square() * curved / 2).max())
    full = problem.gradient @ torch.linalg.solve(fisher + 0.01 * eye, problem.gradient) / 2
    row = study.compare(problem, exact, "K-FAC", found["K-FAC"], 0.01)
    assert row.decrease == pytest.approx(best / float(full), rel=1e-4)


def test_digits_are_ten_classes_that_differ() -> None:
    images, labels = digits(500, torch.Generator().manual_seed(0))
    again, _ = digits(500, torch.Generator().manual_seed(0))
    assert images.shape == (500, 256) and images.dtype == torch.float64
    assert torch.equal(images, again)
    means = torch.stack([images[labels == k].mean(0) for k in range(10)])
    nearest = torch.cdist(images, means).argmin(1)
    assert float((nearest == labels).double().mean()) > 0.6


def test_results_are_written_and_repeat(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.approximation", *SMALL, "--out", str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert main([*SMALL, "--out", str(tmp_path / "b")]) == 0
    tables = [(tmp_path / name / "table.csv").read_text() for name in ("a", "b")]
    assert (tmp_path / "a" / "figure.png").read_bytes().startswith(b"\x89PNG")
    cells = [[float(v) for r in csv.reader(t.splitlines()[1:]) for v in r[1:]] for t in tables]
    assert cells[0] == pytest.approx(cells[1], rel=1e-6, abs=1e-9)
    rows = list(csv.DictReader(tables[0].splitlines()))
    assert [row["method"] for row in rows] == 3 * list(study.METHODS)
    text = (tmp_path / "a" / "table.md").read_text()
    assert f"--out {tmp_path / 'a'}`" in text
    assert f"| K-FAC | 0.01 | {float(rows[10]['matrix']):.4f} |" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden", "2"], "argument --hidden: needs an integer in [3, 100], got '2'"),
        (["--threads", "9999"], "argument --threads: needs an integer in [1, 1024], got '9999'"),
        (["--width", "100"], "--hidden 5 --width 100 make a matrix of 40400 rows: at most 4000"),
    ],
)
def test_bad_options_get_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"approximation: error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_ctrl_c_stops_with_one_line(tmp_path: Path) -> None:
    """The signal comes while it trains, which 100,000 steps keep it doing for long."""
    begun = tmp_path / "begun"
    program = (
        "import sys, pathlib; sys.argv[:1] = []\n"
        "from scripts.approximation import __main__ as main, study\n"
        "def trained(settings):\n"
        f"    pathlib.Path({str(begun)!r}).touch()\n"
        "    return study.trained(settings)\n"
        "main.trained = trained\n"
        "raise SystemExit(main.main(sys.argv))\n"
    )
    search = str(ROOT)
    options = [*SMALL[:-1], "100000", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.startswith("approximation: stopped;") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
