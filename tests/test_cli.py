from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from gymnasium import spaces

from acktr.checkpoint import load_checkpoint
from acktr.cli import main
from acktr.config import Config, from_dict, merge, to_dict
from acktr.options import TrainOptions, flags, parse_train, peek
from acktr.presets import preset
from tests import toys

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--num-envs", "4", "--num-steps", "32", "--eval-episodes", "2", "--device", "cpu")
TRAIN = ("train", "--env", "CartPole-v1", *SMALL)
RUN = Path("runs/CartPole-v1/acktr/seed0")

Result = tuple[int, str, str]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 1,024 steps, stopped where it was told to end."""
    runs = tmp_path_factory.mktemp("trained")
    argv = [*TRAIN, "--total-timesteps", "1024", "--checkpoint-freq", "512"]
    assert main([*argv, "--eval-freq", "512", "--run-dir", str(runs)]) == 0
    return runs / "CartPole-v1/acktr/seed0"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path) -> Path:
    """A working directory with a copy of the run in it."""
    shutil.copytree(trained, tmp_path / RUN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> Result:
    capsys.readouterr()
    code = main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def table(path: Path) -> list[dict[str, str]]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


def tree(path: Path) -> dict[str, bytes | None]:
    return {
        str(entry.relative_to(path)): entry.read_bytes() if entry.is_file() else None
        for entry in sorted(path.rglob("*"))
    }


class TestTrain:
    def test_run_folder(self, trained: Path) -> None:
        names = {entry.name for entry in trained.iterdir()}
        expected = {"config.json", "versions.json", "protocol.json", "command.txt", "monitor.csv"}
        expected |= {"progress.csv", "eval.csv", "checkpoints", "curve.png", "curve.csv"}
        assert expected <= names
        assert {name.split(".")[0] for name in names - expected} == {"events"}
        assert {entry.name for entry in (trained / "checkpoints").iterdir()} == {"last", "best"}
        command = (trained / "command.txt").read_text()
        assert command.startswith("acktr train --env CartPole-v1 ")
        assert json.loads((trained / "versions.json").read_text())["torch_threads"] == 1

    def test_config_is_what_was_asked_for(self, trained: Path) -> None:
        saved = from_dict(json.loads((trained / "config.json").read_text()))
        wanted = {"num_envs": 4, "num_steps": 32, "eval_episodes": 2, "device": "cpu"}
        wanted |= {"total_timesteps": 1024, "checkpoint_freq": 512, "eval_freq": 512}
        assert saved == merge(preset("CartPole-v1")[0], wanted)
        assert load_checkpoint(trained / "checkpoints/last")[1]["config"] == to_dict(saved)

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
        with pytest.raises(SystemExit) as stop:
            main(["train", "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out

        def names(values: dict[str, Any], prefix: str = "--") -> Iterator[str]:
            for key, value in values.items():
                name = prefix + key.replace("_", "-")
                yield from names(value, f"{name}.") if isinstance(value, dict) else [name]

        expected = set(names(to_dict(Config(env="X"))))
        assert len(expected) > 60
        assert all(f"{name} " in text or f"{name}," in text for name in expected)
        assert expected <= set(flags(TrainOptions))

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


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version")[1] == "acktr 0.1.0\n"
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert all(name in out for name in ("train", "eval", "record", "plot", "--version"))


BAD = {
    "no command": ("", "no command given"),
    "misspelt command": ("trian", "did you mean train?"),
    "no environment": ("train", "which environment?"),
    "unknown environment": ("train --env CartPol-v1", "did you mean 'CartPole-v1'?"),
    "retired environment": ("train --env Hopper-v2", "Hopper-v5"),
    "unknown module": ("train --env nomod:X-v0", "is its folder in PYTHONPATH?"),
    "existing run": ("train --env CartPole-v1", "already holds a run"),
    "misspelt flag": ("train --env CartPole-v1 --acktr.actor.dampin 1", "--acktr.actor.damping"),
    "flag without group": ("train --env CartPole-v1 --kl-clip 1", "or --acktr.critic.kl-clip?"),
    "half a flag": ("train --env CartPole-v1 --tot 5", "unknown option --tot"),
    "stray word": ("train --env CartPole-v1 stray", "unexpected argument 'stray'"),
    "no value": ("train --env CartPole-v1 --gamma", "--gamma"),
    "no number": ("train --env CartPole-v1 --gamma x", "--gamma: a number is needed, not 'x'"),
    "no integer": ("train --env CartPole-v1 --seed 1.5", "--seed: an integer is needed"),
    "no choice": ("train --env CartPole-v1 --precision half", "'float32', 'bfloat16'"),
    "neither": ("train --env CartPole-v1 --acktr.target-kl y", "{None}|FLOAT is needed, not 'y'"),
    "NaN": ("train --env CartPole-v1 --acktr.actor.lr nan", "acktr.actor.lr must be a finite"),
    "negative": ("train --env CartPole-v1 --num-envs -1", "num_envs must be an integer >= 1"),
    "above one": ("train --env CartPole-v1 --gamma 2", "gamma must be"),
    "no width": ("train --env CartPole-v1 --network.hidden 0", "each width of hidden"),
    "Atari setting": ("train --env CartPole-v1 --atari.sticky 2", "atari.sticky must be"),
    "algorithm": ("train --env CartPole-v1 --algo ppo", "algo must be acktr"),
    "preset": ("train --env CartPole-v1 --preset best", "preset must be one of default, paper"),
    "unpublished": ("train --env CartPole-v1 --preset paper", "the paper has no configuration"),
    "no config file": ("train --env CartPole-v1 --config no.json", "no.json: cannot read"),
    "no JSON": ("train --env CartPole-v1 --config bad/text.json", "not valid JSON"),
    "JSON list": ("train --env CartPole-v1 --config bad/list.json", "a JSON object"),
    "deep JSON": ("train --env CartPole-v1 --config bad/deep.json", "not valid JSON"),
    "unknown key": ("train --env CartPole-v1 --config bad/key.json", "did you mean gamma?"),
    "wrong type": ("train --env CartPole-v1 --config bad/type.json", "acktr.actor must be"),
    "NaN in JSON": ("train --env CartPole-v1 --config bad/nan.json", "gamma must be a finite"),
    "huge JSON": ("train --env CartPole-v1 --config bad/huge.json", "are allowed"),
    "absent device": ("train --env CartPole-v1 --seed 9 --device cuda:77", "is not there"),
    "no device": ("train --env CartPole-v1 --seed 9 --device tpu", "device must be"),
    "spaces": ("train --env tests.toys:toys/BadSpace-v0", "Tuple"),
    "file as folder": ("train --env CartPole-v1 --run-dir bad/text.json", "cannot create"),
    "resume nothing": ("train --resume nowhere", "no such run folder"),
    "resume no run": ("train --resume bad", "not a run folder"),
    "resume and change": ("train --resume RUN --gamma 0.5", "only --total-timesteps can"),
    "resume damaged": ("train --resume bad/run --total-timesteps 5000", "damaged"),
    "resume bad total": ("train --resume RUN --total-timesteps 0", "total_timesteps must be"),
    "eval without run": ("eval", "RUN is missing"),
    "eval nothing": ("eval nowhere", "no such folder"),
    "eval no run": ("eval bad", "not a run folder"),
    "eval damaged": ("eval bad/run", "damaged"),
    "eval no best": ("eval bad/run --checkpoint best", "use --checkpoint last"),
    "eval misspelt": ("eval RUN --epsiodes 3", "did you mean --episodes?"),
    "eval none": ("eval RUN --episodes 0", "--episodes must be at least 1, got 0"),
    "eval both": ("eval RUN --stochastic --deterministic", "exclude each other"),
    "eval seed": ("eval RUN --seed 99999999999", "seed"),
    "plot nothing": ("plot", "no runs to plot"),
    "plot no run": ("plot nowhere", "no such run folder"),
    "plot suffix": ("plot RUN --out fig.exe", "must end in .png or .svg"),
    "record suffix": ("record RUN --out clip.exe", "must end in .mp4 or .gif"),
    "record nothing": ("record nowhere", "no such folder"),
}


@pytest.fixture
def bad_files(here: Path) -> Path:
    bad = here / "bad"
    bad.mkdir()
    (bad / "text.json").write_text("gamma: 1")
    (bad / "list.json").write_text("[1]")
    (bad / "deep.json").write_text("[" * 100_000)
    (bad / "key.json").write_text('{"gama": 1}')
    (bad / "type.json").write_text('{"acktr": {"actor": 3}}')
    (bad / "nan.json").write_text('{"gamma": NaN}')
    (bad / "huge.json").write_text(" " * (1 << 20) + "{}")
    shutil.copytree(RUN, bad / "run")
    shutil.rmtree(bad / "run/checkpoints/best")
    state = bad / "run/checkpoints/last/state.safetensors"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    return here


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, bad_files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, one line that helps, and nothing on the disk has changed."""
    register_bad_space()
    before = tree(bad_files)
    command, expected = BAD[name]
    argv = [str(RUN) if word == "RUN" else word for word in command.split()]
    code, out, err = call(capsys, *argv)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1 and err.startswith("acktr: error: "), err
    assert expected in err
    assert tree(bad_files) == before


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_message_without_line_drawing(encoding: str, here: Path) -> None:
    """The parser draws boxes that depend on the terminal; the line must not."""
    argv = [sys.executable, "-m", "acktr", "eval", "RUN", "--episodes", "many"]
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        argv,
        env={**os.environ, **path, "PYTHONIOENCODING": encoding},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "acktr: error: --episodes: an integer is needed, not 'many'\n"


