"""Options by name alone, the first page of train, and what comes without torch."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from acktr.cli.flags import FLAGS, TRAIN_HELP, unknown_option
from acktr.cli.options import KINDS, CompareOptions
from acktr.cli.training import TrainOptions, parse_train
from acktr.config import ALGOS
from tests.tools.command_line import RUN, call

POSITIONAL = {
    **{key: {"run"} for key in ("eval", "record", "export", "card")},
    **{key: {"runs"} for key in ("plot", "report", "list")},
    "diff": {"one", "other"},
    "presets": {"env"},
}


def names(kind: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            group = "" if field.name == "settings" else f"{prefix}{field.name}."
            yield from names(hints[field.name], group)
        else:
            yield (prefix + field.name).replace("_", "-").replace("import-module", "import")


@pytest.mark.parametrize("command", [*KINDS, "train"])
def test_the_table_of_flags_is_that_of_the_options(command: str) -> None:
    kind = KINDS.get(command, TrainOptions)
    expected = {name.replace("_", "-") for name in names(kind)} - POSITIONAL.get(command, set())
    assert {*FLAGS[command]} - {"wrapper", "help-all"} == expected
    assert len(set(FLAGS[command])) == len(FLAGS[command])


def test_the_algorithms_of_compare_are_all() -> None:
    assert CompareOptions(envs=("X",)).algos == ALGOS


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("--n-envs 3", "unknown option --n-envs; did you mean --num-envs?"),
        ("--n_timesteps=3", "did you mean --total-timesteps?"),
        ("--learning-rate 3", "did you mean --acktr.actor.lr (--a2c.lr of A2C"),
        ("--tensorboard-log x", "always written, to the run's folder"),
        ("--render", "acktr record RUN writes a video"),
        ("--gama 1", "did you mean --gamma?"),
        ("--damping 1", "did you mean --acktr.actor.damping or --acktr.critic.damping?"),
        ("--tot 1", "did you mean --total-timesteps?"),
        ("--purple 1", "acktr train --help-all lists all there are"),
        ("-n 1", "unknown option -n; did you mean --total-timesteps?"),
        ("-q 1", "unknown option -q; acktr train --help-all"),
    ],
)
def test_unknown_options_in_words_of_others(words: str, hint: str) -> None:
    said = unknown_option("train", ["--env", "X", *words.split()])
    assert said is not None and hint in said
    assert "did you mean" in said or "did you mean" not in hint


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("--env CartPole-v1", "a run is given by its folder alone, such as runs/"),
        ("--n-eval-episodes 5", "did you mean --episodes?"),
        ("--load-best", "did you mean --checkpoint best?"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "record"])
def test_runs_are_no_agents_of_the_zoo(command: str, words: str, hint: str) -> None:
    said = unknown_option(command, words.split())
    assert said is not None and hint in said


@pytest.mark.parametrize(("flag", "tool"), [("track", "Weights & Biases"), ("optimize", "Optuna")])
def test_recipes_are_where_they_are_said_to_be(flag: str, tool: str) -> None:
    said = unknown_option("train", ["--env", "X", f"--{flag}"])
    assert said is not None and f"the recipe for {tool} in " in said
    page = Path(__file__).parents[2] / said.rpartition(" ")[2]
    assert f"## {tool}\n" in page.read_text()


def test_two_environments_to_train_in(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "train", "MlpPolicy", "CartPole-v1")
    assert code == 2 and "one environment is trained in, got MlpPolicy and CartPole-v1" in err


def test_far_guesses_are_not_made() -> None:
    for word in ("--purple", "--optimiser-name", "--x"):
        said = unknown_option("train", [word])
        assert said is not None and "did you mean" not in said


def test_what_is_known_or_a_value_passes() -> None:
    for command, flags in FLAGS.items():
        assert unknown_option(command, [f"--{flag}" for flag in flags]) is None
    fine = "X --no-compile --acktr.actor.no-eager-start --run_dir=a --ent-coef -0.5 -h --help -.5"
    assert unknown_option("train", fine.split()) is None


def test_first_page_of_train_is_short_and_true(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "train", "--help")
    assert code == 0 and out == TRAIN_HELP
    lines = out.splitlines()
    assert 20 < len(lines) <= 32 and max(map(len, lines)) <= 100
    shown = {word.strip(";[") for word in out.split() if word.startswith("--")}
    assert len(shown) > 15 and unknown_option("train", sorted(shown)) is None


def test_all_options_are_those_of_the_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "train", "CartPole-v1", "--algo", "a2c", "--help-all")
    assert code == 0 and "--a2c.rms-alpha" in out and "--gamma" in out
    assert "--acktr.actor.lr" not in out and "--atari.sticky" not in out
    assert out.splitlines()[-1].startswith("left out: acktr, acktr.actor, acktr.critic,")
    code, out, _ = call(capsys, "train", "ALE/Pong-v5", "--help-all", "atari")
    assert code == 0 and "--atari.sticky" in out and "--gamma" not in out
    code, _, err = call(capsys, "train", "--help-all", "atarri")
    assert code == 2 and "no group 'atarri' of options; there are general, network" in err


def test_environment_by_itself_and_round_numbers() -> None:
    options, _ = parse_train(["CartPole-v1", "--total-timesteps", "1.5e4", "--seed", "1_0"])
    assert options.settings.env == "CartPole-v1"
    assert (options.settings.total_timesteps, options.settings.seed) == (15_000, 10)


@pytest.mark.parametrize("number", ["1e6x", "1.5", "1.55e1", "1e99", "0x10", "1e-1", "five"])
def test_what_is_no_integer(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "eval", "x", "--episodes", number)
    assert code == 2 and "is no integer, such as 100000 or 1e5" in err


@pytest.mark.parametrize("look", ["plain", "ascii", "coloured"])
def test_what_the_parser_says_is_one_line(
    look: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the terminal makes of its box, and however narrow it is."""
    monkeypatch.setenv("COLUMNS", "44")
    if look == "ascii":
        monkeypatch.setattr("tyro._fmtlib._should_use_utf8_drawing_chars", lambda: False)
    elif look == "coloured":
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, out, err = call(capsys, "report", "runs")
    assert (code, out) == (2, "")
    what = "--out DIR Folder for report.md, the CSV files and the figures. (required)"
    page = "see acktr report --help"
    assert err == f"acktr: error: missing from acktr report: {what}; {page}\n"
    code, _, err = call(capsys, "compare", "--envs", "X", "--workers", "0")
    assert (code, err) == (2, "acktr: error: --workers must be at least 1, got 0\n")
    assert os.environ["COLUMNS"] == "44"


