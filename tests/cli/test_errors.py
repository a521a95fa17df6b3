from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from gymnasium import spaces

from acktr.runs.checkpoint import load_checkpoint
from tests.tools import toys
from tests.tools.command_line import RUN, SMALL, call, environment, table, tree

BAD = {
    "no command": ("", "no command given"),
    "misspelt command": ("trian", "did you mean train?"),
    "no environment": ("train", "which environment?"),
    "unknown environment": ("train --env CartPol-v1", "did you mean 'CartPole-v1'?"),
    "retired environment": ("train --env Hopper-v2", "Hopper-v5"),
    "unknown module": ("train --env nomod:X-v0", "is its folder in PYTHONPATH?"),
    "existing run": ("train --env CartPole-v1", "already holds a run"),
    "misspelt flag": ("train --env CartPole-v1 --acktr.actor.dampin 1", "--acktr.actor.damping"),
    "flag without group": ("train --env CartPole-v1 --kl-clip 1", "--acktr.critic.kl-clip"),
    "half a flag": ("train --env CartPole-v1 --tot 5", "--total-timesteps"),
    "stray word": ("train --env CartPole-v1 stray", "stray"),
    "no value": ("train --env CartPole-v1 --gamma", "missing value for argument '--gamma'"),
    "no number": ("train --env CartPole-v1 --gamma x", "--gamma: 'x' is no number, such as 0.5"),
    "no integer": ("train --env CartPole-v1 --seed 1.5", "--seed: '1.5' is no integer"),
    "no choice": (
        "train --env CartPole-v1 --precision half",
        "--precision: 'half' is not one of auto, float32, bfloat16",
    ),
    "neither": (
        "train --env CartPole-v1 --acktr.target-kl y",
        "--acktr.target-kl: 'y' is no number, such as 0.5 or 1e-3, nor None",
    ),
    "width": ("train CartPole-v1 --network.hidden 8 b", "--network.hidden: 'b' is no integer"),
    "no processes": ("train CartPole-v1 --nproc 0", "error: --nproc must be in [1, 1024], got 0"),
    "curvature alone": (
        "train CartPole-v1 --curvature-ranks 1",
        "error: --curvature-ranks 1 needs --nproc 2 or more: the others train",
    ),
    "two for the curvature": (
        "train CartPole-v1 --nproc 3 --curvature-ranks 2",
        "error: --curvature-ranks must be in [0, 1], got 2",
    ),
    "curvature of A2C": (
        "train CartPole-v1 --algo a2c --nproc 2 --curvature-ranks 1",
        "error: --curvature-ranks 1 is for acktr: a2c has no factors to decompose",
    ),
    "parts beside the curvature": (
        "train CartPole-v1 --nproc 4 --curvature-ranks 1",
        "num_envs must be a multiple of the 3 processes",
    ),
    "no pixels": ("train CartPole-v1 --pixels.size 0", "error: pixels.size must be an integer"),
    "no screen": (
        "train ALE/Pong-v5 --atari.screen-size 0",
        "error: atari.screen_size must be an integer from 8 to 512, got 0",
    ),
    "no axis": ("plot runs --x weeks", "error: --x: 'weeks' is not one of steps, time"),
    "two runs": ("eval a b", "error: unrecognized options: b; see acktr eval --help"),
    "doctor without folder": ("doctor --run-dir", "--run-dir: expected one argument; see acktr"),
    "NaN": ("train --env CartPole-v1 --acktr.actor.lr nan", "acktr.actor: lr must be a finite"),
    "negative": ("train --env CartPole-v1 --num-envs -1", "num_envs must be an integer >= 1"),
    "above one": ("train --env CartPole-v1 --gamma 2", "gamma must be"),
    "no width": ("train --env CartPole-v1 --network.hidden 0", "each of hidden"),
    "Atari setting": ("train --env CartPole-v1 --atari.sticky 2", "atari.sticky must be"),
    "algorithm": ("train --env CartPole-v1 --algo ppo", "algo must be one of acktr, a2c, trpo"),
    "preset": (
        "train --env CartPole-v1 --preset best",
        "preset must be one of default, family, paper",
    ),
    "former option": (
        "train --env Hopper-v5 --env-backend envpool",
        "unknown option --env-backend",
    ),
    "unpublished": ("train --env CartPole-v1 --preset paper", "the paper has no configuration"),
    "no config file": ("train --env CartPole-v1 --config no.json", "no.json: cannot read"),
    "no JSON": ("train --env CartPole-v1 --config bad/text.json", "not valid JSON"),
    "JSON list": ("train --env CartPole-v1 --config bad/list.json", "a JSON object"),
    "JSON key twice": ("train --env CartPole-v1 --config bad/twice.json", "'gamma' stands twice"),
    "long word": (f"train --env {'a' * 9_000}", "at most 8,192 characters"),
    "control characters": ("train --env \x1b[31mCartPole-v1", r"'\x1b[31mCartPole-v1'"),
    "many digits": (f"train --env CartPole-v1 --seed {'9' * 5_000}", "--seed: '99"),
    "beyond floats": (
        f"train --env CartPole-v1 --acktr.actor.lr 1{'0' * 400}",
        "lr must be a finite number > 0, got inf",
    ),
    "beyond float32": (
        "train --env CartPole-v1 --acktr.actor.lr 1e308",
        "lr must be at most 1e+30, got 1e+308",
    ),
    "limit beyond float32": (
        "train --env CartPole-v1 --algo a2c --a2c.max-grad-norm 1e308",
        "max_grad_norm must be a finite number > 0 and <= 1e+30, got 1e+308",
    ),
    "beyond 64 bits": (f"train --env CartPole-v1 --eval-freq 1{'0' * 400}", "eval_freq must be"),
    "interval beyond 64 bits": (
        f"train --env CartPole-v1 --acktr.actor.stat-interval 1{'0' * 400}",
        "stat_interval must be an integer >= 1",
    ),
    "argument beyond 64 bits": (
        f"train --env CartPole-v1 --env-kwargs a=1{'0' * 400}",
        "env_kwargs: a must be a JSON value",
    ),
    "long text in JSON": ("train --env CartPole-v1 --config bad/long.json", "must be one of"),
    "deep JSON": ("train --env CartPole-v1 --config bad/deep.json", "not valid JSON"),
    "unknown key": ("train --env CartPole-v1 --config bad/key.json", "did you mean gamma?"),
    "wrong type": ("train --env CartPole-v1 --config bad/type.json", "acktr.actor must be"),
    "NaN in JSON": ("train --env CartPole-v1 --config bad/nan.json", "gamma must be a finite"),
    "huge JSON": ("train --env CartPole-v1 --config bad/huge.json", "are allowed"),
    "absent device": ("train --env CartPole-v1 --seed 9 --device cuda:77", "is not there"),
    "no device": ("train --env CartPole-v1 --seed 9 --device tpu", "device must be"),
    "spaces": ("train --env tests.tools.toys:toys/BadSpace-v0", "Text"),
    "file as folder": ("train --env CartPole-v1 --run-dir bad/text.json", "cannot create"),
    "resume nothing": ("train --resume nowhere", "no such folder"),
    "resume no run": ("train --resume bad", "not a run folder"),
    "resume and change": ("train --resume RUN --gamma 0.5", "only --total-timesteps and"),
    "stop beyond the end": (
        "train --env CartPole-v1 --seed 9 --total-timesteps 512 --stop-at 513",
        "stop_at must be in [1, total_timesteps], here 512, got 513",
    ),
    "resume and stop beyond the end": (
        "train --resume RUN --stop-at 9999",
        "here 1,024, got 9,999",
    ),
    "compare stop beyond the end": (
        "compare --envs CartPole-v1 --seeds 8 --total-timesteps 512 --stop-at 513",
        "CartPole-v1 acktr: stop_at must be in [1, total_timesteps], here 512",
    ),
    "resume damaged": ("train --resume bad/run --total-timesteps 5000", "damaged"),
    "resume bad total": ("train --resume RUN --total-timesteps 0", "total_timesteps must be"),
    "label": ("train --env CartPole-v1 --label ../x", "label must be at most 80 letters"),
    "label on resume": ("train --resume RUN --label x", "--label cannot be given with --resume"),
    "compare nothing": ("compare", "--envs ID..."),
    "compare unknown": ("compare --envs CartPol-v1 CartPole-v0", "did you mean 'CartPole-v1'?"),
    "compare algorithm": ("compare --envs CartPole-v1 --algos akctr", "did you mean acktr?"),
    "compare preset": ("compare --envs CartPole-v1 --algos acktr-best", "got 'best'"),
    "compare unpublished": (
        "compare --envs CartPole-v1 --algos acktr-paper",
        "the paper has no configuration for CartPole-v1",
    ),
    "compare seeds": ("compare --envs CartPole-v1 --seeds 1-", "a range such as 0-4 is needed"),
    "compare workers": ("compare --envs CartPole-v1 --workers 0", "--workers must be at least 1"),
    "compare steps": (
        "compare --envs CartPole-v1 --total-timesteps 0",
        "--total-timesteps must be at least 1",
    ),
    "compare twice": ("compare --envs CartPole-v1 CartPole-v1", "name each once"),
    "compare file": ("compare --envs CartPole-v1 --algos x=bad/key.json", "did you mean gamma?"),
    "compare label": (
        "compare --envs CartPole-v1 --algos /x=small.json",
        "small.json: cannot read",
    ),
    "compare common": (
        "compare --envs CartPole-v1 --config bad/nan.json",
        "gamma must be a finite",
    ),
    "compare other run": (
        "compare --envs CartPole-v1 --total-timesteps 1024",
        "runs/CartPole-v1/acktr/seed0: its num_envs is 4 but the grid's is 8",
    ),
    "compare file as folder": (
        "compare --envs CartPole-v1 --run-dir bad/text.json",
        "cannot create the folder",
    ),
    "eval without run": ("eval", "RUN"),
    "eval nothing": ("eval nowhere", "no such folder"),
    "eval no run": ("eval bad/none", "no run in it"),
    "eval damaged": ("eval bad/run", "damaged"),
    "eval no best": ("eval bad/run --checkpoint best", "use --checkpoint last"),
    "eval misspelt": ("eval RUN --epsiodes 3", "did you mean --episodes?"),
    "eval none": ("eval RUN --episodes 0", "--episodes must be at least 1"),
    "eval both": ("eval RUN --stochastic --deterministic", "exclude each other"),
    "eval seed": ("eval RUN --seed 99999999999", "seed"),
    "plot nothing": ("plot", "no runs to plot"),
    "plot no run": ("plot nowhere", "no such folder"),
    "plot empty": ("plot bad/none", "no run in it"),
    "record of several": ("record bad", "3 runs; name one, such as bad/"),
    "plot suffix": ("plot RUN --out fig.exe", "must end in .png or .svg"),
    "report nothing": ("report --out x", "no runs to report"),
    "report nowhere": ("report runs", "--out DIR"),
    "report no folder": ("report nowhere --out x", "nowhere: no such folder"),
    "report no run": ("report bad/none --out x", "no run in it"),
    "report unfinished": ("report bad/unfinished --out x", "none of the 1 runs has finished"),
    "report damaged": ("report bad/monitor --out x", "monitor.csv: columns r, l, t"),
    "report label": (
        "report RUN --out x --labels b",
        "no finished run of label 'b'; there are acktr",
    ),
    "report labels": ("report RUN --out x --labels a a", "--labels: each label once"),
    "report baseline": ("report RUN --out x --baseline b", "the baseline 'b' is not in acktr"),
    "report metric": ("report RUN --out x --metric best", "'best' is not one of last100, eval"),
    "report few": ("report RUN --out x --resamples 9", "--resamples must be in [100, 100000]"),
    "report references": ("report RUN --out x --references no.csv", "no.csv: cannot read"),
    "report bad CSV": ("report RUN --out x --references bad/list.json", "no header line"),
    "report on a file": ("report RUN --out bad/text.json", "bad/text.json: is not a folder"),
    "report over files": ("report RUN --out bad/files", "would be replaced by the report"),
    "eval many": (
        "eval RUN --episodes 99999999999999999999999",
        "--episodes must be in [1, 9223372036854775807]",
    ),
    "eval long name": (f"eval {'a' * 300}", "File name too long"),
    "resume long name": (f"train --resume {'a' * 300}", "File name too long"),
    "train long name": (f"train --env CartPole-v1 --run-dir {'a' * 300}", "File name too long"),
    "plot long name": (f"plot {'a' * 300}", "File name too long"),
    "import syntax": ("train --env CartPole-v1 --import broken_syntax", "SyntaxError: "),
    "import fails": ("train --env CartPole-v1 --import broken_division", "ZeroDivisionError: "),
    "import relative": ("train --env CartPole-v1 --import .x", "--import .x: "),
    "record suffix": ("record RUN --out clip.exe", "must end in .mp4 or .gif"),
    "record nothing": ("record nowhere", "no such folder"),
    "export nothing": ("export nowhere --out p.pt2", "no such folder"),
    "export where": ("export RUN", "--out FILE"),
    "export suffix": ("export RUN --out p.exe", "must end in .onnx"),
    "export TorchScript": ("export RUN --out p.pt", "TorchScript is deprecated in torch"),
    "export damaged": ("export bad/run --out p.pt2", "damaged"),
    "export to nowhere": ("export RUN --out no/p.pt2", "cannot write: No such file"),
}


