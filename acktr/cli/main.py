"""The command line: ``acktr train``, ``compare``, ``eval``, ``record``, ``plot``, ``report``.

Exit codes: 0 done; 1 some runs of a comparison failed; 2 bad command, configuration, environment,
run or checkpoint; 70 training broke down numerically; 75 stopped by SIGTERM; 76 the environment
misbehaved; 130 stopped by Ctrl-C; 141 the reader of standard output went away. Except for 0 and 141
the last line on standard error says why; with 2 it is the only one.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from acktr import __version__
from acktr.cli.options import (
    CompareOptions,
    EvalOptions,
    PlotOptions,
    RecordOptions,
    ReportOptions,
    UsageError,
    parse,
    parse_train,
    peek,
)
from acktr.compare.comparison import RunsFailed, compare
from acktr.compare.grid import Overlay, make_plans, parse_algo, parse_seeds
from acktr.config import Config, ConfigError, read_settings
from acktr.envs import EnvError, EnvFault, one_line
from acktr.evaluate import usually_deterministic
from acktr.files import reason
from acktr.interrupts import STOPPED, Interrupts, Stopped
from acktr.report.page import ReportSettings, write_report
from acktr.report.plot import plot_runs
from acktr.report.references import load_references
from acktr.runs.checkpoint import CheckpointError
from acktr.runs.folder import RunError, RunFolder
from acktr.runs.saved import find_agent, play
from acktr.runs.start import TrainingFault, resume, start
from acktr.runs.video import RecordError, record

RUNS_FAILED, BAD_INPUT, NUMERIC_FAILURE, ENVIRONMENT_FAULT, BROKEN_PIPE = 1, 2, 70, 76, 141

_HELP = """\
usage: acktr COMMAND [OPTIONS]

ACKTR: actor-critic with Kronecker-factored trust regions.

commands:
  train   train an agent, or resume a run:  acktr train --env HalfCheetah-v5 --seed 0
                                            acktr train --resume RUN
  compare train a grid of environments, algorithms and seeds; skip and continue what is there:
                                            acktr compare --envs Hopper-v5 --workers 2
  eval    play episodes and report returns: acktr eval RUN --episodes 20
  record  record a video:                   acktr record RUN --out clip.mp4
  plot    draw learning curves:             acktr plot RUN... --out curves.png
  report  compare finished runs:            acktr report RUNS... --out DIR

options:
  -h, --help   this text; after a command, its options
  --version    the version

A run is a folder RUN_DIR/ENV/LABEL/seedN, for example runs/HalfCheetah-v5/acktr/seed0; the label
is the algorithm if none is given.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (``sys.argv`` if none is given) and return the exit code.

    Raises:
        SystemExit: With code 0, after the help of a command.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    _replace_closed_streams()
    try:
        with Interrupts() as interrupts:
            return _run(args, interrupts)
    except _EXPECTED as error:
        return _failed(error)
    except Stopped as stop:
        if argv is None:  # nothing is left to do but to leave with the right exit code
            for number in STOPPED:
                signal.signal(number, signal.SIG_IGN)
        _complain(stop.note)
        return STOPPED[signal.Signals(stop.signum)]
    except BrokenPipeError:
        _discard_output()
        return BROKEN_PIPE
    except OSError as error:
        where = "standard output" if error.filename is None else error.filename
        _complain(f"error: {where!s:.200}: {reason(error)}")
        _discard_output()
        return BAD_INPUT


_BAD = (UsageError, ConfigError, EnvError, RunError, CheckpointError, RecordError)
_EXPECTED = (TrainingFault, EnvFault, RunsFailed, *_BAD)


def _failed(error: Exception) -> int:
    """Say what is wrong in one line; returns the exit code."""
    hint = ""
    if isinstance(error, _BAD) and "No module named" in str(error):
        hint = "; is its folder in PYTHONPATH?"
    _complain(f"error: {error}{hint}")
    if isinstance(error, RunsFailed):
        return RUNS_FAILED
    if isinstance(error, TrainingFault):
        return ENVIRONMENT_FAULT if error.environment else NUMERIC_FAILURE
    return ENVIRONMENT_FAULT if isinstance(error, EnvFault) else BAD_INPUT


