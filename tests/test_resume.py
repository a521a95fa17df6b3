"""A run that is stopped and resumed equals the one that was not, bit for bit."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from acktr.apart import TOLD_LATER
from acktr.config import Config, preset
from acktr.environments import training_envs
from acktr.envs import AtariSettings
from acktr.interrupts import Interrupts, Stopped
from acktr.runs.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from acktr.runs.folder import run_path
from acktr.runs.logger import RunLogger
from acktr.runs.start import resume, start
from acktr.runs.tables import read_table
from acktr.train import Trainer
from scripts.reliability.fingerprints import differing, fingerprint, numbers
from tests.runs.test_logger import scalars
from tests.tools.command_line import environment

linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are for Linux")


def config(env: str, algo: str = "acktr", **changes: Any) -> Config:
    chosen, _ = preset(env, algo)
    return dataclasses.replace(chosen, **{"num_steps": 16, "num_envs": 4, "seed": 5, **changes})


def rows(trainer: Trainer, updates: int, without: Sequence[str] = ()) -> list[Any]:
    """What so many updates report, without what the clock says and some metrics."""
    found: list[Any] = []
    for stats in trainer.run(1_000_000):
        metrics = {k: v for k, v in stats.metrics.items() if not k.startswith("time/")}
        metrics = {k: v for k, v in metrics.items() if k not in without}
        episodes = [(each.reward, each.length, each.info) for each in stats.episodes]
        found.append((stats.timesteps, metrics, episodes))
        if len(found) == updates:
            break
    return found


def require_same_halves(tmp_path: Path, first: Config, second: Config, updates: int) -> None:
    """Train, save, and go on in new objects; all must be as without the break.

    One worker reports the critic's steps at once, several with the next update.
    """
    other = TOLD_LATER if first.env_workers != second.env_workers else ()

    def kept(state: dict[str, Any]) -> Any:
        if other:
            state["learner"].pop("critic_report", None)
        return numbers(state)

    with closing(training_envs(first)) as envs:
        straight = Trainer(first, envs)
        before, state = rows(straight, updates), straight.state_dict()
        assert state["collector"]["unsaved"] is None
        save_checkpoint(tmp_path / "half", state, {})
        after, end = rows(straight, updates, other), straight.state_dict()
    with closing(training_envs(second)) as envs:
        resumed = Trainer(second, envs)
        resumed.load_state_dict(load_checkpoint(tmp_path / "half")[0])
        assert numbers(resumed.state_dict()) == numbers(state)
        assert rows(resumed, updates, other) == after
        assert kept(resumed.state_dict()) == kept(end)
    assert sum(len(episodes) for *_, episodes in before + after) > 0


@linux
@pytest.mark.parametrize(
    ("env", "algo", "workers", "updates"),
    [
        ("CartPole-v1", "acktr", (1, 2), 6),
        ("CartPole-v1", "trpo", (1, 1), 6),
        ("Pendulum-v1", "a2c", (2, 1), 9),
        ("Hopper-v5", "acktr", (1, 1), 4),
        ("Hopper-v5", "acktr", (2, 2), 4),
        ("Ant-v5", "a2c", (2, 2), 6),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(
    env: str, algo: str, workers: tuple[int, int], updates: int, tmp_path: Path
) -> None:
    short = {"max_episode_steps": 60}  # so that some end, whatever the processor rounds to
    first, second = (config(env, algo, env_workers=number, env_kwargs=short) for number in workers)
    require_same_halves(tmp_path, first, second, updates)


def test_atari_resumes(tmp_path: Path) -> None:
    atari = AtariSettings(reseed_steps=60, max_frames=400, screen_size=36)
    chosen = config("BreakoutNoFrameskip-v4", "a2c", num_envs=2, num_steps=30, atari=atari)
    require_same_halves(tmp_path, chosen, chosen, 4)


@pytest.mark.slow
@pytest.mark.parametrize("sticky", [0.0, 0.25])
@pytest.mark.parametrize(
    "game", ["Breakout", "Pong", "Qbert", "SpaceInvaders", "Seaquest", "BeamRider"]
)
def test_six_atari_games_resume(game: str, sticky: float, tmp_path: Path) -> None:
    atari = AtariSettings(reseed_steps=300, max_frames=4000, sticky=sticky)
    chosen = config(f"{game}NoFrameskip-v4", num_steps=20, atari=atari)
    require_same_halves(tmp_path, chosen, chosen, 30)


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["acktr", "a2c", "trpo"])
@pytest.mark.parametrize("env", ["Ant-v5", "HalfCheetah-v5", "Humanoid-v5", "Walker2d-v5"])
def test_mujoco_resumes_with_each_algorithm(env: str, algo: str, tmp_path: Path) -> None:
    chosen = config(env, algo, env_workers=2)
    require_same_halves(tmp_path, chosen, chosen, 70)


class Killed(BaseException):
    """In place of SIGKILL: nothing is saved on the way out."""


def logs(run: Path) -> dict[str, Any]:
    """All that a run wrote, without what the clock says."""

    def table(name: str) -> list[Any]:
        clocks = ("t", "time/")
        return [
            {k: v for k, v in row.items() if not (k == clocks[0] or k.startswith(clocks[1]))}
            for row in read_table(run / name).rows
        ]

    points = scalars(run)
    state, meta = load_checkpoint(run / "checkpoints/last")
    return {
        "state": numbers(state),
        "timesteps": meta["timesteps"],
        "board": {
            tag: [step if tag.startswith("time/") else (step, value) for step, value in found]
            for tag, found in points.items()
        },
        **{name: table(name) for name in ("monitor.csv", "progress.csv", "eval.csv")},
    }


@pytest.mark.parametrize("eval_freq", [pytest.param(0, marks=pytest.mark.slow), 512])
def test_a_run_that_stops_early_goes_on_as_if_it_had_not(eval_freq: int, tmp_path: Path) -> None:
    """On the schedule of the whole run, with the same best checkpoint: nothing is tried at 640."""
    small = {"num_envs": 2, "num_steps": 32, "total_timesteps": 1024, "eval_episodes": 1}
    chosen = config("CartPole-v1", **small, checkpoint_freq=256, eval_freq=eval_freq)
    straight, split = (run_path(tmp_path / name, chosen) for name in ("straight", "split"))

    def train(name: str, stop_at: int | None) -> str:
        draw, network, label = (lambda *_: None), None, None
        path = tmp_path / name
        return start(chosen, path, "test", Interrupts(), [], draw, label, network, stop_at)

    train("straight", None)
    said = train("split", 600)
    command = f"acktr train --resume {split}"
    assert said == f"stopped as asked at step 640; continue with: {command}"
    rates = [float(row["train/learning_rate"]) for row in read_table(split / "progress.csv").rows]
    falling = [chosen.acktr.actor.lr * (1 - 64 * i / 1024 / 1.1) for i in range(10)]
    assert rates == pytest.approx(falling, rel=1e-6)
    again = resume(split, None, Interrupts(), [], lambda *_: None, None, 640)
    assert again == f"{split} is at step 640: a --stop-at above it, or none, continues it"
    for stop_at in (641, None):
        resume(split, None, Interrupts(), [], lambda *_: None, None, stop_at)
    assert logs(split) == logs(straight)
    found, wanted = fingerprint(split), fingerprint(straight)
    assert differing(found, wanted) == ""


@pytest.mark.parametrize("kept", [True, False])
def test_a_killed_run_leaves_the_same_files(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by a signal, which leaves a checkpoint, or killed after one."""
    small = {"num_envs": 2, "num_steps": 32, "total_timesteps": 1024, "eval_episodes": 1}
    chosen = config("CartPole-v1", **small, checkpoint_freq=256, eval_freq=512)
    runs = []
    for name in ("straight", "split"):
        runs.append(run_path(tmp_path / name, chosen))
        with monkeypatch.context() as patch:
            if name == "split":
                write = RunLogger.write

                def interrupted(self: RunLogger, stats: Any, write: Any = write) -> None:
                    write(self, stats)
                    if stats.timesteps == 704 and kept:
                        signal.raise_signal(signal.SIGTERM)
                    elif stats.timesteps == 704:
                        raise Killed

                patch.setattr(RunLogger, "write", interrupted)
            with suppress(Killed, Stopped), Interrupts() as interrupts:
                start(chosen, tmp_path / name, "test", interrupts, [], lambda *_: None)
    assert load_checkpoint(runs[1] / "checkpoints/last")[1]["timesteps"] == (704 if kept else 512)
    with Interrupts() as interrupts:
        resume(runs[1], None, interrupts, [], lambda *_: None)
    straight, split = (logs(run) for run in runs)
    assert straight.keys() == split.keys()
    for name in straight:
        assert split[name] == straight[name], name
    assert len(straight["board"]["train/approx_kl"]) == 16


