from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from acktr.runs.checkpoint import load_checkpoint
from tests.tools.command_line import SMALL, TRAIN, call, environment, start, table, wait_for


class TestSignals:
    @pytest.mark.parametrize(
        ("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 75)], ids=["INT", "USR1"]
    )
    def test_checkpoint_and_resume(
        self, number: signal.Signals, code: int, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        process = start(here, *TRAIN, "--seed", "6", "--total-timesteps", "1000000")
        wait_for(process, "steps")
        process.send_signal(number)
        time.sleep(0.01)
        process.send_signal(signal.SIGTERM)  # as if it had come once
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
        time.sleep(1)  # now it is in its endless first update
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "checkpoint at step 0" in err
        assert "Traceback" not in err

    @pytest.mark.slow
    def test_environment_that_never_returns_from_c(self, here: Path) -> None:
        """No exception can be raised in the main thread; another one saves what was learned."""
        code = (
            "import sys; from acktr import interrupts; from acktr.cli.main import main;"
            "interrupts.PATIENCE = interrupts._LOOK = 0.1; sys.exit(main())"
        )
        env = "tests.tools.toys:toys/Stuck-v0"
        argv = ["train", "--env", env, "--env-workers", "1", "--seed", "9", *SMALL]
        done = subprocess.run(
            [sys.executable, "-c", code, *argv],
            cwd=here,
            env=environment(OMP_NUM_THREADS="1"),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 75
        run = Path("runs/tests.tools.toys_toys_Stuck-v0/acktr/seed9")
        last = "acktr: stopped by SIGTERM, checkpoint at step 128; continue with: acktr train"
        assert done.stderr.splitlines()[-1] == f"{last} --resume {run}"
        assert load_checkpoint(run / "checkpoints/last")[0]["timesteps"] == 128

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
