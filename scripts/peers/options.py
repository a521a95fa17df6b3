"""The command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.arguments import given_once, integer, parsed
from scripts.peers.errors import PeerError
from scripts.peers.settings import PEERS
from scripts.peers.translate import OURS

_DESCRIPTION = """\
Train the algorithms of stable-baselines3 and sb3-contrib on the environments, seeds, steps and
evaluation of our own runs, and write RUN_DIR/ENV/PEER/seedN. Several values of --peers, --envs or
--seeds are a grid, of which finished runs are skipped. A run that is stopped is made from the
start the next time.
"""
_EPILOG = """\
sb3-a2c and sb3-trpo take the values of our own preset for the environment, or of the run that
--like names; sb3-ppo takes those published for it in rl-baselines3-zoo.
"""
_LAST_SEED = 2**31 - 2**20 - 1
_MOST_STEPS = 10**10


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for."""

    peers: tuple[str, ...]
    envs: tuple[str, ...]
    seeds: tuple[int, ...]
    run_dir: Path
    total_timesteps: int
    eval_episodes: int
    workers: int
    like: Path | None
    settings: Path | None


def parse(argv: Sequence[str]) -> Options:
    """Options of a command line; help is printed and ends in SystemExit.

    Raises:
        PeerError: One line that says what is wrong.
    """
    found = parsed(_parser(), argv, PeerError)
    given_once(found, ["peers", "envs", "seeds"], PeerError)
    if found.like is not None and not set(found.peers) <= set(OURS):
        raise PeerError(f"argument --like: only {' and '.join(OURS)} are like runs of ours")
    if found.settings is not None and len(found.peers) > 1:
        raise PeerError("argument --settings: a file of settings is for one peer")
    return Options(
        peers=tuple(found.peers),
        envs=tuple(found.envs),
        seeds=tuple(found.seeds),
        run_dir=found.run_dir,
        total_timesteps=found.total_timesteps,
        eval_episodes=found.eval_episodes,
        workers=found.workers,
        like=found.like,
        settings=found.settings,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peers", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False
    )
    parser.add_argument(
        "--peers",
        "--peer",
        nargs="+",
        required=True,
        choices=PEERS,
        metavar="PEER",
        help=", ".join(PEERS),
    )
    parser.add_argument("--envs", "--env", nargs="+", required=True, metavar="ENV")
    parser.add_argument(
        "--seeds", "--seed", nargs="+", type=integer(0, _LAST_SEED), default=[0], metavar="SEED"
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="default runs")
    parser.add_argument(
        "--total-timesteps",
        type=integer(1, _MOST_STEPS),
        default=1_000_000,
        metavar="STEPS",
        help="environment steps, summed over parallel environments; default 1000000",
    )
    parser.add_argument(
        "--eval-episodes", type=integer(1, 10_000), default=20, metavar="N", help="default 20"
    )
    parser.add_argument(
        "--workers", type=integer(1, 256), default=1, help="processes of a grid; default 1"
    )
    parser.add_argument(
        "--like", type=Path, metavar="PATH", help="run of a2c or trpo, or its config.json"
    )
    parser.add_argument(
        "--settings", type=Path, metavar="FILE", help="JSON with settings that replace others"
    )
    return parser


def shared(asked: Options) -> list[str]:
    """Arguments that all runs of a grid have in common."""
    found = ["--run-dir", str(asked.run_dir), "--total-timesteps", str(asked.total_timesteps)]
    found += ["--eval-episodes", str(asked.eval_episodes)]
    for flag, path in (("--like", asked.like), ("--settings", asked.settings)):
        if path is not None:
            found += [flag, str(path)]
    return found