@pytest.fixture
def bad_files(here: Path) -> Path:
    bad = here / "bad"
    bad.mkdir()
    (bad / "text.json").write_text("gamma: 1")
    (bad / "list.json").write_text("[1]")
    (bad / "deep.json").write_text("[" * 100_000)
    (bad / "twice.json").write_text('{"gamma": 0.9, "gamma": 0.8}')
    (bad / "long.json").write_text(json.dumps({"algo": "a" * 100_000}))
    (bad / "key.json").write_text('{"gama": 1}')
    (bad / "type.json").write_text('{"acktr": {"actor": 3}}')
    (bad / "nan.json").write_text('{"gamma": NaN}')
    (bad / "huge.json").write_text(" " * (1 << 20) + "{}")
    shutil.copytree(RUN, bad / "run")
    for older in (bad / "run/checkpoints").iterdir():
        if older.name != "last":  # to which a resume would fall back
            shutil.rmtree(older)
    (bad / "none").mkdir()
    (bad / "files").mkdir()
    (bad / "files/report.md").write_text("mine")
    for name, file, content in (
        ("unfinished", "eval.csv", "timesteps,mean_reward,std_reward,episodes\n"),
        ("monitor", "monitor.csv", "r,l\n"),
    ):
        shutil.copytree(RUN, bad / name, ignore=shutil.ignore_patterns("checkpoints"))
        (bad / name / file).write_text(content)
    state = bad / "run/checkpoints/last/state.safetensors"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    return here


