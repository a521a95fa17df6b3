"""The command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.arguments import given_once, integer, parsed, positive
from scripts.bench.cases import Timing
from scripts.bench.errors import BenchError
from scripts.bench.suites import GAME, SUITES
from scripts.machine import cores

_DESCRIPTION = """\
Measure how many environment steps per second our algorithms and those of stable-baselines3 train
with, environments included, on the CPU; where the time goes; and how far that is from the limits
that environments and computation set. Every case runs in a process of its own, one after another.
Writes SUITE.md and SUITE.json when a suite is complete. For numbers to keep, nothing else should
run on the machine.
"""
_MOST_SECONDS = 3600.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for."""

    suites: tuple[str, ...]
    game: str
    out: Path
    timing: Timing
    rounds: int


def parse(argv: Sequence[str]) -> Options:
    """Options of a command line; help is printed and ends in SystemExit.

    Raises:
        BenchError: One line that says what is wrong.
    """
    found = parsed(_parser(), argv, BenchError)
    given_once(found, ["suite"], BenchError)
    if found.env is not None and not {"atari", "batch"} & set(found.suite):
        raise BenchError(
            "argument --env: it replaces the game of atari and batch, which are not in --suite"
        )
    _check_folder(found.out)
    return Options(
        suites=tuple(found.suite),
        game=GAME if found.env is None else found.env,
        out=found.out,
        timing=Timing(
            threads=found.torch_threads,
            seconds=found.seconds,
            windows=found.windows,
            warm_up=found.warm_up,
            warm_up_updates=found.warm_up_updates,
        ),
        rounds=found.rounds,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "--suite", nargs="+", required=True, choices=SUITES, metavar="NAME", help=", ".join(SUITES)
    )
    parser.add_argument(
        "--env", metavar="ID", help=f"game of the suites atari and batch; default {GAME}"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/performance"),
        help="folder of the reports; default results/performance",
    )
    parser.add_argument(
        "--torch-threads",
        type=integer(1, 1024),
        default=cores(),
        metavar="N",
        help="threads of torch; default one per core",
    )
    parser.add_argument(
        "--seconds",
        type=positive(_MOST_SECONDS),
        default=10.0,
        help="least length of a window; default 10",
    )
    parser.add_argument("--windows", type=integer(1, 1000), default=3, help="default 3")
    parser.add_argument(
        "--rounds",
        type=integer(1, 100),
        default=1,
        metavar="N",
        help="go through all cases so often, with as many windows each time, so that a machine "
        "whose speed drifts treats them alike; default 1",
    )
    parser.add_argument(
        "--warmup",
        dest="warm_up",
        type=positive(_MOST_SECONDS),
        default=5.0,
        metavar="SECONDS",
        help="least seconds before the first window; default 5",
    )
    parser.add_argument(
        "--warmup-updates",
        dest="warm_up_updates",
        type=integer(0, 10_000),
        default=20,
        metavar="N",
        help="least updates before the first window; default 20",
    )
    return parser


def _check_folder(out: Path) -> None:
    """Find out before the measurement whether its results could be written.

    Raises:
        BenchError: They could not.
    """
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not place.is_dir():
        raise BenchError(f"argument --out: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise BenchError(f"argument --out: cannot write to {place}")
