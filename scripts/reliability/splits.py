"""Runs that are split at random updates and resumed in new processes, and runs done twice."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from acktr.config import Config, preset
from scripts.reliability.fingerprints import chain, digest
from scripts.reliability.runs import ALGOS
from scripts.reliability.trials import Trial, forked

MUJOCO = (
    *("Ant-v5", "HalfCheetah-v5", "Hopper-v5", "Humanoid-v5"),
    *("InvertedDoublePendulum-v5", "Reacher-v5", "Swimmer-v5", "Walker2d-v5"),
)
GAMES = ("BeamRider", "Breakout", "Pong", "Qbert", "Seaquest", "SpaceInvaders")
STICKY = (0.0, 0.25)
CLASSIC = ("CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCarContinuous-v0")
_TASKS = (
    *MUJOCO,
    *(f"{game}NoFrameskip-v4 sticky={sticky}" for sticky in STICKY for game in GAMES),
    *CLASSIC,
)
COUNT = len(_TASKS)  # which 7 does not divide: few trials are of many kinds
_REPEATED = ("CartPole-v1", "Hopper-v5", "BreakoutNoFrameskip-v4")


def small(env: str, algo: str, seed: int, **changes: Any) -> Config:
    """The preset with four environments of 16 steps an update."""
    chosen, _ = preset(env, algo)
    few: dict[str, Any] = {"num_envs": 4, "num_steps": 16, "seed": seed, "device": "cpu"}
    return dataclasses.replace(chosen, **{**few, **changes})


def plan_splits(count: int, scratch: Path) -> list[Trial]:
    """All tasks in turn, each with the algorithms in turn."""
    return [
        Trial(f"{_TASKS[7 * number % COUNT]} {ALGOS[(number + number // COUNT) % 3]}", number)
        for number in range(count)
    ]


def split(trial: Trial, here: Path) -> str:
    """Two resumes at random updates: every update is as in the run without a break."""
    rng = random.Random(f"split {trial.seed}")
    env, *sticky, algo = trial.what.split()
    config = small(env, algo, 1000 + trial.seed)
    if sticky:
        chance = float(sticky[0].partition("=")[2])
        atari = dataclasses.replace(config.atari, sticky=chance)
        config = dataclasses.replace(config, atari=atari)
    until = rng.randint(20, 40)
    first, second = sorted(rng.sample(range(1, until), 2))
    straight = elsewhere(config, until, here / "straight.json")
    one = elsewhere(config, first, here / "1.json", save=here / "1")
    two = elsewhere(config, second, here / "2.json", origin=here / "1", save=here / "2")
    rest = elsewhere(config, until, here / "3.json", origin=here / "2")
    # The last hash of each part is one of the whole state, not of the parameters alone.
    found = [*one[:-1], "", *two[:-1], "", *rest]
    straight[first - 1] = straight[second - 1] = ""
    wrong = [number for number, (a, b) in enumerate(zip(straight, found, strict=True), 1) if a != b]
    assert not wrong, f"differs from update {wrong[0]}; split at {first} and {second} of {until}"
    return f"split at {first} and {second} of {until} updates"


def plan_repeats(count: int, scratch: Path) -> list[Trial]:
    """Three environments with the algorithms."""
    grid = [f"{env} {algo}" for env in _REPEATED for algo in ALGOS]
    return [Trial(grid[number % len(grid)], number // len(grid)) for number in range(count)]


def repeated(trial: Trial, here: Path) -> str:
    """The same seed twice, and with 1 and 2 workers, is the same; another seed is not."""
    env, algo = trial.what.split()
    seed, updates = 50 + trial.seed, 40
    one = elsewhere(small(env, algo, seed, env_workers=1), updates, here / "1.json")
    for name, config in (
        ("the second time", small(env, algo, seed, env_workers=1)),
        ("with two workers", _two(env, algo, seed)),
    ):
        found = elsewhere(config, updates, here / "again.json")
        wrong = [number for number, (a, b) in enumerate(zip(one, found, strict=True), 1) if a != b]
        assert not wrong, f"{name} differs from update {wrong[0]}"
    other = elsewhere(small(env, algo, seed + 1), 2, here / "other.json")
    assert other[0] != one[0], "another seed gives the same"
    return f"{updates} updates: {digest(one)}"


def _two(env: str, algo: str, seed: int) -> Config:
    """Two workers, or for Atari, which has threads instead, two of these."""
    if "NoFrameskip" not in env:
        return small(env, algo, seed, env_workers=2)
    config = small(env, algo, seed)
    atari = dataclasses.replace(config.atari, num_threads=2)
    return dataclasses.replace(config, atari=atari)


def elsewhere(
    config: Config,
    until: int,
    file: Path,
    *,
    origin: Path | None = None,
    save: Path | None = None,
) -> list[str]:
    """The chain of hashes of a run in a process of its own.

    Raises:
        AssertionError: The run failed.
    """

    def work() -> str:
        file.write_text(json.dumps(chain(config, until, origin=origin, save=save)))
        return "done"

    outcome = forked(work, file.with_suffix(".txt"), 900.0)
    assert not outcome.wrong, outcome.said
    found: list[str] = json.loads(file.read_text())
    return found
