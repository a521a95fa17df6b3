"""What checkpoints cost: their size, the seconds of a save beside training, and those of a resume.

Usage: python -m scripts.reliability.checkpoints --out results/reliability

A run is trained by the command line, then resumed for one update more; the seconds of a resume
are those from the start of its process to that update's row in progress.csv, and to the end of the
process, which also saves. Saves are timed here, as a session makes them: the trainer's state with
all environments, encoded, synced and renamed. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from acktr.config import preset
from acktr.environments import training_envs
from acktr.report.tables import markdown as table
from acktr.runs.checkpoint import load_checkpoint, save_checkpoint
from acktr.runs.folder import KEPT, RunFolder, run_path
from acktr.runs.saved import run_meta
from acktr.train import Trainer
from scripts.common import (
    ScriptError,
    check_folder,
    command_line,
    complain,
    described_machine,
    integer,
    parsed,
    run,
    save,
)

ENVS = ("BreakoutNoFrameskip-v4", "HalfCheetah-v5")
_SAVES = 5


@dataclass(frozen=True)
class Cost:
    """What was measured of an environment's preset."""

    env: str
    mib: float
    """Size of a checkpoint."""
    save: float
    """Seconds of a save, the median."""
    interval: float
    """Seconds of training between two checkpoints of the preset."""
    resume: float
    """Seconds from the start of a resumed process to its first update."""
    whole: float
    """Seconds to its end, with that update alone."""


def measure(env: str, steps: int) -> Cost:
    """Train, save, resume.

    Raises:
        ScriptError: A command fails.
    """
    config = preset(env)[0]
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as name:
        runs = Path(name)
        train = ["train", "--env", env, "--run-dir", name, "--stop-at", str(steps)]
        _command(train)
        folder = RunFolder(run_path(runs, config))
        size = sum(path.stat().st_size for path in folder.last.iterdir())
        done, began = _steps(folder), time.time()
        _command(["train", "--resume", str(folder.path), "--stop-at", str(done + 1)])
        whole = time.time() - began
        if _steps(folder) <= done:
            raise ScriptError(f"{env}: the resumed run made no update")
        resume = folder.progress.stat().st_mtime - began  # written by that update, and not after
        seconds, speed = _saves(env, steps, runs)
    return Cost(env, size / 2**20, seconds, config.checkpoint_freq / speed, resume, whole)


def _steps(folder: RunFolder) -> int:
    """Steps of the last checkpoint, of whole updates."""
    return int(load_checkpoint(folder.last)[0]["timesteps"])


def _command(words: list[str]) -> None:
    command = [sys.executable, "-P", "-m", "acktr", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.splitlines() or ["nothing"])[-1]
        raise ScriptError(f"{' '.join(words)}: exit code {done.returncode}: {said}")


def _saves(env: str, steps: int, where: Path) -> tuple[float, float]:
    """Median seconds of a save, and steps per second of the updates before it."""
    config = preset(env)[0]
    with closing(training_envs(config)) as envs:
        trainer = Trainer(config, envs)
        began, speed = time.monotonic(), 0.0
        for stats in trainer.run(config.total_timesteps):
            if stats.timesteps >= steps:
                speed = stats.timesteps / (time.monotonic() - began)
                break
        spent = []
        for _ in range(_SAVES):
            began = time.monotonic()
            state = trainer.state_dict()
            save_checkpoint(where / "saved", state, run_meta(config, state, None), KEPT - 1)
            spent.append(time.monotonic() - began)
    return statistics.median(spent), speed


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code: 0, 2 bad input, 130 Ctrl-C, 75 SIGTERM."""
    return run("checkpoints", lambda _: _work(argv), "nothing is written before the end")


def _work(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.reliability.checkpoints", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints.md")
    parser.add_argument("--envs", nargs="+", default=ENVS, metavar="ID")
    parser.add_argument("--steps", type=integer(1), default=20_000, help="of each run")
    asked = parsed(parser, argv)
    check_folder(asked.out)
    body = []
    for env in asked.envs:
        cost = measure(env, asked.steps)
        complain("checkpoints", f"{env}: {cost.mib:.1f} MiB, {cost.save:.2f} s")
        share = f"{cost.save / cost.interval:.2%}"
        resume = [f"{cost.resume:.1f}", f"{cost.whole:.1f}"]
        body.append([env, f"{cost.mib:.1f}", f"{cost.save:.3f}", share, *resume])
    head = ["preset", "size, MiB", "a save, s", "of the training between two"]
    head += ["resume to the first update, s", "whole process, s"]
    text = "\n".join(
        [
            "# What checkpoints cost\n",
            f"Command: `{command_line('reliability.checkpoints', argv)}`\n",
            f"Runs of {asked.steps:,} steps. A resumed process makes one update and a last"
            " checkpoint.\n",
            table(head, body),
            described_machine(environments=True),
        ]
    )
    save(asked.out, {"checkpoints.md": text.encode()})
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