def test_a_folder_of_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run below stands for itself; several are evaluated and drawn, each."""
    few = ("--episodes", "1")
    alone = call(capsys, "eval", str(RUN), *few)[1]
    assert call(capsys, "eval", "runs", *few)[1] == alone
    peer = shutil.copytree(RUN, here / "runs/CartPole-v1/sb3-ppo/seed0")
    shutil.rmtree(peer / "checkpoints")
    assert call(capsys, "eval", "runs", *few)[1] == alone  # a run that keeps no agent is left out
    shutil.rmtree(peer)
    shutil.copytree(RUN, here / "runs/CartPole-v1/other/seed0")
    code, out, _ = call(capsys, "eval", "runs", *few)
    assert code == 0 and alone.strip() in out
    assert [line.split(": ")[0] for line in out.splitlines()] == [
        "runs/CartPole-v1/acktr/seed0",
        "runs/CartPole-v1/other/seed0",
    ]
    code, out, _ = call(capsys, "eval", "runs", *few, "--json")
    assert [json.loads(line)["episodes"] for line in out.splitlines()] == [1, 1]
    assert call(capsys, "plot", "runs", "--no-published")[0] == 0
    drawn = (here / "curves.csv").read_text()
    assert "acktr,mean" in drawn and "other,mean" in drawn
