from __future__ import annotations

import json
import shlex
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from acktr.cli.main import main
from acktr.config import from_dict, merge, preset
from acktr.runs.checkpoint import load_checkpoint
from acktr.runs.folder import RunError, RunFolder, locked
from tests.tools.command_line import call, start, table, tree

FILE = {"num_envs": 4, "num_steps": 32, "device": "cpu"}
GRID = ("compare", "--envs", "CartPole-v1", "--config", "small.json", "--eval-episodes", "2")
LABEL = Path("runs/CartPole-v1/acktr-soft")


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("small.json").write_text(json.dumps(FILE))
    Path("soft.json").write_text('{"acktr": {"actor": {"damping": 0.5}}}')
    return tmp_path


def test_grid(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs at a time; again; and once more with one of them damaged."""
    total = ("--total-timesteps", "256", "--workers", "2")
    argv = (*GRID, *total, "--algos", "acktr-soft=soft.json", "--seeds", "0-1")
    code, out, err = call(capsys, *argv)
    assert (code, out) == (0, "done: 2 of 2 runs finished in runs\n")
    lines = err.splitlines()
    assert lines[0] == "runs: 2 new; 2 at a time"
    assert [line[:10] for line in lines[1:]] == ["1/2 done: ", "2/2 done: "]
    for seed in (0, 1):
        run = LABEL / f"seed{seed}"
        wanted = {**FILE, "seed": seed, "total_timesteps": 256, "eval_episodes": 2}
        wanted["acktr"] = {"actor": {"damping": 0.5}}
        config = from_dict(json.loads((run / "config.json").read_text()))
        assert config == merge(preset("CartPole-v1")[0], wanted)
        assert json.loads((run / "versions.json").read_text())["torch_threads"] == 1
        assert [row["timesteps"] for row in table(run / "eval.csv")] == ["256"]
        log = Path(f"runs/logs/CartPole-v1/acktr-soft-seed{seed}.log").read_text()
        assert "done: CartPole-v1, 256 steps" in log
    command = shlex.split((LABEL / "seed1/command.txt").read_text())
    assert command[0] == "acktr"
    command[command.index("--run-dir") + 1] = "again"
    assert main(command[1:]) == 0
    for name in ("config.json", "eval.csv"):
        again = Path("again/CartPole-v1/acktr-soft/seed1") / name
        assert again.read_bytes() == (LABEL / "seed1" / name).read_bytes()

    before = tree(empty)
    assert call(capsys, *argv) == (
        0,
        "done: 2 of 2 runs finished in runs\n",
        "runs: 2 finished; 2 at a time\n",
    )
    assert tree(empty) == before

    (LABEL / "seed0/eval.csv").unlink()
    for path in (LABEL / "seed0/checkpoints").glob("last*"):
        (path / "state.json").write_text("{}")
    shutil.rmtree(LABEL / "seed1/checkpoints")
    (LABEL / "seed1/eval.csv").unlink()
    code, out, err = call(capsys, *argv)
    assert (code, out) == (1, "")
    lines = err.splitlines()
    first = "CartPole-v1 acktr-soft seed 0: exit code 2: error: "
    second = "CartPole-v1 acktr-soft seed 1: runs/CartPole-v1/acktr-soft/seed1 has no checkpoint"
    assert lines[0] == "runs: 1 unfinished, 1 stuck; 2 at a time"
    assert any(line.startswith(f"failed: {first}") and "damaged" in line for line in lines)
    assert any(line.startswith(f"failed: {second}; delete it") for line in lines)
    assert lines[-1].startswith("acktr: error: 2 of 2 runs failed, see runs/logs; the last: ")


class TestSignals:
    RUN = Path("runs/CartPole-v1/acktr/seed3")
    ARGV = (*GRID, "--algos", "acktr", "--seeds", "3", "--total-timesteps", "8192")

    def stop(self, empty: Path, number: signal.Signals, name: str) -> int:
        """Stop it when the first run has begun; the exit code."""
        process = start(empty, *self.ARGV)
        deadline = time.monotonic() + 60
        while not (self.RUN / "progress.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert out == ""
        assert err.splitlines() == [
            "runs: 1 new; 1 at a time",
            "stopping what runs (1); a second signal kills it",
            f"acktr: stopped by {name}, 0 of 1 runs finished; continue with: "
            + shlex.join(["acktr", *self.ARGV]),
        ]
        with locked(RunFolder(self.RUN)):  # nobody trains it any more
            done = load_checkpoint(self.RUN / "checkpoints/last")[0]["timesteps"]
        assert 0 < done < 8192
        return process.returncode

    def test_interrupted_run_continues(
        self, empty: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.stop(empty, signal.SIGINT, "SIGINT") == 130
        code, _, err = call(capsys, *self.ARGV)
        assert (code, err.splitlines()[0]) == (0, "runs: 1 unfinished; 1 at a time")
        steps = [int(row["timesteps"]) for row in table(self.RUN / "progress.csv")]
        assert steps == list(range(128, 8193, 128))
        commands = (self.RUN / "command.txt").read_text().splitlines()
        assert commands[1:] == [f"acktr train --resume {self.RUN}"]

    @pytest.mark.slow
    def test_closed_terminal(self, empty: Path) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
        try:
            assert self.stop(empty, signal.SIGHUP, "SIGHUP") == 75
        finally:
            signal.signal(signal.SIGHUP, before)

    @pytest.mark.slow
    def test_runs_end_with_a_comparison_that_is_killed(self, empty: Path) -> None:
        process = start(empty, *self.ARGV)
        try:
            deadline = time.monotonic() + 60
            while not (self.RUN / "progress.csv").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            process.kill()
            process.communicate()
        for _ in range(300):
            with suppress(RunError), locked(RunFolder(self.RUN)):
                done = load_checkpoint(self.RUN / "checkpoints/last")[0]["timesteps"]
                break
            time.sleep(0.1)
        else:
            raise AssertionError("the run goes on")
        assert 0 < done < 8192
        log = Path("runs/logs/CartPole-v1/acktr-seed3.log").read_text()
        assert log.splitlines()[-1].startswith("acktr: stopped by SIGTERM, checkpoint at step")


def test_processes_of_environments_are_checked_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w.json").write_text('{"env_workers": 5000}')
    given = ("--envs", "Pendulum-v1", "--algos", "acktr", "--seeds", "0", "--config", "w.json")
    code, _, err = call(capsys, "compare", *given)
    assert code == 2
    assert "env_workers must be 'auto' or an integer from 1 to 1024, got 5000" in err
    assert not Path("runs").exists()
