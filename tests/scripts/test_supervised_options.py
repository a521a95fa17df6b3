"""Bad options end with one line and exit code 2, before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scripts.supervised import options
from scripts.supervised.__main__ import main
from scripts.supervised.settings import RECIPES


def run(capsys: pytest.CaptureFixture[str], out: Path, *given: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["autoencoder", "--out", str(out), *given])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (("--nonsense",), "unrecognized arguments: --nonsense"),
        (("--seeds", "x"), "argument --seeds: needs an integer >= 0, got 'x'"),
        (("--seeds", "1", "1"), "each value may be given once"),
        (("--seeds", "1000"), "1000 is among --seeds"),
        (("--batch", "0"), "needs an integer >= 1"),
        (("--batch", "513"), "513 is more than the 512 training images"),
        (("--epochs", "kfax=3"), "'kfax' is not among the optimizers"),
        (("--epochs", "sgd=nan"), "needs a number in (0, 1e+09], got 'nan'"),
        (("--fix", "sgd:damping=1"), "sgd needs lr, got damping"),
        (("--fix", "sgd:lr=1e300"), "argument --fix: needs a number in (0, 1e+30], got '1e300'"),
        (("--fix", "kfac-adaptive:damping=1e9"), "must lie in [0.1, 10000], got 1e+09"),
        (("--fix", "kfac-adaptive:damping=1e-9"), "must lie in [0.1, 10000], got 1e-09"),
        (("--epochs", "sgd=1e300"), "argument --epochs: needs a number in (0, 1e+09], got '1e300'"),
        (("--epochs", "sgd=1.7e308"), "needs a number in (0, 1e+09], got '1.7e308'"),
        (("--epochs", "sgd=1e9"), "of 8 updates are too many: at most 1.25e+08 epochs fit"),
        (("--tune-epochs", "1e9"), "argument --tune-epochs: 1e+09 epochs of 8 updates are too"),
        (("--tune-updates", "9999999999"), "needs an integer in [1, 1000000000]"),
        (("--threshold", "1e300"), "needs a number in (0, 1e+30]"),
        (("--widths", "99999999999"), "argument --widths: needs an integer in [1, 20000]"),
        (("--widths", "20000", "20000"), "802,620,064 parameters, at most 268,435,456 fit"),
        (("--threads", "100000000"), "argument --threads: needs an integer in [1, 1024]"),
        (("--optimizers", "rmsprop"), "invalid choice: 'rmsprop'"),
        (("--device", "tpu"), "device must be auto, cpu, cuda"),
        (("--data", "nowhere.npz"), "nowhere.npz: cannot read"),
        (("--overhead", "--block-updates", "7"), "7 must be a multiple"),
    ],
)
def test_bad_options_end_with_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: tuple[str, ...], why: str
) -> None:
    out = tmp_path / "out"
    code, shown, err = run(capsys, out, *given)
    assert code == 2
    assert shown == ""
    assert why in err
    assert err.startswith("supervised: error: ")
    assert err.count("\n") == 1
    assert not out.exists()


def test_the_example_of_fix_in_the_help_is_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        options.parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    example = shown.partition("instead of tuning, for example ")[2].split()[0]
    assert example.startswith("kfac:")
    for problem in RECIPES:
        chosen = options.parse([problem, "--out", str(tmp_path), "--fix", example])
        assert chosen.fix[0][1].keys() == {"kl_clip", "damping"}


def test_too_little_memory_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.supervised.__main__.make_problem", lambda *_: torch.empty(2**60))
    code, _, err = run(capsys, tmp_path / "out")
    assert code == 2
    assert err == (
        "supervised: error: not enough memory: choose smaller --widths or a smaller --batch\n"
    )


def test_other_errors_of_torch_are_not_hidden(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "scripts.supervised.__main__.make_problem", lambda *_: torch.zeros(2) @ torch.zeros(3)
    )
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        run(capsys, tmp_path / "out")


def test_a_name_that_is_too_long_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ("--optimizers", "sgd", "--fix", "sgd:lr=1", "--widths", "16", "4")
    code, _, err = run(capsys, tmp_path / ("x" * 300), *fixed)
    assert code == 2
    assert "cannot read: File name too long" in err
    assert err.count("\n") == 1
