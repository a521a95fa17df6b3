"""The command line: ``acktr`` and one of the commands in ``COMMANDS``.

The README of this package has the table of exit codes. Except for 0 and 141 the last line on
standard error says why; with 2 nothing else is there.
"""

from __future__ import annotations

import difflib
import faulthandler
import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import TextIO

from acktr import __version__
from acktr.cli.flags import FLAGS, HELP, TRAIN_HELP, UsageError, given_twice, unknown_option
from acktr.files import message, reason
from acktr.interrupts import STOPPED, Interrupts, Stopped, end_with_parent

BAD_INPUT, BROKEN_PIPE = 2, 141

MOST_CHARACTERS = 8192
"""Of one word of a command line."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

COMMANDS = tuple(FLAGS)

_MODULE = re.compile(r"(^|[=,])[^\W\d][\w.]*:[^\W\d]")
"""module:Name, as environments, wrappers and networks are named."""

_HELP = """\
usage: acktr COMMAND [OPTIONS]

ACKTR: actor-critic with Kronecker-factored trust regions.

commands:
  train   train an agent, or resume a run:  acktr train HalfCheetah-v5 --seed 0
                                            acktr train --resume RUN
  compare train a grid of environments, algorithms and seeds; skip and continue what is there:
                                            acktr compare --envs Hopper-v5 --workers 2
  eval    play episodes and report returns: acktr eval RUN --episodes 20
  record  record a video:                   acktr record RUN --out clip.mp4
  export  write the policy for others:      acktr export RUN --out policy.onnx
  plot    draw learning curves:             acktr plot RUN... --out curves.png
  report  compare finished runs:            acktr report RUNS... --out DIR
  list    a table of runs:                  acktr list runs
  diff    what sets two runs apart:         acktr diff RUN RUN
  presets the presets, or one's settings:   acktr presets Hopper-v5
  card    a page about a run, README.md:    acktr card RUN
  doctor  look whether training works here: acktr doctor

options:
  -h, --help   this text; after a command, its options
  --version    the version