def _replace_closed_streams() -> None:
    """Standard streams that the caller has closed swallow what is written to them."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as it runs


def _discard_output() -> None:
    """Let what standard output still holds vanish if it cannot be written at the end either."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(args: list[str], interrupts: Interrupts) -> int:
    if not args:
        raise UsageError(f"no command given: {', '.join(_COMMANDS)}; see acktr --help")
    name, rest = args[0], args[1:]
    if name in ("-h", "--help"):
        _say(_HELP.rstrip("\n"))
    elif name == "--version":
        _say(f"acktr {__version__}")
    elif name in _COMMANDS:
        _import(peek(rest, "import"))
        _COMMANDS[name](rest, interrupts)
    else:
        near = difflib.get_close_matches(name, _COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"use {', '.join(_COMMANDS)}"
        raise UsageError(f"unknown command {name!r}; {hint}")
    return 0


def _import(module: str | None) -> None:
    """Import what --import names."""
    if module is not None:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever the module raises
            kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
            raise UsageError(f"--import {module}: {kind}{one_line(error)}") from error


def _train(args: list[str], interrupts: Interrupts) -> None:
    options, source = parse_train(args)
    argv = ["acktr", "train", *args]
    if options.resume is not None:
        total = options.settings.total_timesteps
        _say(resume(options.resume, total, interrupts, argv, _draw_curve))
    else:
        settings, run_dir = options.settings, options.run_dir
        _say(start(settings, run_dir, source, interrupts, argv, _draw_curve, options.label))


def _draw_curve(folder: RunFolder, config: Config) -> str | None:
    """Draw the learning curve of a run beside the published ones; returns why there is none."""
    try:
        plot_runs([folder.path], folder.curve, published=(config.algo,))
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _compare(args: list[str], interrupts: Interrupts) -> None:
    options = parse(CompareOptions, args, "compare")
    common = None
    if options.config is not None:
        common = Overlay(options.config, read_settings(options.config))
    limits = {"total_timesteps": options.total_timesteps, "eval_episodes": options.eval_episodes}
    plans = make_plans(
        options.envs,
        [parse_algo(text) for text in options.algos],
        parse_seeds(options.seeds),
        options.run_dir,
        common,
        {name: value for name, value in limits.items() if value is not None},
    )
    command = shlex.join(["acktr", "compare", *args])
    _say(compare(plans, options.workers, interrupts, command, options.import_module))


def _eval(args: list[str], interrupts: Interrupts) -> None:
    options = parse(EvalOptions, args, "eval")
    agent = find_agent(options.run, options.checkpoint)
    deterministic = options.deterministic
    if not options.stochastic and not options.deterministic:
        deterministic = usually_deterministic(agent.config.env)
    found = play(
        agent,
        options.episodes,
        seed=options.seed,
        num_envs=options.num_envs,
        deterministic=deterministic,
        device=options.device,
    )
    report: dict[str, Any] = {
        "env": agent.config.env,
        "algo": agent.config.algo,
        "seed": agent.config.seed,
        "timesteps": agent.timesteps,
        "episodes": len(found.returns),
        "mean_reward": found.mean,
        "std_reward": found.std,
        "mean_length": sum(found.lengths) / len(found.lengths),
        "returns": list(found.returns),
        "lengths": list(found.lengths),
        "deterministic": deterministic,
        "eval_seed": options.seed,
        "checkpoint": str(agent.path),
    }
    if options.json:
        _say(json.dumps(report))
        return
    _say(
        f"{agent.config.env}, {agent.config.algo}, seed {agent.config.seed}, step "
        f"{agent.timesteps:,}: return {found.mean:,.2f} +- {found.std:,.2f} "
        f"({len(found.returns)} episodes, mean length {report['mean_length']:,.1f}, "
        f"{'most likely' if deterministic else 'sampled'} actions)"
    )


def _record(args: list[str], interrupts: Interrupts) -> None:
    options = parse(RecordOptions, args, "record")
    agent = find_agent(options.run, options.checkpoint)
    beside = options.run if (options.run / "config.json").is_file() else Path()
    out = beside / "clip.mp4" if options.out is None else options.out
    returns = record(
        agent,
        out,
        episodes=options.episodes,
        max_steps=options.max_steps,
        seed=options.seed,
        device=options.device,
    )
    _say(f"{out}: returns {', '.join(f'{value:,.1f}' for value in returns)}")


def _plot(args: list[str], interrupts: Interrupts) -> None:
    options = parse(PlotOptions, args, "plot")
    published = ("acktr",) if options.published else ()
    try:
        numbers = plot_runs(options.runs, options.out, published=published, title=options.title)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    _say(f"{options.out} and {numbers}")


def _report(args: list[str], interrupts: Interrupts) -> None:
    options = parse(ReportOptions, args, "report")
    assert options.out is not None
    try:
        references = load_references()
        if options.references is not None:
            references |= load_references(options.references)
        settings = ReportSettings(
            references=references,
            metric=options.metric,
            labels=options.labels,
            baseline=options.baseline,
            resamples=options.resamples,
            published=options.published,
        )
        argv = ["acktr", "report", *args]
        made = write_report(options.runs, options.out, settings, argv, _Countdown("reading runs"))
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    _say(made)


class _Countdown:
    """Says on standard error, every few seconds, how much is done and how long the rest takes."""

    def __init__(self, what: str, interval: float = 5.0) -> None:
        self._what, self._interval = what, interval
        self._start = self._said = time.monotonic()

    def __call__(self, count: int, total: int) -> None:
        now = time.monotonic()
        if count and now - self._said >= self._interval:
            self._said = now
            left = (now - self._start) / count * (total - count)
            _complain(f"{self._what}: {count} of {total}, about {left:.0f} s left")


_COMMANDS: dict[str, Callable[[list[str], Interrupts], None]] = {
    "train": _train,
    "compare": _compare,
    "eval": _eval,
    "record": _record,
    "plot": _plot,
    "report": _report,
}


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _complain(text: str) -> None:
    """One line on standard error, whatever the text."""
    line = "".join(c if c.isprintable() else " " for c in text)
    sys.stderr.write(f"acktr: {line}\n")
    sys.stderr.flush()
