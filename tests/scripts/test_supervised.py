"""The comparison runs on the built-in data, writes what it says and continues where it was."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.supervised import figure, report
from scripts.supervised.__main__ import main
from scripts.supervised.campaign import Outcome, Plan
from scripts.supervised.data import load
from scripts.supervised.problems import autoencoder, batches, convnet, make_problem
from scripts.supervised.progress import Tracker
from scripts.supervised.runs import COLUMNS, Row, RunSpec, read_rows, train, write_rows
from scripts.supervised.settings import RECIPES, ProblemName
from scripts.supervised.steppers import Curvature, make_stepper

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--widths", "16", "4", "--batch", "128", "--tune-updates", "3", "--seeds", "0", "1")
PLAIN = ("--optimizers", "sgd", "adam", "--epochs", "sgd=2", "adam=2")


def run(capsys: pytest.CaptureFixture[str], out: Path, *options: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["autoencoder", "--out", str(out), *options])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def table(path: Path) -> list[dict[str, str]]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


def stamps(out: Path) -> dict[str, tuple[int, bytes]]:
    files = [*out.glob("tune/*/*.csv"), *out.glob("runs/*/*.csv")]
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def test_all_files_are_written_and_finished_runs_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, tmp_path, *TINY, *PLAIN)
    assert code == 0, err
    assert out == (tmp_path / "summary.md").read_text()
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    before = stamps(tmp_path)
    assert len(before) == 2 * len(RECIPES["autoencoder"]["sgd"].grid) + 4
    rows = table(tmp_path / "runs" / "adam" / "seed1.csv")
    assert tuple(rows[0]) == COLUMNS
    assert [row["update"] for row in rows] == ["0", "4", "8"]
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert float(rows[2]["train_loss"]) < float(rows[0]["train_loss"])
    seconds = [float(row["seconds"]) for row in rows]
    assert 0 == seconds[0] < seconds[1] < seconds[2]

    (tmp_path / "runs" / "sgd" / "seed1.csv").unlink()
    more = run(capsys, tmp_path, *TINY, "2", *PLAIN)
    assert more[0] == 0
    after = stamps(tmp_path)
    new = {str(tmp_path / "runs" / name) for name in ("sgd/seed2.csv", "adam/seed2.csv")}
    assert after.keys() - before.keys() == new
    changed = [name for name in before if after[name] != before[name]]
    assert changed == [str(tmp_path / "runs" / "sgd" / "seed1.csv")]
    again = table(Path(changed[0]))
    old = before[changed[0]][1].decode().splitlines()[2:]
    assert [row["train_loss"] for row in again] == [line.split(",")[-2] for line in old]


def test_the_setting_with_the_lowest_loss_is_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, tmp_path, *TINY, *PLAIN)[0] == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    for name in ("sgd", "adam"):
        grid = summary["tuning"]["grids"][name]
        losses = []
        for entry in grid:
            rows = table(tmp_path / "tune" / name / f"lr={entry['setting']['lr']:g}.csv")
            assert rows[-1]["update"] == "3"
            assert rows[-1]["seed"] == "1000"
            losses.append(float(rows[-1]["train_loss"]))
        best = grid[losses.index(min(losses))]["setting"]
        assert summary["chosen"][name] == best
        assert table(tmp_path / "runs" / name / "seed0.csv")[0]["setting"] == f"lr={best['lr']:g}"
    assert summary["machine"]["torch"] == torch.__version__
    assert "--tune-updates 3" in summary["command"]
    text = (tmp_path / "summary.md").read_text()
    at_end = summary["chosen"]["sgd"]["lr"] in (1e-3, 3e-2)
    assert ("At an end of its grid: sgd lr" in text) == at_end


def test_all_four_optimizers_lower_the_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--fix", "kfac:kl_clip=10,damping=0.3", "kfac-adaptive:damping=9", "sgd:lr=0.01")
    epochs = ("--epochs", "kfac=3", "kfac-adaptive=3", "sgd=3", "adam=3")
    code, out, err = run(
        capsys, tmp_path, *TINY, *options, "adam:lr=0.01", *epochs, "--statistics-part", "2"
    )
    assert code == 0, err
    for name in ("kfac", "kfac-adaptive", "sgd", "adam"):
        rows = table(tmp_path / "runs" / name / "seed0.csv")
        losses = [float(row["train_loss"]) for row in rows]
        assert losses[-1] < 0.95 * losses[0], name
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["tuning"]["grids"] == {}
    assert set(summary["ratios"]) == {
        f"{slow}/{fast}" for slow in ("sgd", "adam") for fast in ("kfac", "kfac-adaptive")
    }
    assert "| kfac | kl_clip=10,damping=0.3 | | | given |" in out


def test_other_settings_in_the_same_folder_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ("--optimizers", "sgd", "--fix", "sgd:lr=0.01", "--epochs", "sgd=1")
    assert run(capsys, tmp_path, *TINY, *fixed)[0] == 0
    before = stamps(tmp_path)
    code, _, err = run(capsys, tmp_path, *TINY, *fixed[:-1], "sgd=2")
    file = tmp_path / "runs" / "sgd" / "seed0.csv"
    assert code == 2
    assert err == (
        f"supervised: error: {file}: made with updates 4, not 8; "
        "choose another --out or delete the file\n"
    )
    assert stamps(tmp_path) == before


def test_ctrl_c_keeps_finished_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.supervised", "autoencoder", *TINY]
    fixed = ["--optimizers", "sgd", "--fix", "sgd:lr=0.001", "--epochs", "sgd=100000"]
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [*command, *fixed, "--out", str(tmp_path), "--eval-every", "20"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    part = tmp_path / "runs" / "sgd" / "seed0.part"
    while not part.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("supervised: stopped; finished runs are kept")
    assert "Traceback" not in err
    assert not (tmp_path / "runs" / "sgd" / "seed0.csv").exists()


def test_overhead_of_the_convnet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--batch", "16", "--blocks", "2", "--block-updates", "10", "--warm-up", "2")
    code = main(["convnet", "--overhead", "--out", str(tmp_path), *options])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    found = json.loads((tmp_path / "overhead.json").read_text())
    sgd, kfac = found["contestants"]["sgd"], found["contestants"]["kfac"]
    assert sgd["ratio_to_sgd"] == 1
    assert {"forward", "fisher", "factors", "backward", "refresh", "apply"} <= kfac["parts"].keys()
    assert all(value > 0 for value in kfac["parts"].values())
    assert sum(kfac["parts"].values()) == pytest.approx(kfac["milliseconds"], rel=0.8)
    assert shown.out == (tmp_path / "overhead.md").read_text()


SPEC = RunSpec(
    problem="autoencoder",
    data="",
    widths=(16, 4),
    optimizer="sgd",
    seed=0,
    setting={"lr": 0.01},
    batch=64,
    updates=8,
    eval_every=8,
    device="cpu",
    curvature=None,
)


def problem_of(name: ProblemName) -> Any:
    return make_problem(name, load(None, name), (16, 4), torch.device("cpu"))


def test_sgd_of_a_run_is_plain_sgd() -> None:
    """The whole run against a loop written out with torch alone."""
    problem = problem_of("autoencoder")
    rows = train(SPEC, problem, lambda rows, update: None)
    torch.manual_seed(0)
    network = problem.network()
    images = torch.tensor(load(None, "autoencoder").x_train).reshape(512, 64) / 255
    decay = [{"params": p, "weight_decay": 1e-5 * (p.ndim == 2)} for p in network.parameters()]
    optimizer = torch.optim.SGD(decay, lr=0.01, momentum=0.9)
    bce = torch.nn.BCEWithLogitsLoss(reduction="sum")
    order = torch.randperm(512, generator=torch.Generator().manual_seed(0))
    for index in order.reshape(-1, 64):
        optimizer.zero_grad()
        loss = bce(network(images[index]), images[index]) / 64
        torch.autograd.backward(loss)
        optimizer.step()
    expected = float(bce(network(images), images).detach()) / 512
    assert rows[-1].train_loss == pytest.approx(expected, rel=1e-5)
    assert len(rows) == 2


@pytest.mark.parametrize("name", ["autoencoder", "convnet"])
def test_the_loss_of_kfac_is_the_objective(name: ProblemName) -> None:
    problem = problem_of(name)
    inputs, targets = problem.batch(problem.train, slice(0, 50))
    output = problem.network()(inputs)
    objective = problem.objective(output, targets)
    value = problem.loss(output, targets)
    assert value.item() == pytest.approx(objective.item(), rel=1e-6)
    assert problem.evaluate(problem.network(), problem.test) > 0


def test_a_run_that_diverges_ends_at_once(tmp_path: Path) -> None:
    spec = replace(SPEC, setting={"lr": 1e30}, updates=500, eval_every=500)
    rows = train(spec, problem_of("autoencoder"), lambda rows, update: None)
    assert rows[-1].train_loss == math.inf
    assert rows[-1].update == 20
    write_rows(tmp_path / "a.csv", spec, rows, 8)
    assert read_rows(tmp_path / "a.csv", spec) == [
        Row(
            r.update,
            float(f"{r.seconds:.9g}"),
            *(float(f"{v:.9g}") for v in (r.train_loss, r.test_loss)),
        )
        for r in rows
    ]


def test_statistics_come_from_part_of_the_batch() -> None:
    problem = problem_of("autoencoder")
    curvature = Curvature(statistics_part=4, statistics_every=2, refresh_every=10)
    sizes: list[int] = []
    network = problem.network()
    network.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    setting = {"lr": 1.0, "damping": 9.0}
    step = make_stepper("kfac", problem, network, setting, curvature, 0)
    stream = batches(512, 64, 0)
    for _ in range(3):
        step(*problem.batch(problem.train, next(stream)))
    assert sizes == [16, 64, 64, 16, 64]


def test_networks_have_the_stated_layers() -> None:
    def shapes(network: torch.nn.Sequential) -> list[str]:
        weighty = (torch.nn.Linear, torch.nn.Conv2d)
        return [
            f"{type(m).__name__}{tuple(m.weight.shape[:2])}" if isinstance(m, weighty) else "-"
            for m in network
        ]

    assert shapes(autoencoder(784, (1000, 500, 250, 30))) == [
        "Linear(1000, 784)", "-", "Linear(500, 1000)", "-", "Linear(250, 500)", "-",
        "Linear(30, 250)", "Linear(250, 30)", "-", "Linear(500, 250)", "-", "Linear(1000, 500)",
        "-", "Linear(784, 1000)",
    ]  # fmt: skip
    network = convnet(3, 32, 32, 10)
    assert [text for text in shapes(network) if text != "-"] == [
        "Conv2d(32, 3)", "Conv2d(64, 32)", "Conv2d(64, 64)", "Linear(128, 1024)", "Linear(10, 128)"
    ]  # fmt: skip
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_every_grid_of_a_problem_has_as_many_settings() -> None:
    for recipes in RECIPES.values():
        assert len({len(recipe.grid) for recipe in recipes.values()}) == 1


def test_batches_cover_an_epoch_once() -> None:
    stream = batches(10, 3, 5)
    first = torch.cat([next(stream) for _ in range(3)])
    assert len(set(first.tolist())) == 9
    second = torch.cat([next(stream) for _ in range(3)])
    assert first.tolist() != second.tolist()


def test_time_left_counts_each_optimizer_at_its_speed() -> None:
    tracker = Tracker()
    tracker.plan("sgd", 100)
    tracker.plan("kfac", 10)
    tracker.plan("adam", 4)
    assert tracker.remaining() is None
    tracker.add("sgd", 50, 50.0)
    tracker.add("kfac", 5, 60.0)
    assert tracker.remaining() == pytest.approx(50 * 1 + 5 * 12 + 4 * 2)
    assert tracker.share == pytest.approx(55 / 114)


def test_threshold_and_ratios_on_curves_made_by_hand() -> None:
    def curve(*points: tuple[int, float]) -> list[Row]:
        return [Row(update, update / 10, loss, loss) for update, loss in points]

    outcome = Outcome(
        chosen={"kfac": {"lr": 1.0}, "sgd": {"lr": 0.1}},
        runs={
            ("kfac", 0): curve((0, 9.0), (5, 3.0), (10, 1.0)),
            ("sgd", 0): curve((0, 9.0), (50, 3.0), (100, 2.0)),
            ("kfac", 1): curve((0, 9.0), (5, 2.5), (10, 1.0)),
            ("sgd", 1): curve((0, 9.0), (40, 2.4), (100, 2.5)),
        },
    )
    plan = Plan(
        optimizers=("kfac", "sgd"),
        seeds=(0, 1),
        updates={"kfac": 10, "sgd": 100},
        tune_updates=3,
        tune_seed=1000,
        fixed=outcome.chosen,
        updates_per_epoch=5,
        base=SPEC,
    )
    data = {"name": "x", "train_images": 1, "test_images": 1}
    summary = report.summarize(plan, outcome, command="c", data=data, threshold=None)
    assert summary["threshold"]["train_loss"] == 2.5
    found = summary["ratios"]["sgd/kfac"]
    assert found["updates"] == {"0": 10.0, "1": 8.0, "mean": 9.0}
    assert found["seconds"] == {"0": 10.0, "1": 8.0, "mean": 9.0}
    assert "| sgd/kfac | updates | 10.00 | 8.00 | 9.00 |" in report.markdown(summary)
    assert summary["means"] == {
        "kfac": {"train_loss": 1.0, "test_loss": 1.0},
        "sgd": {"train_loss": 2.25, "test_loss": 2.25},
    }
    assert "| sgd | 2.25 | 2.25 |" in report.markdown(summary)
    given = report.summarize(plan, outcome, command="c", data=data, threshold=1.5)
    assert given["ratios"]["sgd/kfac"]["updates"] == {"0": None, "1": None, "mean": None}
    assert "not reached" in report.markdown(given)
    outcome.runs["kfac", 1][-1] = Row(10, 1.0, math.inf, math.inf)
    broken = report.summarize(plan, outcome, command="c", data=data, threshold=1.5)
    assert broken["means"]["kfac"] == {"train_loss": None, "test_loss": None}
    assert "| kfac | diverged | diverged |" in report.markdown(broken)
    picture = figure.draw(outcome.runs, {"kfac": "kfac", "sgd": "sgd"}, 2.5, "x")
    assert picture[:4] == b"\x89PNG"


def test_losses_on_a_part_are_those_of_evenly_spread_images() -> None:
    problem = problem_of("autoencoder")
    network = problem.network()
    images = problem.train.images.float().div(255).flatten(1)
    chosen = images[[index * len(images) // 7 for index in range(7)]]
    expected = float(problem.objective(network(chosen), chosen))
    assert problem.evaluate(network, problem.train, 7) == pytest.approx(expected, rel=1e-5)
    whole = float(problem.objective(network(images), images))
    assert problem.evaluate(network, problem.train) == pytest.approx(whole, rel=1e-5)
    assert problem.evaluate(network, problem.train, 10**6) == pytest.approx(whole, rel=1e-5)