@pytest.mark.slow
@pytest.mark.parametrize("env", ["Hopper-v5", "Ant-v5"])
def test_killed_processes_leave_the_same_files(env: str, tmp_path: Path) -> None:
    settings = "--num-envs 4 --num-steps 64 --total-timesteps 8192 --checkpoint-freq 512"
    require_killed_is_the_same(env, settings, tmp_path)


def require_killed_is_the_same(env: str, settings: str, tmp_path: Path) -> None:
    """A run that is killed three times leaves the files of one that is not."""
    found = []
    for name in ("straight", "split"):
        words = f"train --env {env} {settings} --eval-episodes 1 --run-dir {tmp_path / name}"
        run = tmp_path / name / env.replace("/", "_") / "acktr" / "seed0"
        command = [sys.executable, "-m", "acktr", *words.split()]
        kills = 3 if name == "split" else 0
        while kills:
            with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL) as child:
                before = _saved(run)
                while child.poll() is None and _saved(run) <= before + 512:
                    time.sleep(0.02)
                child.kill()
            command = [sys.executable, "-m", "acktr", "train", "--resume", str(run)]
            kills -= 1
        subprocess.run(command, env=environment(), check=True, capture_output=True)
        found.append(logs(run))
    straight, split = found
    for name in straight:
        assert split[name] == straight[name], name


def _saved(run: Path) -> int:
    try:
        return int(load_checkpoint(run / "checkpoints/last")[1]["timesteps"])
    except CheckpointError:
        return 0