A run is a folder RUN_DIR/ENV/LABEL/seedN, for example runs/HalfCheetah-v5/acktr/seed0; the label
is the algorithm if none is given.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (``sys.argv`` if none is given) and return the exit code.

    Help and version come at once: what takes seconds to import is imported for commands only.
    """
    if argv is None:
        faulthandler.enable(2)  # a crash in C, of an environment for example, tells where it was
        for number in STOPPED:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _leave)
        end_with_parent()
    _replace_closed_streams()
    try:
        return _told(argv)
    finally:
        _discard(sys.stderr)  # Python's own flush at the end would change the code


def _told(argv: Sequence[str] | None) -> int:
    """Run a command line and say what went wrong; returns the exit code."""
    try:
        return _run(_words(argv))
    except Stopped as stop:
        if argv is None:  # nothing is left to do but to leave with the right exit code
            for number in STOPPED:
                signal.signal(number, signal.SIG_IGN)
        return _failed(STOPPED[signal.Signals(stop.signum)], stop.note)
    except BrokenPipeError:
        _discard(sys.stdout)
        return BROKEN_PIPE
    except (MemoryError, UnicodeError) as error:
        # The latter comes of names that the file system's encoding does not have.
        why = "not enough memory" if isinstance(error, MemoryError) else f"a name: {error}"
        return _failed(BAD_INPUT, f"error: {why}")
    except OSError as error:
        where = "standard output" if error.filename is None else error.filename
        code = _failed(BAD_INPUT, f"error: {where!s:.200}: {reason(error)}")
        _discard(sys.stdout)
        return code


def _run(args: list[str]) -> int:
    if not args:
        names = ", ".join(COMMANDS)
        return _failed(BAD_INPUT, f"error: no command given: {names}; see acktr --help")
    for word in args:
        if len(word) > MOST_CHARACTERS or _CONTROL.search(word):
            return _failed(
                BAD_INPUT,
                f"error: {word!a:.60}: a word must have at most {MOST_CHARACTERS:,} characters"
                " and none that control a terminal; longer settings go to a --config file",
            )
    name, rest = args[0], args[1:]
    if name in HELP:
        _say(_HELP.rstrip("\n"))
    elif name == "--version":
        _say(f"acktr {__version__}")
    elif name in COMMANDS:
        return _run_known(name, rest)
    else:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"use {', '.join(COMMANDS)}"
        return _failed(BAD_INPUT, f"error: unknown command {name!r}; {hint}")
    return 0


def _run_known(name: str, args: list[str]) -> int:
    """Run one of the commands, after a look at its options that takes no time."""
    if name == "train" and HELP.intersection(args):
        _say(TRAIN_HELP.rstrip("\n"))
        return 0
    if (wrong := unknown_option(name, args) or given_twice(args)) is not None:
        return _failed(BAD_INPUT, f"error: {wrong}")
    return _run_doctor(args) if name == "doctor" else _run_command(name, args)


def _run_command(name: str, args: list[str]) -> int:
    try:
        from acktr.cli.options import KINDS  # tyro
        from acktr.cli.parsing import parse

        # Mistakes are told before what takes seconds is imported; defaults of train need that.
        options = parse(KINDS[name], args, name) if name in KINDS else None
        from acktr.cli import commands
    except SystemExit:  # after the command's help
        return 0
    except UsageError as error:
        return _failed(BAD_INPUT, f"error: {error}")
    except (ImportError, MemoryError, OSError, SystemError) as error:
        # A library that is missing, or a limit to memory, which loaders tell in many ways.
        why = str(error) or type(error).__name__
        return _failed(BAD_INPUT, f"error: a library cannot be loaded: {why}")
    try:
        with Interrupts() as interrupts:
            _say(commands.run(name, options, args, interrupts))
    except SystemExit as stop:  # the first of several processes has ended
        return int(stop.code or 0)
    except commands.EXPECTED as error:
        code, text = commands.explanation(error)
        return _failed(code, f"error: {text}")
    return 0


def _words(argv: Sequence[str] | None) -> list[str]:
    """The words of a command line; modules that this process's name are looked for here too.

    The working directory comes last, so that no file in it takes the place of an installed module.
    """
    if argv is not None:
        return list(argv)
    if any(arg.startswith("--import") or _MODULE.search(arg) for arg in sys.argv[1:]):
        sys.path.append(os.getcwd())
    return sys.argv[1:]


def _run_doctor(args: list[str]) -> int:
    """Run the command that works where others cannot even be imported."""
    from acktr.cli import doctor

    try:
        with Interrupts():
            problems = doctor.run(args, _say)
    except SystemExit:  # after its help
        return 0
    except UsageError as error:
        return _failed(BAD_INPUT, f"error: {error}")
    return _failed(1, f"problems here: {', '.join(problems)}") if problems else 0


def _leave(signum: int, frame: FrameType | None) -> None:
    """Leave at once: nothing has been written yet, and modules are half imported."""
    with suppress(OSError):  # where the terminal is gone
        os.write(2, b"acktr: stopped\n")
    os._exit(STOPPED[signal.Signals(signum)])


def _replace_closed_streams() -> None:
    """Standard streams that the caller has closed swallow what is written to them.

    Others write characters that their encoding lacks as escapes: the run is worth more.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as it runs
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard(stream: TextIO) -> None:
    """Let what a stream still holds vanish if it cannot be written at the end either."""
    try:
        stream.flush()
    except (OSError, ValueError):  # the latter of one that was closed
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _failed(code: int, text: str) -> int:
    """Write one line to standard error, whatever the text; returns the code.

    Where nobody reads it any more (a closed terminal, a full disk), the code says it alone.
    """
    with suppress(OSError, ValueError):
        sys.stderr.write(f"acktr: {message(text)}\n")
        sys.stderr.flush()
    return code
