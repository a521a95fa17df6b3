"""Arguments and wrappers of environments on the command line, in files, and in comparisons."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from acktr.cli.training import parse_train
from acktr.compare.entries import Entry, Overlay, parse_algo
from acktr.compare.grid import make_plans, train_args
from acktr.config import ConfigError, from_dict, preset
from tests.tools.command_line import SMALL, call, table
from tests.tools.toys import CountingEnv, variant

WRAPPER = "tests.test_given:Tripled"


def lengths(run: Path) -> set[str]:
    return {row["l"] for row in table(run / "monitor.csv")}


def test_train_eval_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    env = variant(CountingEnv, {})
    argv = ("train", "--env", env, *SMALL, "--total-timesteps", "256")
    settings = ("--env-kwargs", "terminate_at=4", "--wrapper", WRAPPER, "--record", "count")
    code, _, err = call(capsys, *argv, *settings)
    assert code == 0, err
    run = next(Path("runs").glob("*/acktr/seed0"))
    config = json.loads((run / "config.json").read_text())
    assert (config["env_kwargs"], config["wrappers"]) == ({"terminate_at": 4}, [WRAPPER])
    facts = json.loads((run / "protocol.json").read_text())["environment"]
    assert (facts["env_kwargs"], facts["wrappers"]) == ({"terminate_at": 4}, [WRAPPER])
    assert lengths(run) == {"4"}
    assert {row["count"] for row in table(run / "monitor.csv")} == {"4"}
    assert table(run / "progress.csv")[-1]["rollout/count_mean"] == "4"
    assert table(run / "eval.csv")[-1]["mean_count"] == "4"
    code, out, _ = call(capsys, "eval", str(run), "--episodes", "2", "--json")
    assert code == 0
    assert (json.loads(out)["returns"], json.loads(out)["lengths"]) == ([30.0, 30.0], [4, 4])
    assert json.loads(out)["recorded"] == {"count": {"mean": 4.0, "values": [4.0, 4.0]}}
    assert "count 4" in call(capsys, "eval", str(run), "--episodes", "2")[1]
    assert call(capsys, "train", "--resume", str(run), "--total-timesteps", "512")[0] == 0
    assert lengths(run) == {"4"}
    assert table(run / "monitor.csv")[-1]["step"] == "512"


def test_values_are_json_or_else_text() -> None:
    words = ["a=1", "b=text", "c=[1, 2]", "d=true", 'e="7"', "f=x=y", "g=-1.5"]
    argv = ["--env", "CartPole-v1", "--env-kwargs", *words, "--gamma", "0.9"]
    config = parse_train([*argv, "--env-kwargs", "h=null", "--wrapper", "a:B", "--wrapper=c:D"])[
        0
    ].settings
    found = dict(config.env_kwargs)
    assert found == dict(a=1, b="text", c=[1, 2], d=True, e="7", f="x=y", g=-1.5, h=None)
    assert config.wrappers == ("a:B", "c:D")
    assert config.gamma == 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("--env-kwargs", "siz=3"), "CartPole-v1 could not be made: TypeError: .*argument 'siz'"),
        (("--wrapper", "Nothing"), "wrappers must be names as module:Name, got"),
        (("--wrapper", "no_such_module:A"), "'no_such_module:A' cannot be imported"),
    ],
)
def test_what_cannot_be_made_leaves_nothing(
    settings: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, "train", "--env", "CartPole-v1", *SMALL, *settings)
    assert code == 2
    assert re.search(message, err)
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [[1], "a=1", None, 3])
def test_arguments_in_a_file_are_an_object(value: object) -> None:
    with pytest.raises(ConfigError, match="env_kwargs must be a dict of JSON values"):
        from_dict({"env": "X-v0", "env_kwargs": value})
    with pytest.raises(ConfigError, match="wrappers must be"):
        from_dict({"env": "X-v0", "wrappers": value})


def test_configurations_with_arguments_can_be_compared_and_kept_in_sets() -> None:
    one, two = (from_dict({"env": "X-v0", "env_kwargs": {"size": n}}) for n in (1, 2))
    assert one != two
    assert len({one, two, from_dict({"env": "X-v0", "env_kwargs": {"size": 1}})}) == 2


def test_arguments_take_the_place_of_all_that_a_file_has(tmp_path: Path) -> None:
    """In train, in comparisons and where one file is laid over another."""
    given, other = ({"env_kwargs": {name: 1}} for name in ("size", "speed"))
    file = tmp_path / "some.json"
    file.write_text(json.dumps(given))
    argv = ["--env", "CartPole-v1", "--config", str(file), "--env-kwargs", "speed=1"]
    assert dict(parse_train(argv)[0].settings.env_kwargs) == {"speed": 1}
    for common, changes in ((None, other), (Overlay(file, other), {})):
        entry = Entry("mine", "acktr", overlay=Overlay(file, given))
        (plan,) = make_plans(["CartPole-v1"], [entry], [0], tmp_path, common, changes)
        assert dict(plan.config.env_kwargs) == (changes or given)["env_kwargs"]


def test_runs_of_a_comparison_have_them(tmp_path: Path) -> None:
    plan = make_plans(
        ["CartPole-v1"],
        [parse_algo("acktr")],
        [0],
        tmp_path,
        None,
        {"env_kwargs": {"size": [1, "a b"]}, "wrappers": (WRAPPER,)},
    )[0]
    assert parse_train(train_args(plan, False)[1:])[0].settings == plan.config
    again = train_args(plan, True, "mine")
    assert again[again.index("--import") + 1] == "mine,tests.test_given"


def test_files_of_a_comparison_do_not_import(tmp_path: Path) -> None:
    overlay = Overlay(tmp_path / "some.json", {"wrappers": ["this:s"]})
    with pytest.raises(ConfigError, match=r"some.json: its wrapper this:s would import"):
        make_plans(["CartPole-v1"], [parse_algo("acktr")], [0], tmp_path, overlay)
    file = tmp_path / "some.json"
    file.write_text(json.dumps({"env": "CartPole-v1", "wrappers": ["this:s"]}))
    with pytest.raises(ConfigError, match=r"its wrapper this:s would import"):
        parse_train(["--config", str(file)])
    assert preset("CartPole-v1")[0].wrappers == ()