@pytest.mark.parametrize("name", BAD)
def test_bad_input(
    name: str,
    bad_files: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exit code 2, one line that helps, and nothing on the disk has changed."""
    register_bad_space()
    modules = tmp_path_factory.mktemp("modules")
    (modules / "broken_syntax.py").write_text("def :\n")
    (modules / "broken_division.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(modules)
    before = tree(bad_files)
    command, expected = BAD[name]
    argv = [str(RUN) if word == "RUN" else word for word in command.split()]
    code, out, err = call(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("acktr: error: ") and err.count("\n") == 1, err
    assert expected in err
    assert "Traceback" not in err and len(err) < 10_000
    assert tree(bad_files) == before


def shell(here: Path, words: str) -> subprocess.CompletedProcess[str]:
    """What a shell makes of ``acktr WORDS``."""
    return subprocess.run(
        ["/bin/sh", "-c", f'"$0" -m acktr {words}', sys.executable],
        env=environment(),
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_cannot_be_written(here: Path) -> None:
    done = shell(here, f"eval {RUN} --episodes 1 >/dev/full")
    assert done.returncode == 2
    assert done.stderr == "acktr: error: standard output: No space left on device\n"


def test_closed_streams(here: Path) -> None:
    done = shell(here, f"eval {RUN} --episodes 1 >&-")
    assert (done.returncode, done.stderr) == (0, "")
    argv = f"train --env CartPole-v1 --seed 5 {' '.join(SMALL)} --total-timesteps 128"
    done = shell(here, f"{argv} 2>&-")
    assert done.returncode == 0 and done.stdout.startswith("done: CartPole-v1, 128 steps")


def test_reader_that_goes_away(here: Path) -> None:
    """``acktr report ... | true``: nothing is said, and the report is there."""
    reading, writing = os.pipe()
    os.close(reading)
    argv = [sys.executable, "-m", "acktr", "report", str(RUN), "--out", "made"]
    done = subprocess.run(
        argv, env=environment(), stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
    assert (here / "made" / "report.md").is_file()


def register_bad_space() -> None:
    if "toys/BadSpace-v0" not in gymnasium.registry:
        observations = spaces.Text(3)
        kwargs = {"observation_space": observations, "action_space": spaces.Discrete(2)}
        maker: Any = toys.SpacesEnv
        gymnasium.register("toys/BadSpace-v0", entry_point=maker, kwargs=kwargs)


class TestFaults:
    def test_environment(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        toys.FaultyEnv.made = 0
        env = toys.variant(toys.FaultyEnv, {"at": 200, "index": 2, "what": "reward"})
        argv = ("--env", f"tests.tools.toys:{env}", *SMALL, "--checkpoint-freq", "512")
        code, _, err = call(capsys, "train", *argv)
        assert code == 76
        line = err.splitlines()[-1]
        assert line.startswith(f"acktr: error: environment 2 of {env} returned a non-finite reward")
        assert "step 200" in line
        last = next(
            (here / "runs").glob("tests.tools.toys_toys_Variant*/acktr/seed0/checkpoints/last")
        )
        log = last.parents[1] / "fault.log"
        assert line.endswith(
            f"last good checkpoint: {last.relative_to(here)}, step 768; traceback in"
            f" {log.relative_to(here)}"
        )
        assert load_checkpoint(last)[0]["timesteps"] == 768  # not 512, the last regular one
        assert "returned a non-finite reward" in log.read_text()
        assert table(last.parents[1] / "progress.csv")[-1]["timesteps"] == "768"
        assert "Traceback" not in err

    def test_discrete_observation_out_of_range(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        toys.FaultyEnv.made = 0
        settings = {"at": 5, "index": 1, "value": 17, "states": 5}
        env = toys.variant(toys.FaultyEnv, settings)
        code, _, err = call(capsys, "train", "--env", env, *SMALL)
        assert code == 76
        assert f"environment 1 of {env} returned the observation 17 at step 5" in err
        assert "not in range for Discrete(5)" in err and "Traceback" not in err

    def test_first_update(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        toys.FaultyEnv.made = 0
        env = toys.variant(toys.FaultyEnv, {"what": "exception"})
        code, _, err = call(capsys, "train", "--env", env, *SMALL)
        assert code == 76
        assert "raised ZeroDivisionError at step 3: the toy broke (episode 1, seed " in err
        assert "); last good checkpoint: " in err and "step 0; traceback in" in err

    def test_numeric(
        self, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("acktr.envs.guard._LARGEST_REWARD", math.inf)  # let it pass
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
