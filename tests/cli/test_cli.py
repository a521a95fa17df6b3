from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acktr import ACKTR
from acktr.cli import commands
from acktr.cli.main import COMMANDS, _words
from acktr.cli.parsing import peek
from acktr.cli.training import parse_train
from acktr.config import Config, from_dict, merge, preset, to_dict
from acktr.runs.checkpoint import load_checkpoint
from tests.tools.command_line import RUN, TRAIN, call, environment, table, tree


class TestTrain:
    def test_run_folder(self, trained: Path) -> None:
        names = {entry.name for entry in trained.iterdir()}
        expected = {"config.json", "versions.json", "protocol.json", "command.txt", "monitor.csv"}
        expected |= {"progress.csv", "eval.csv", "checkpoints", "curve.png", "curve.csv"}
        assert expected <= names
        assert {name.split(".")[0] for name in names - expected} == {"events"}
        assert {entry.name for entry in (trained / "checkpoints").iterdir()} == {
            *("last", "last-1", "last-2", "best"),
        }
        command = (trained / "command.txt").read_text()
        assert command.startswith("acktr train --env CartPole-v1 ")
        assert json.loads((trained / "versions.json").read_text())["torch_threads"] == 1

    def test_config_is_what_was_asked_for(self, trained: Path) -> None:
        saved = from_dict(json.loads((trained / "config.json").read_text()))
        wanted = {"num_envs": 4, "num_steps": 32, "eval_episodes": 2, "device": "cpu"}
        wanted |= {"total_timesteps": 1024, "checkpoint_freq": 512, "eval_freq": 512}
        assert saved == merge(preset("CartPole-v1")[0], wanted)
        assert from_dict(load_checkpoint(trained / "checkpoints/last")[1]["config"]) == saved

    def test_evaluations_and_best_checkpoint(self, trained: Path) -> None:
        rows = table(trained / "eval.csv")
        assert [row["timesteps"] for row in rows] == ["512", "1024"]
        best = max(rows, key=lambda row: float(row["mean_reward"]))
        _, meta = load_checkpoint(trained / "checkpoints/best")
        assert meta["timesteps"] == int(best["timesteps"])
        assert meta["score"] == pytest.approx(float(best["mean_reward"]))
        assert load_checkpoint(trained / "checkpoints/last")[0]["timesteps"] == 1024

    def test_first_lines_say_preset_precision_and_protocol(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        argv = (*TRAIN, "--total-timesteps", "128", "--seed", "3")
        code, out, err = call(capsys, *argv)
        lines = err.splitlines()
        assert code == 0
        assert lines[0].startswith("preset default for acktr, exact id CartPole-v1")
        assert "device cpu" in lines[1] and "precision float32" in lines[1]
        assert lines[2].startswith("protocol: env_id=CartPole-v1, ")
        assert "max_episode_steps=500" in lines[2]
        assert out.startswith("done: CartPole-v1, 128 steps in 0:00:0")
        assert len(out.splitlines()) == 1

    def test_best_without_evaluations_follows_training_returns(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        argv = (*TRAIN, "--total-timesteps", "1024", "--checkpoint-freq", "256", "--seed", "1")
        assert call(capsys, *argv)[0] == 0
        run = here / "runs/CartPole-v1/acktr/seed1"
        rows = {row["timesteps"]: row["rollout/ep_rew_mean"] for row in table(run / "progress.csv")}
        means = {int(step): float(rows[step]) for step in ("256", "512", "768", "1024")}
        _, meta = load_checkpoint(run / "checkpoints/best")
        assert meta["timesteps"] == max(means, key=lambda step: means[step])
        assert [row["timesteps"] for row in table(run / "eval.csv")] == ["1024"]

    def test_preset_then_file_then_flags(self, tmp_path: Path) -> None:
        file = tmp_path / "some.json"
        file.write_text('{"gamma": 0.9, "seed": 4, "acktr": {"actor": {"damping": 0.5}}}')
        argv = ["--env", "Hopper-v5", "--preset", "paper", "--config", str(file), "--seed=7"]
        options, source = parse_train([*argv, "--network.hidden", "3", "5"])
        base = preset("Hopper-v5", name="paper")[0]
        changes: dict[str, Any] = {"gamma": 0.9, "seed": 7, "network": {"hidden": [3, 5]}}
        changes["acktr"] = {"actor": {"damping": 0.5}}
        assert options.settings == merge(base, changes)
        actor = options.settings.acktr.actor
        assert actor == dataclasses.replace(base.acktr.actor, damping=0.5)
        assert options.settings.network.hidden == (3, 5)
        assert (options.settings.gamma, options.settings.seed) == (0.9, 7)
        assert options.settings.acktr.critic == base.acktr.critic
        assert source.startswith("preset paper for acktr, MuJoCo family")
        assert str(file) in source

    def test_written_config_is_a_config_file(self, trained: Path) -> None:
        config = trained / "config.json"
        options, _ = parse_train(["--config", str(config)])
        assert options.settings == from_dict(json.loads(config.read_text()))

    def test_atari_protocol_flags(self) -> None:
        argv = ["--env", "PongNoFrameskip-v4", "--atari.sticky", "0.25", "--atari.no-clip-reward"]
        settings = parse_train(argv)[0].settings.atari
        assert (settings.sticky, settings.clip_reward) == (0.25, False)

    def test_every_setting_is_a_flag(self, capsys: pytest.CaptureFixture[str]) -> None:
        text = ""
        kinds = ("--env ALE/Pong-v5 --algo trpo", "--env Pixels/Hopper-v5 --algo acktr")
        for words in ("--algo acktr", "--algo a2c", *kinds):
            code, page, _ = call(capsys, "train", *words.split(), "--help-all")
            assert code == 0
            text += page

        def names(values: dict[str, Any], prefix: str = "--") -> Iterator[str]:
            for key, value in values.items():
                name = prefix + key.replace("_", "-")
                yield from names(value, f"{name}.") if isinstance(value, dict) else [name]

        expected = set(names(to_dict(Config(env="X"))))
        assert len(expected) > 60
        assert all(f"{name} " in text or f"{name}," in text for name in expected)

    def test_last_value_of_an_option(self) -> None:
        args = ["--env", "A", "--env=B", "--envx", "C", "--env"]
        assert peek(args, "env") == "B"
        assert peek([], "env") is None


class TestResume:
    def test_goes_on_without_gap_or_repetition(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = table(RUN / "progress.csv")
        argv = ("train", "--resume", str(RUN), "--total-timesteps", "1536")
        code, _, err = call(capsys, *argv)
        assert code == 0
        assert err.splitlines()[0] == f"resuming {RUN} at step 1,024"
        after = table(RUN / "progress.csv")
        assert [int(row["timesteps"]) for row in after] == list(range(128, 1537, 128))
        assert [row["train/approx_kl"] for row in after[: len(before)]] == [
            row["train/approx_kl"] for row in before
        ]
        assert [row["timesteps"] for row in table(RUN / "eval.csv")] == ["512", "1024", "1536"]
        assert json.loads((RUN / "config.json").read_text())["total_timesteps"] == 1536
        commands = (RUN / "command.txt").read_text().splitlines()
        assert commands[1] == "acktr " + " ".join(argv)

    def test_rows_after_the_checkpoint_are_cut(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        argv = (*TRAIN, "--total-timesteps", "512", "--seed", "2")
        run = here / "runs/CartPole-v1/acktr/seed2"
        assert call(capsys, *argv)[0] == 0
        shutil.copytree(run / "checkpoints", here / "older")
        again = ("train", "--resume", str(run), "--total-timesteps", "1024")
        assert call(capsys, *again)[0] == 0
        shutil.rmtree(run / "checkpoints")
        shutil.copytree(here / "older", run / "checkpoints")
        assert call(capsys, *again)[0] == 0
        steps = [int(row["timesteps"]) for row in table(run / "progress.csv")]
        assert steps == list(range(128, 1025, 128))
        episodes = [int(row["step"]) for row in table(run / "monitor.csv")]
        assert episodes == sorted(episodes)

    def test_complete_run_is_left_alone(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = tree(here)
        code, out, err = call(capsys, "train", "--resume", str(RUN))
        assert (code, err) == (0, "")
        assert "is complete" in out
        assert tree(here) == before

    def test_edited_configuration_is_refused(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        values = json.loads((RUN / "config.json").read_text())
        values["acktr"]["actor"]["damping"] = 0.123
        (RUN / "config.json").write_text(json.dumps(values))
        code, _, err = call(capsys, "train", "--resume", str(RUN), "--total-timesteps", "2000")
        assert code == 2
        assert "acktr.actor.damping is 0.123 but" in err

    def test_missing_final_evaluation_is_made_up_for(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (RUN / "eval.csv").unlink()
        (RUN / "curve.png").unlink()
        code, out, _ = call(capsys, "train", "--resume", str(RUN))
        assert code == 0
        assert out.startswith("done: CartPole-v1, 1,024 steps")
        assert [row["timesteps"] for row in table(RUN / "eval.csv")] == ["1024"]
        assert (RUN / "curve.png").exists()


class TestEval:
    def test_json(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        argv = ("eval", str(RUN), "--episodes", "5", "--num-envs", "2", "--json")
        code, out, err = call(capsys, *argv)
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert found["env"] == "CartPole-v1" and found["algo"] == "acktr"
        assert found["seed"] == 0 and found["timesteps"] == 1024
        assert found["episodes"] == len(found["returns"]) == len(found["lengths"]) == 5
        assert found["returns"] == found["lengths"]  # CartPole pays 1 per step
        assert found["mean_reward"] == pytest.approx(sum(found["returns"]) / 5)
        assert found["deterministic"] is True
        assert found["checkpoint"] == str(RUN / "checkpoints/last")
        assert json.loads(call(capsys, *argv)[1]) == found
        assert json.loads(call(capsys, *argv, "--seed", "5")[1])["returns"] != found["returns"]

    def test_agrees_with_the_evaluation_in_training(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        argv = ("eval", str(RUN), "--episodes", "2", "--seed", "10000", "--json")
        found = json.loads(call(capsys, *argv)[1])
        logged = table(RUN / "eval.csv")[-1]["returns"]
        assert [float(value) for value in logged.split(";")] == found["returns"]

    def test_which_checkpoint_and_how(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        argv = ("eval", str(RUN), "--episodes", "2", "--json", "--stochastic")
        found = json.loads(call(capsys, *argv, "--checkpoint", "best")[1])
        assert found["deterministic"] is False
        assert found["checkpoint"].endswith("best")
        direct = json.loads(call(capsys, "eval", found["checkpoint"], *argv[2:])[1])
        assert direct["returns"] == found["returns"]

    def test_text(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = call(capsys, "eval", str(RUN), "--episodes", "2")
        assert code == 0
        assert out.startswith("CartPole-v1, acktr, seed 0, step 1,024: return ")


def test_plot(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "plot", str(RUN), "--out", "fig.png", "--title", "T")
    assert (code, err) == (0, "")
    assert out == "fig.png and fig.csv\n"
    assert Path("fig.png").read_bytes().startswith(b"\x89PNG")


class TestReport:
    def test_report(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        Path("refs.csv").write_text("env,low,high,threshold\nCartPole-v1,0,500,15\n")
        argv = ("report", "runs", "--out", "r/e", "--references", "refs.csv", "--no-published")
        code, out, err = call(capsys, *argv, "--resamples", "200", "--labels", "acktr")
        assert (code, out, err) == (0, "r/e/report.md: 1 runs\n", "")
        page = Path("r/e/report.md").read_text()
        assert f"    acktr {' '.join(argv)} --resamples 200 --labels acktr\n" in page
        found = table(RUN / "monitor.csv")[-100:]
        mean = sum(float(row["r"]) for row in found) / len(found)
        assert float(table(Path("r/e/runs.csv"))[0]["last100_mean"]) == pytest.approx(mean)
        score = next(row for row in table(Path("r/e/aggregate.csv")) if row["statistic"] == "mean")
        assert float(score["value"]) == pytest.approx(mean / 500)
        assert (Path("r/e/profiles.svg")).exists()


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version")[1] == "acktr 0.1.0\n"
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert tuple(re.findall(r"^  (\w+) ", out, re.M)) == COMMANDS == (*commands.COMMANDS, "doctor")


@pytest.mark.parametrize(
    "line",
    [
        *("--help", "--version", "trian", "eval", "eval --help"),
        *("train --help", "train --hlp", "train X --lr 3"),
    ],
)
def test_what_needs_no_imports_comes_at_once(line: str, tmp_path: Path) -> None:
    """Neither torch nor anything else that takes long is imported."""
    code = "import sys; from acktr.cli.main import main; main(sys.argv[1:]); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *line.split()],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    slow = {"torch", "gymnasium", "matplotlib", "numpy", "rich"}
    slow |= set() if line.startswith("eval") else {"tyro"}
    imported = done.stdout.split()
    assert "acktr.cli.main" in imported and not slow.intersection(imported)


class TestExport:
    def test_what_a_run_has_learned(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, err = call(capsys, "export", str(RUN), "--out", "policy.pt2")
        assert (code, err) == (0, "")
        assert out == "policy.pt2: observation in; action, parameters, value out\n"
        program = torch.export.load("policy.pt2").module()
        rows = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
        with ACKTR.load(RUN) as agent, torch.no_grad():
            actions = program(torch.from_numpy(rows))[0].numpy()
            np.testing.assert_array_equal(actions, agent.predict(rows, deterministic=True)[0])
            agent.save("agent.zip")
        assert call(capsys, "export", "agent.zip", "--out", "again.pt2")[0] == 0
        assert call(capsys, "eval", "agent.zip", "--episodes", "1")[0] == 0


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("train --env mine:X-v0", True),
        ("train --env=mine:X-v0", True),
        ("compare --envs A-v0 my.own:X-v0", True),
        ("eval runs/X --import mine", True),
        ("train --network m:Actor,m:Critic", True),
        ("train --env CartPole-v1 --device cuda:0", False),
        ("train --resume runs/X --config a.json", False),
    ],
)
def test_modules_that_are_named_are_found_in_the_working_directory(
    line: str, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After all others, and nowhere else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["before"])
    monkeypatch.setattr("sys.argv", ["acktr", *line.split()])
    assert _words(None) == line.split()
    assert sys.path == ["before", *[str(tmp_path)] * found]
