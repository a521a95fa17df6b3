"""What a person coming from Stable-Baselines3 tries in Python, and what comes out.

Usage: python -m scripts.newcomer [--wrong] [--only WORD] [--out FILE]

Each program runs in a process and a folder of its own, with 600 steps of training at most. What it
prints last, or the error that it ends with, goes into a table.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import acktr
from scripts.common import on_files

PROGRAMS = Path(__file__).with_name("newcomer.txt")
"""The programs: `## what is wanted`, then the lines of one."""
WRONG = Path(__file__).with_name("wrong_uses.txt")
"""More of them, which nobody should write."""

_OURS = str(Path(acktr.__file__).parent)
"""Errors that are raised there have a message in the words of users."""
_LONGEST = 120
"""Seconds for a program."""

PRELUDE = """\
import gymnasium, numpy as np, torch
from gymnasium import spaces
from acktr import A2C, ACKTR, TRPO
class My(gymnasium.Env):
    observation_space = spaces.Box(-1, 1, (3,), np.float32)
    action_space = spaces.Discrete(2)
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(3, np.float32), {}
    def step(self, action):
        self.t += 1
        return np.full(3, self.t / 9, np.float32), float(action), False, self.t == 8, {}
def shown(space):
    class Shown(My):
        observation_space = space
        def reset(self, **kwargs):
            super().reset(**kwargs)
            return space.sample(), {}
        def step(self, action):
            return space.sample(), *super().step(action)[1:]
    return Shown
"""
"""What every program begins with."""


def programs(path: Path = PROGRAMS) -> dict[str, str]:
    """The programs by what is wanted."""
    parts = path.read_text().split("## ")[1:]
    return {name: code for name, _, code in (part.partition("\n") for part in parts)}


def outcome(code: str, folder: Path) -> tuple[str, str]:
    """How a program ends, works, says or fails, and its last words; changes the folder."""
    os.chdir(folder)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            exec(PRELUDE + code, {"__name__": "__main__"})
    except Exception as error:  # whatever a program raises is what is looked for
        raised = traceback.extract_tb(error.__traceback__)[-1]
        ours = raised.filename.startswith(_OURS) and (raised.line or "").startswith("raise")
        what = str(error).replace(f"{folder}{os.sep}", "")
        return ("says", what) if ours else ("fails", f"{type(error).__name__}: {what}")
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    return "works", lines[-1] if lines else ""


def run(code: str) -> tuple[str, str, float]:
    """The outcome of a program in a process of its own, and its seconds."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:

        def child() -> None:
            send.send(outcome(code, Path(folder)))

        process = context.Process(target=child)
        process.start()
        send.close()  # the end of the process is then that of the pipe
        try:
            there = receive.poll(_LONGEST)
            how, words = receive.recv() if there else ("fails", f"nothing within {_LONGEST} s")
        except EOFError:
            process.join()
            how, words = "fails", f"the process ended with code {process.exitcode}"
        process.join(5)
        process.kill()
    return how, words, time.monotonic() - began


def table(path: Path, only: str = "") -> str:
    """The Markdown table of all programs of a file whose names contain a word."""
    import torch

    torch.set_num_threads(1)
    chosen = {name: code for name, code in programs(path).items() if only in name}
    rows, count = [], {"works": 0, "says": 0, "fails": 0}
    for name, code in chosen.items():
        how, words, seconds = run(code)
        count[how] += 1
        cell = words.replace("\n", " ").replace("|", "\\|")
        rows.append(f"| {name} | {how} | `{cell:.300}` | {seconds:.1f} |")
    total = ", ".join(f"{number} {how}" for how, number in count.items())
    head = ["| wanted | | last words | seconds |", "|---|---|---|---|"]
    return "\n".join([f"{len(chosen)} programs: {total}.", "", *head, *rows]) + "\n"


def main() -> int:
    """Run the programs of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--wrong", action="store_true", help="wrong uses instead")
    parser.add_argument("--only", default="", help="part of the names of programs to run")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()

    def write() -> None:
        text = table(WRONG if options.wrong else PROGRAMS, options.only)
        if options.out is None:
            sys.stdout.write(text)
        else:
            options.out.write_text(text)

    return on_files("newcomer", write)


if __name__ == "__main__":
    sys.exit(main())
