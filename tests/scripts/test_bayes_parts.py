"""The bound, classifiers, HMC and active learning beside what is known of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scripts.bayes import active, classifiers, cost, elbo, hmc, mnist
from scripts.bayes.__main__ import main
from scripts.bayes.data import Raw
from scripts.bayes.elbo import divergence
from scripts.bayes.methods import METHODS, Method, make

RAW = Raw(
    torch.randn(140, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    torch.randn(140, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    torch.arange(100).expand(2, -1),
    torch.arange(100, 140).expand(2, -1),
    "",
)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "dropout"])
def test_divergences_of_networks_add_up_to_that_of_all(method: Method) -> None:
    splits = elbo.same_split("toy", RAW, 3)
    networks = make(method, splits, 5, 0)
    for _ in range(3):
        networks.update(splits.x_train[:10], splits.y_train[:10], torch.ones(3))
    found = divergence(networks.posterior)
    assert found.shape == (3,)
    assert len(set(found.tolist())) == 3
    assert float(found.sum().detach()) == pytest.approx(
        float(networks.posterior.kl().detach()), rel=1e-5
    )


def test_hmc_draws_from_a_gaussian() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.tensor([[1.0, 0.0], [0.8, 0.5]], dtype=torch.float64)
    mean = torch.tensor([1.0, -2.0], dtype=torch.float64)
    precision = torch.linalg.inv(root @ root.T)

    def potential(x: Tensor) -> Tensor:
        return 0.5 * ((x - mean) @ precision * (x - mean)).sum(1)

    start = torch.zeros(200, 2, dtype=torch.float64)
    drawn, accepted = hmc.sample(
        potential, start, warmup=60, samples=60, steps=10, generator=generator
    )
    assert 0.6 < float(accepted.mean()) < 0.95
    flat = drawn.flatten(0, 1)
    torch.testing.assert_close(flat.mean(0), mean, atol=0.06, rtol=0)
    torch.testing.assert_close(flat.T.cov(), root @ root.T, atol=0.08, rtol=0)


def test_a_trajectory_that_blows_up_is_rejected() -> None:
    start = torch.ones(3, 1, dtype=torch.float64)
    drawn, accepted = hmc.sample(
        lambda x: x.square().square().sum(1) * 1e6,
        start,
        warmup=0,
        samples=3,
        steps=10,
        size=100.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert not accepted.any()
    assert torch.equal(drawn, start.expand(3, 3, 1))


def test_calibration_error_of_known_confidences() -> None:
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    y = torch.tensor([0, 1, 0, 1])
    wanted = (abs(0.5 - 0.9) * 2 + abs(1.0 - 0.6) * 2) / 4
    assert mnist.calibration_error(p, y) == pytest.approx(wanted, abs=1e-6)


def test_images_are_turned_about_their_centre() -> None:
    images = torch.rand(2, 6, 6, 1)
    torch.testing.assert_close(mnist.turned(images, 0), images, atol=1e-5, rtol=0)
    quarter = mnist.turned(images, 90)
    turns = [torch.rot90(images, k, (1, 2)) for k in (1, 3)]
    assert any(torch.allclose(quarter, turn, atol=1e-5) for turn in turns)


def test_laplace_of_the_last_layer_is_the_posterior_of_its_quadratic_model() -> None:
    """The spread of samples is H^-1, with H by autograd."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3))
    x, y = torch.randn(50, 3), torch.randint(3, (50,))
    rows = model[:-1](x).detach().double()
    bias = torch.ones(50, 1, dtype=torch.float64)
    rows = torch.cat([rows, bias], 1)
    weight = torch.cat([model[2].weight, model[2].bias[:, None]], 1).detach().double()

    def objective(flat: Tensor) -> Tensor:
        logits = rows @ flat.view(3, 3).T
        return nn.functional.cross_entropy(logits, y, reduction="sum") + 0.5 * flat.square().sum()

    exact = torch.autograd.functional.hessian(objective, weight.flatten())
    found = classifiers.last_layer_precision(rows, (rows @ weight.T).softmax(1))
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