def register_bad_space() -> None:
    if "toys/BadSpace-v0" not in gymnasium.registry:
        observations = spaces.Tuple((spaces.Discrete(2),))
        kwargs = {"observation_space": observations, "action_space": spaces.Discrete(2)}
        maker: Any = toys.SpacesEnv
        gymnasium.register("toys/BadSpace-v0", entry_point=maker, kwargs=kwargs)


class TestFaults:
    def test_environment(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        toys.FaultyEnv.made = 0
        env = toys.variant(toys.FaultyEnv, {"at": 200, "index": 2, "what": "reward"})
        argv = ("--env", f"tests.toys:{env}", *SMALL, "--checkpoint-freq", "512")
        code, _, err = call(capsys, "train", *argv)
        assert code == 76
        line = err.splitlines()[-1]
        assert line.startswith(f"acktr: error: environment 2 of {env} returned a non-finite reward")
        assert "step 200" in line
        last = next((here / "runs").glob("tests.toys_toys_Variant*/acktr/seed0/checkpoints/last"))
        assert line.endswith(f"last good checkpoint: {last.relative_to(here)}, step 512")
        assert load_checkpoint(last)[0]["timesteps"] == 512
        assert table(last.parents[1] / "progress.csv")[-1]["timesteps"] == "768"
        assert "Traceback" not in err

    def test_first_update(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        toys.FaultyEnv.made = 0
        env = toys.variant(toys.FaultyEnv, {"what": "exception"})
        code, _, err = call(capsys, "train", "--env", env, *SMALL)
        assert code == 76
        assert "raised ZeroDivisionError at step 3: the toy broke" in err
        assert err.rstrip().endswith("step 0")

    def test_numeric(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        toys.FaultyEnv.made = 0
        env = toys.variant(toys.FaultyEnv, {"at": 100, "what": "reward", "value": 1e300})
        flags = ("--no-normalize-reward", "--checkpoint-freq", "128")
        code, _, err = call(capsys, "train", "--env", env, *SMALL, *flags)
        assert code == 70
        line = err.splitlines()[-1]
        assert "NaN or Inf" in line
        assert "last good checkpoint" in line and line.endswith("step 384")
        last = next((here / "runs").glob("toys_Variant*/acktr/seed0/checkpoints/last"))
        network = load_checkpoint(last)[0]["network"]
        assert all(bool(torch.isfinite(value).all()) for value in network.values())


def start(here: Path, *argv: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "acktr", *argv],
        cwd=here,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], beginning: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(beginning):
            return
    raise AssertionError(f"the process ended without a line {beginning!r}")


class TestSignals:
    @pytest.mark.parametrize(
        ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)], ids=["INT", "TERM"]
    )
    def test_checkpoint_and_resume(
        self, number: signal.Signals, code: int, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        process = start(here, *TRAIN, "--seed", "6", "--total-timesteps", "1000000")
        wait_for(process, "steps")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (code, "")
        run = Path("runs/CartPole-v1/acktr/seed6")
        assert err.splitlines()[-1].startswith(f"acktr: stopped by {number.name}, checkpoint")
        assert err.endswith(f"continue with: acktr train --resume {run}\n")
        assert "Traceback" not in err
        done = load_checkpoint(run / "checkpoints/last")[0]["timesteps"]
        assert 0 < done < 1_000_000
        assert int(table(run / "progress.csv")[-1]["timesteps"]) == done
        total = done + 256
        argv = ("train", "--resume", str(run), "--total-timesteps", str(total))
        assert call(capsys, *argv)[0] == 0
        steps = [int(row["timesteps"]) for row in table(run / "progress.csv")]
        assert steps == list(range(128, total + 1, 128))

    def test_second_signal_does_not_wait(self, here: Path) -> None:
        argv = ("--env", "CartPole-v1", "--num-envs", "1", "--num-steps", "10000000")
        process = start(here, "train", *argv, "--seed", "8")
        wait_for(process, "protocol")
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "checkpoint at step 0" in err
        assert "Traceback" not in err

    def test_run_in_training_is_locked(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        process = start(here, *TRAIN, "--seed", "7", "--total-timesteps", "1000000")
        try:
            wait_for(process, "protocol")
            code, _, err = call(capsys, "train", "--resume", "runs/CartPole-v1/acktr/seed7")
        finally:
            process.kill()
            process.communicate()
        assert code == 2
        assert "another process is training this run" in err
