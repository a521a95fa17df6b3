"""The comparison runs on the built-in data, writes what it says and continues where it was."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts.common import ScriptError
from scripts.contest import Outcome, Row, describe, read_rows
from scripts.supervised import __main__ as supervised
from scripts.supervised import report, settings
from scripts.supervised.__main__ import main
from scripts.supervised.plan import Plan
from scripts.supervised.problems import (
    Dataset,
    autoencoder,
    batches,
    convnet,
    load,
    make_problem,
)
from scripts.supervised.settings import RECIPES, Curvature, ProblemName
from scripts.supervised.training import RunSpec, Stepper, train, write_rows

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--tune-updates", "3", "--seeds", "0", "1")
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
    fixed = ("optimizer", "seed", "setting", "update", "epoch")
    assert tuple(rows[0]) == (*fixed, "seconds", "train_loss", "test_loss")
    assert [row["update"] for row in rows] == ["0", "8", "16"]
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
    text = (tmp_path / "summary.md").read_text()
    for name in ("sgd", "adam"):
        losses = {}
        for setting in RECIPES["autoencoder"][name].grid:
            rows = table(tmp_path / "tune" / name / f"lr={setting['lr']:g}.csv")
            assert (rows[-1]["update"], rows[-1]["seed"]) == ("3", "1000")
            losses[setting["lr"]] = float(rows[-1]["train_loss"])
        best = min(losses, key=losses.__getitem__)
        for lr, loss in losses.items():
            (line,) = [x for x in text.splitlines() if x.startswith(f"| {name} | lr={lr:g} | ")]
            assert f"| {loss:.5g} |" in line and line.endswith("| yes |") == (lr == best)
        assert table(tmp_path / "runs" / name / "seed0.csv")[0]["setting"] == f"lr={best:g}"
        at_end = best in (min(losses), max(losses))
        assert (f"{name} lr" in text.partition("At an end of its grid: ")[2]) == at_end
    assert f"torch {torch.__version__}" in text and "--tune-updates 3" in text


def test_all_four_optimizers_lower_the_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    epochs = ("--epochs", "kfac=2", "kfac-adaptive=2", "sgd=2", "adam=2")
    code, out, err = run(capsys, tmp_path, *TINY, *epochs)
    assert code == 0, err
    for name in ("kfac", "kfac-adaptive", "sgd", "adam"):
        rows = table(tmp_path / "runs" / name / "seed0.csv")
        losses = [float(row["train_loss"]) for row in rows]
        assert losses[-1] < 0.95 * losses[0], name
    for pair in ("sgd/kfac", "sgd/kfac-adaptive", "adam/kfac", "adam/kfac-adaptive"):
        assert f"| {pair} | updates | " in out


def test_other_settings_in_the_same_folder_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ("--optimizers", "sgd", "--epochs", "sgd=1")
    assert run(capsys, tmp_path, *TINY, *fixed)[0] == 0
    before = stamps(tmp_path)
    code, _, err = run(capsys, tmp_path, *TINY, *fixed[:-1], "sgd=2")
    file = tmp_path / "runs" / "sgd" / "seed0.csv"
    assert code == 2
    assert err.splitlines()[-1] == (
        f"supervised: error: {file}: made with updates 8, not 16; "
        "choose another --out or delete the file"
    )
    assert stamps(tmp_path) == before


@pytest.mark.slow
def test_ctrl_c_keeps_finished_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.supervised", "autoencoder", *TINY]
    long = ["--optimizers", "sgd", "--epochs", "sgd=100000"]
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [*command, *long, "--out", str(tmp_path), "--eval-every", "20"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    while not process.stderr.readline().startswith("sgd seed 0 "):
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("supervised: stopped; finished runs are kept")
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["tune"]


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
    curvature=None,
)


def problem_of(name: ProblemName) -> Any:
    return make_problem(name, load(None, name), (16, 4))


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
    setting = {"kl_clip": 1.0, "damping": 9.0}
    step = Stepper("kfac", problem, network, setting, curvature, 0)
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


def test_threshold_and_ratios_on_curves_made_by_hand() -> None:
    def curve(*points: tuple[int, float]) -> list[Row]:
        return [Row(update, update / 10, loss, loss) for update, loss in points]

    outcome = Outcome(
        tuning={"kfac": [], "sgd": []},
        settings={"kfac": {"lr": 1.0}, "sgd": {"lr": 0.1}},
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
        updates_per_epoch=5,
        base=SPEC,
    )
    assert report.threshold_of(outcome)[0] == 2.5
    assert report.ratios(outcome, 2.5, "sgd", "kfac") == {
        "updates": [10.0, 8.0, 9.0],
        "seconds": [10.0, 8.0, 9.0],
    }
    assert report.ratios(outcome, 1.5, "sgd", "kfac")["updates"] == [None, None, None]
    images = load(None, "autoencoder")
    text = report.markdown(plan, outcome, images, "c")
    assert "| sgd/kfac | updates | 10.00 | 8.00 | 9.00 |" in text
    assert "| sgd | 2.25 | 2.25 |" in text
    assert "| kfac | 1 | 10 | 1.0 | 1 | 1 | 5 | 0.5 |" in text
    outcome.runs["kfac", 1] = [Row(10, 1.0, math.inf, math.inf)]
    broken = report.markdown(plan, outcome, images, "c")
    assert "| kfac | diverged | diverged |" in broken
    assert "| kfac | 1 | 10 | 1.0 | diverged | diverged | not reached |  |" in broken
    assert report.figure(outcome, math.inf, "x")[:4] == b"\x89PNG"


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


PUBLISHED = {
    "autoencoder": (60_000, "--epochs adam=20 --eval-every 30"),
    "convnet": (
        50_000,
        "--optimizers kfac sgd adam --tune-updates 200 --epochs kfac=2 sgd=3 adam=3"
        " --eval-every 65 --measure 4000",
    ),
}


@pytest.mark.parametrize("problem", PUBLISHED)
def test_the_published_commands_go_on_where_the_published_files_end(problem: str) -> None:
    """What tells runs apart is what it was, so that finished runs are kept."""
    count, command = PUBLISHED[problem]
    folder = ROOT / "results" / "supervised" / problem
    x, y = np.zeros((count, 1, 1, 1), np.uint8), np.zeros(count, np.int64)
    data = Dataset("file.npz", x, y, x, y)
    plan = supervised.make_plan(supervised.options([problem, "--out", "x", *command.split()]), data)
    for name in plan.optimizers:
        tuned = {f"{describe(spec.setting)}.csv": spec for spec in plan.tuning_specs(name)}
        files = [folder / "tune" / name / file for file in tuned]
        files += [folder / "runs" / name / f"seed{seed}.csv" for seed in plan.seeds]
        for file in files:
            stored = json.loads(file.read_text().partition("\n")[0].removeprefix("#"))
            spec = tuned.get(file.name) or plan.full_spec(name, stored["seed"], stored["setting"])
            assert read_rows(file, replace(spec, data=stored["data"]))


def test_runs_with_other_adaptive_constants_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spec(name: str) -> RunSpec:
        asked = supervised.options(["autoencoder", "--out", "x", "--optimizers", name])
        plan = supervised.make_plan(asked, load(None, "autoencoder"))
        return plan.tuning_specs(name)[0]

    names = ("kfac", "kfac-adaptive", "sgd")
    before = {name: spec(name) for name in names}
    file = tmp_path / "a.csv"
    write_rows(file, before["kfac-adaptive"], [Row(0, 0.0, 1.0, 1.0)], 8)
    assert read_rows(file, before["kfac-adaptive"]) == [Row(0, 0.0, 1.0, 1.0)]
    monkeypatch.setitem(settings.ADAPTIVE_CLIP, "autoencoder", 0.5)
    assert spec("kfac") == before["kfac"] and spec("sgd") == before["sgd"]
    with pytest.raises(
        ScriptError, match=r"made with constants\.adaptive\.kl_clip 10\.0, not 0\.5;"
    ):
        read_rows(file, spec("kfac-adaptive"))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (("--nonsense",), "unrecognized arguments: --nonsense"),
        (("--seeds", "1", "1"), "each value may be given once"),
        (("--seeds", "1000"), "1000 is the seed of the tuning"),
        (("--epochs", "kfax=3"), "'kfax' is not among the optimizers"),
        (("--epochs", "sgd=nan"), "needs a number in (0, 100000], got 'nan'"),
        (("--data", "nowhere.npz"), "nowhere.npz: cannot read"),
        (("--out", "x" * 300), "argument --out: File name too long"),
    ],
)
def test_bad_options_end_with_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: tuple[str, ...], why: str
) -> None:
    code, shown, err = run(capsys, tmp_path / "out", *given)
    assert (code, shown) == (2, "")
    assert why in err
    assert err.startswith("supervised: error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
