"""What is given twice, or would change nothing, is refused; other versions are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from acktr.cli import commands
from acktr.cli.training import parse_train
from acktr.envs import EnvError
from acktr.report.results import read_result
from tests.tools.command_line import SMALL, call

RUN = Path("CartPole-v1/acktr/seed0")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (
            "train CartPole-v1 --env Acrobot-v1",
            "one environment is trained in, got CartPole-v1 and",
        ),
        ("train CartPole-v1 --env=Acrobot-v1", "got CartPole-v1 and Acrobot-v1"),
        ("train CartPole-v1 --config a.json --config b.json", "--config is given 2 times"),
        ("compare --envs A --envs B --seeds 0", "--envs is given 2 times: give all its values"),
        ("compare --envs A --seeds 0 --seeds 7", "--seeds is given 2 times"),
        ("train CartPole-v1 --seed 3 --seed 4", "--seed is given 2 times: give it once"),
        ("train CartPole-v1 --num-envs=3 --num_envs 4", "--num-envs is given 2 times"),
        ("train CartPole-v1 --network.shared --network.no-shared", "--network.shared is given 2"),
        ("train --resume a --resume b", "--resume is given 2 times"),
    ],
)
def test_refusals(words: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, *words.split(), "--run-dir", str(tmp_path / "runs"))
    assert code == 2 and why in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("report rp --out o --labels a --labels b", "--labels"),
        ("plot rp --published --no-published", "--published"),
        ("eval rp --episodes 1 --episodes 2", "--episodes"),
        ("list --json --json", "--json"),
        ("doctor --run-dir a --run-dir b", "--run-dir"),
    ],
)
def test_every_command_refuses(words: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, *words.split())
    assert code == 2 and f"{name} is given 2 times" in err and err.count("\n") == 1


def test_words_behind_two_dashes_are_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "list", "--", "--json", "--json")
    assert code == 2 and "--json: no such folder or archive" in err and err.count("\n") == 1


def test_what_may_be_repeated_is_kept() -> None:
    words = "CartPole-v1 --env-kwargs a=1 --env-kwargs b=2 --wrapper m:A --wrappers m:B"
    settings = parse_train(words.split())[0].settings
    assert settings.env_kwargs == {"a": 1, "b": 2} and len(settings.wrappers) == 2


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        ("--algo a2c --acktr.actor.lr 9 --trpo.max-kl 5", "--acktr.actor.lr, --trpo.max-kl"),
        ("--a2c.lr=5", "--a2c.lr"),
        ("--atari.sticky 0.25 --pixels.size 32", "--atari.sticky, --pixels.size"),
        ("--acktr.actor.lr 0.1", ""),
    ],
)
def test_options_that_change_nothing_are_told(words: str, idle: str) -> None:
    _, source = parse_train(["CartPole-v1", *words.split()])
    algo = "a2c" if "a2c" in words.split() else "acktr"
    told = f"; warning: {idle} changes nothing of {algo} in CartPole-v1"
    assert source.endswith(told) if idle else "warning" not in source


def trained(tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> Path:
    words = ("train", "CartPole-v1", *SMALL, "--run-dir", str(tmp_path), *more)
    assert call(capsys, *words)[0] == 0
    return tmp_path / RUN


def test_a_total_below_what_is_done_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path, capsys, "--total-timesteps", "512", "--stop-at", "256")
    before = (run / "config.json").read_text()
    code, _, err = call(capsys, "train", "--resume", str(run), "--total-timesteps", "128")
    assert code == 2 and "must be at least the 256 steps" in err and err.count("\n") == 1
    assert (run / "config.json").read_text() == before


def test_the_own_total_is_not_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, capsys, "--total-timesteps", "250")
    code, out, _ = call(capsys, "train", "--resume", str(run), "--total-timesteps", "250")
    assert code == 0 and "is complete: 256 of 250 steps" in out


def test_other_versions_are_told_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path, capsys, "--total-timesteps", "512", "--stop-at", "256")
    path = run / "versions.json"
    known = json.loads(path.read_text())
    assert "sessions" not in known
    path.write_text(json.dumps(known | {"torch": "1.0.0", "platform": "elsewhere"}))
    code, _, err = call(capsys, "train", "--resume", str(run), "--stop-at", "384")
    assert code == 0
    assert "warning: other versions from step 256 on: torch 1.0.0 before" in err
    told: dict[str, Any] = json.loads(path.read_text())
    assert told["torch"] == "1.0.0"
    assert told["sessions"] == [{"step": 256, "torch": known["torch"]}]
    code, _, err = call(capsys, "train", "--resume", str(run))
    assert code == 0 and "other versions" not in err
    assert json.loads(path.read_text())["sessions"] == told["sessions"]


def test_a_damaged_run_is_told_before_others_are_played(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path, capsys, "--total-timesteps", "128")
    damaged = trained(tmp_path, capsys, "--total-timesteps", "128", "--seed", "1")
    damaged = damaged.with_name("seed1")
    (damaged / "checkpoints/last/meta.json").write_text("{}")
    monkeypatch.setattr("acktr.cli.commands._evaluated", lambda *_: pytest.fail("it played"))
    code, out, err = call(capsys, "eval", str(tmp_path))
    assert code == 2 and not out and "seed1" in err


def test_results_of_runs_are_said_as_they_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails later loses none of them; progress is that of all episodes."""
    for seed in ("0", "1"):
        trained(tmp_path, capsys, "--total-timesteps", "128", "--seed", seed)
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "acktr.cli.commands.counting", lambda *_: lambda count, total: told.append((count, total))
    )
    words = ("eval", str(tmp_path), "--episodes", "2", "--json")
    code, out, _ = call(capsys, *words)
    assert code == 0 and [json.loads(line)["seed"] for line in out.splitlines()] == [0, 1]
    assert told[-1] == (4, 4) and sorted(told) == told and {(0, 4), (2, 4)} < {*told}
    play, calls = commands.play, 0

    def fail(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise EnvError("no more")
        return play(*args, **options)

    monkeypatch.setattr(commands, "play", fail)
    code, again, err = call(capsys, *words)
    assert code == 2 and again == out.splitlines(keepends=True)[0] and "no more" in err


def test_another_length_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, capsys, "--total-timesteps", "256")
    assert read_result(run).replanned is None
    assert call(capsys, "train", "--resume", str(run), "--total-timesteps", "512")[0] == 0
    sessions = json.loads((run / "versions.json").read_text())["sessions"]
    assert sessions == [{"step": 256, "total_timesteps": 512, "former_total_timesteps": 256}]
    assert "lengthened from 256 steps" in call(capsys, "list", str(run))[1]
    assert "sessions" in call(capsys, "diff", str(run), str(run / "config.json"))[1]