def test_chosen_points_leave_the_pool_and_variances_correlate_with_themselves() -> None:
    begin, steps = active.beginnings(RAW, 2, 0), list[float]()
    assert [part.shape[1] for part in begin] == [20, 100, 20]
    rows = torch.cat(begin, 1).sort(1).values
    assert torch.equal(rows, torch.arange(140).expand(2, -1))
    one = torch.rand(30, 2)
    assert active.correlations(one, 3 * one + 1) == pytest.approx([1.0, 1.0])
    assert active.correlations(one, -one) == pytest.approx([-1.0, -1.0])
    fit = active.Fits("ffg", 2, steps.append)
    for way in (False, True):
        found = active.acquire(fit, RAW, begin, active=way)
        assert found.shape == (2,)
        assert bool(found.isfinite().all())


def test_digits_are_classified_and_finished_runs_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ivon")
    line = ["mnist", "--out", str(tmp_path), "--epochs", "1", "--seeds", "0"]
    assert main(line) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "summary.md").read_text()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*.csv")}
    assert len(files) == len(classifiers.CLASSIFIERS)
    assert main(line) == 0
    assert files == {path: path.stat().st_mtime_ns for path in files}
    capsys.readouterr()
    assert main([*line[:3], "--images", "600"]) == 2
    assert "needs an integer in [100, 512], got 600" in capsys.readouterr().err
    assert not math.isnan(float(next(iter(files)).read_text().splitlines()[2].split(",")[1]))


def test_a_noisy_step_is_timed_beside_plain_ones_of_the_same_structure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spent = iter(range(1000))
    monkeypatch.setattr(cost, "seconds", lambda step: (step(), float(next(spent)))[1])
    calls: list[str] = []
    cycles = cost.in_turn(lambda: calls.append("plain"), lambda: calls.append("noisy"), 2)
    assert calls == ["plain", "noisy"] * 20 * 3  # with the first cycle, which is not counted
    assert cycles == [(40 + 19.0, 40 + 20.0), (80 + 19.0, 80 + 20.0)]


def test_a_sample_holds_the_mean_and_the_noise_beside_itself() -> None:
    own, held = cost.sample_bytes(cost.config("mvg"))
    assert own == 4 * (785 * 200 + 201 * 200 + 201 * 10)
    assert 2 * own <= held <= 2.01 * own


def test_the_cost_of_noise_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "in_turn", lambda theirs, ours, cycles: [(0.01, 0.013)] * cycles)
    monkeypatch.setattr(cost, "sample_bytes", lambda settings: (2**20, 2**21))
    assert main(["cost", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "summary.md").read_text()
    assert "| mvg | 10.00 | 13.00 | 1.30 | 1.00 | 2.00 |" in text
    assert [f"| {name} |" in text for name in ("ffg", "emvg", "tridiagonal")] == [True] * 3


@pytest.mark.parametrize(
    ("line", "files"),
    [
        (["elbo", "--set", "boston", "--seeds", "2", "--epochs", "2"], {"bbb", "ffg", "mvg"}),
        (
            ["active", "--sets", "boston", "--repeats", "2", "--epochs", "2", "--hmc", "4"],
            {"boston-ffg", "boston-mvg", "boston-hmc"},
        ),
    ],
    ids=["elbo", "active"],
)
def test_what_is_finished_is_kept_and_the_same_command_continues(
    line: list[str], files: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = np.stack([np.random.default_rng(s).permutation(140) for s in range(2)])
    np.savez(
        tmp_path / "boston.npz",
        X=RAW.x.numpy(),
        y=RAW.y.numpy(),
        train_idx=order[:, :100],
        test_idx=order[:, 100:],
    )
    line = [*line, "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(line) == 0
    text, runs = (tmp_path / "out/summary.md").read_text(), tmp_path / "out" / "runs"
    assert {path.stem for path in runs.iterdir()} == files
    made = {path: path.read_text() for path in runs.iterdir() if "mvg" not in path.stem}
    (lost,) = set(runs.iterdir()) - made.keys()
    lost.unlink()
    stamps = {path: path.stat().st_mtime_ns for path in made}
    assert main(line) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in made} and lost.is_file()
    # Seconds are those of each run.
    assert "active" not in line or (tmp_path / "out/summary.md").read_text() == text
    capsys.readouterr()
    assert main([*line, "--epochs", "3"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
