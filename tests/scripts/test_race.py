"""The race runs on built-in data, writes what it says and continues where it was."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from acktr.kfac import CategoricalLoss
from scripts.contest import Row
from scripts.race import cost, pace, racers
from scripts.race.__main__ import main
from scripts.race.problems import PROBLEMS, make, measured, objective
from scripts.race.report import at_seconds, at_update

SHORT = ("--seconds", "0.3", "--tune-seconds", "0.05")


def race(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([*options])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_race_writes_its_tables_and_keeps_what_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "ROUNDS", 1)
    asked = ("autoencoder", "--out", str(tmp_path), *SHORT, "--seeds", "0")
    names = ("kfac", "kfac-default", "adam")
    code, out, err = race(capsys, *asked, "--optimizers", *names)
    assert code == 0, err
    assert out == (tmp_path / "summary.md").read_text()
    assert "| optimizer | ms per update | 0.1 s | 0.2 s | 0.3 s |" in out
    assert [out.count(f"\n| {name} |") for name in names] == [6, 2, 8]
    files = {path: path.read_bytes() for path in tmp_path.glob("*/*/*.csv")}
    assert len(files) == 4 + 6 + 3
    paces = (tmp_path / "pace.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in paces] == ["optimizer", *names]

    (tmp_path / "runs" / "adam" / "seed0.csv").unlink()
    assert race(capsys, *asked, "--optimizers", *names)[0] == 0
    again = {path: path.read_bytes() for path in tmp_path.glob("*/*/*.csv")}
    assert {path.parent.name for path in files if again[path] != files[path]} == {"adam"}

    short = (*asked, "--optimizers", *names, "--seconds", "0.15")
    code, less, err = race(capsys, *short)  # of the same runs less is charged
    assert code == 0, err
    assert {path: path.read_bytes() for path in tmp_path.glob("*/*/*.csv")} == again
    assert "| 0.05 s | 0.1 s | 0.15 s |" in less

    (tmp_path / "pace.csv").write_text("optimizer,start,each\nadam,0,1\n")
    code, _, err = race(capsys, *short)
    assert code == 2 and "seconds must be positive; delete it" in err.splitlines()[-1]


def test_a_pace_charges_first_updates_apart() -> None:
    mine = pace.Pace(start=0.5, each=0.1)
    assert mine.seconds(pace.START + 5) == pytest.approx(0.5 * pace.START + 0.5)
    for update in (1, pace.START, pace.START + 7):
        assert mine.updates(mine.seconds(update) + 1e-9) == update


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", ["kfac", "kfac-adaptive", "kfac-default"])
def test_kfac_lowers_every_loss(problem: str, name: str) -> None:
    task = make(problem, None)
    torch.manual_seed(0)
    network = task.network()
    before = measured(task, network, task.train)
    setting = {} if name == "kfac-default" else {"kl_clip": 0.1, "damping": 0.1}
    step, stream = racers.build(name, task, network, setting, 0), task.stream(0)
    inputs, targets = next(stream)
    output = network(inputs)
    torch.testing.assert_close(task.loss(output, targets), objective(task, output, targets))
    step(inputs, targets)
    for _ in range(8):
        step(*next(stream))
    assert measured(task, network, task.train) < before


def test_no_peer_has_fewer_settings_than_kfac() -> None:
    for grids in racers.GRIDS.values():
        settings = {name: len(grid) for name, grid in grids.items() if not name.endswith("default")}
        assert {settings.pop("kfac"), settings.pop("kfac-adaptive")} == {4}
        assert set(settings.values()) == {6}


def test_windows_of_a_text_predict_the_next_character(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abc" * 1000)
    task = make("transformer", path)
    inputs, targets = next(task.stream(0))
    assert inputs.shape == targets.shape == (32, 64)
    assert torch.equal((inputs + 1) % 3, targets)
    logits = 50 * functional.one_hot((inputs + 1) % 3, 3).float()
    assert float(objective(task, logits, targets)) < 1e-6
    network = task.network()
    early = network(inputs)[:, :10]
    torch.testing.assert_close(early, network(inputs[:, :10]))  # it sees no later characters


def test_the_cost_of_an_update_is_told_beside_sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    def net() -> cost.Net:
        inputs = torch.randn(8, 4)
        return cost.Net(
            "tiny", torch.nn.Linear(4, 3), inputs, torch.arange(8) % 3, CategoricalLoss()
        )

    clock = itertools.count()
    monkeypatch.setattr(time, "process_time", lambda: float(next(clock)))
    for name, (package, build) in cost.OPTIMIZERS.items():
        if package is None:
            assert cost.ratio(net, build, 5) == [1.0, 1.0], name
    inputs = cost.autoencoder().inputs
    assert cost.autoencoder().network(inputs).shape == inputs.shape == (1000, 784)
    assert [len(list(build_net().network.parameters())) for build_net in cost.NETS] == [16, 12, 54]


def test_losses_are_read_at_marks() -> None:
    rows = [Row(0, 0.0, 9.0, 9.0), Row(40, 4.5, 5.0, 5.0), Row(60, 10.0, 3.0, 4.0)]
    assert [at_seconds(rows, mark) for mark in (4, 5, 20)] == [9.0, 5.0, 3.0]
    assert [at_update(rows, mark) for mark in (40, 120)] == [5.0, None]
    assert at_seconds([*rows, Row(61, 10.1, float("inf"), float("inf"))], 5) == float("inf")


def test_bad_input_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (("--seeds", "1000"), "1000 is the seed of the tuning"),
        (("--data", str(tmp_path / "none.txt")), "none.txt: cannot read as text"),
    ):
        code, _, err = race(capsys, "transformer", "--out", str(tmp_path / "out"), *options)
        assert code == 2 and message in err.splitlines()[-1]
