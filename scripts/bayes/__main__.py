"""Bayesian networks beside each other: ``python -m scripts.bayes uci --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from scripts.bayes import active, cost, elbo, mnist, uci
from scripts.common import parsed, run

PARTS: dict[str, Callable[[Sequence[str]], int]] = {
    "uci": uci.work,
    "elbo": elbo.work,
    "mnist": mnist.work,
    "active": active.work,
    "cost": cost.work,
}


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code: 0, 2 bad input, 130 Ctrl-C, 75 SIGTERM."""
    note = "what is finished is kept, the same command continues"
    return run("bayes", lambda _: _part(argv), note)


def _part(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bayes", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("part", choices=tuple(PARTS), help="see PART --help")
    return PARTS[parsed(parser, argv[:1]).part](argv[1:])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
