"""The commands: words in; the line that a command says at the end out."""

from __future__ import annotations

import importlib
import json
import math
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

from acktr.cli import looks
from acktr.cli.flags import UsageError
from acktr.cli.launch import RANK_LOST, ProcessesFailed, launch
from acktr.cli.options import (
    CompareOptions,
    EvalOptions,
    ExportOptions,
    PlotOptions,
    RecordOptions,
    ReportOptions,
)
from acktr.cli.parsing import peek
from acktr.cli.training import HelpAsked, parse_train, require_work
from acktr.compare.comparison import RunsFailed, compare
from acktr.compare.entries import Overlay, parse_algo, parse_seeds
from acktr.compare.grid import NamedNetwork, make_plans
from acktr.config import Config, ConfigError, read_settings
from acktr.envs import EnvError, EnvFault, EnvWarning, one_line
from acktr.evaluate import usually_deterministic
from acktr.export import OUTPUTS, ExportError, export_saved
from acktr.interrupts import Interrupts
from acktr.kfac import RankError
from acktr.policies import NetworkSource, with_network
from acktr.report.references import load_references
from acktr.report.results import find_runs
from acktr.runs.checkpoint import CheckpointError, checkpoint_exists
from acktr.runs.folder import RunError, RunFolder, run_path
from acktr.runs.meeting import Meeting
from acktr.runs.progress import Display, counting, score
from acktr.runs.saved import SavedAgent, find_agent, play
from acktr.runs.session import TrainingFault
from acktr.runs.start import resume, start
from acktr.runs.video import RecordError, record
from acktr.world import part_of_envs

_BAD_INPUT = (
    UsageError,
    ConfigError,
    EnvError,
    RunError,
    CheckpointError,
    RecordError,
    ExportError,
)

EXPECTED = (TrainingFault, EnvFault, RunsFailed, RankError, ProcessesFailed, *_BAD_INPUT)
"""The errors of a command that one line explains."""


def run(name: str, options: Any, args: Sequence[str], interrupts: Interrupts) -> str:
    """Run a command; returns what it says at the end.

    Args:
        name: The command.
        options: What its words say; None of train, which parses them itself.
        args: Its words.
        interrupts: Signals.

    Raises:
        SystemExit: The first of several processes has ended.
        Stopped: A signal came.
    """
    modules = peek(args, "import")
    for module in () if modules is None else modules.split(","):
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever the module raises
            kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
            raise UsageError(f"--import {module}: {kind}{one_line(error)}") from error
    with _plain_warnings():
        return COMMANDS[name](options, args, interrupts)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings about environments as one line, without the code that gave them."""
    before = warnings.formatwarning

    def plain(message: Any, category: type[Warning], *place: Any, **more: Any) -> str:
        if issubclass(category, EnvWarning):
            return f"warning: {message}\n"
        return before(message, category, *place, **more)

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = before


def explanation(error: Exception) -> tuple[int, str]:
    """The exit code for one of the expected errors, and what to say."""
    if isinstance(error, RunsFailed):
        return 1, str(error)
    if isinstance(error, TrainingFault):
        return 76 if error.environment else 70, str(error)
    if isinstance(error, EnvFault):
        return 76, str(error)
    if isinstance(error, RankError):
        return RANK_LOST, str(error)
    if isinstance(error, ProcessesFailed):
        return error.code, str(error)
    hint = "; is its folder in PYTHONPATH?" if "No module named" in str(error) else ""
    return 2, f"{error}{hint}"


def _train(_: None, args: Sequence[str], interrupts: Interrupts) -> str:
    network = _network(peek(args, "network"))  # first, as a run's file may name its module too
    try:
        options, source = parse_train(args)
    except HelpAsked as page:
        return str(page)
    argv = ["acktr", "train", *args]
    settings, path = options.settings, options.resume
    meeting = Meeting.given(interrupts, options.rank_timeout, options.curvature_ranks)
    if options.curvature_ranks:
        require_work(settings, options.nproc if meeting is None else meeting.size)
    if path is None and (options.nproc > 1 or meeting is not None):
        begun = run_path(options.run_dir, with_network(settings, network), options.label)
        if meeting is not None and meeting.restarts and checkpoint_exists(RunFolder(begun).last):
            path = begun
    if meeting is None and options.nproc > 1:
        part_of_envs(settings.num_envs, 0, options.nproc - options.curvature_ranks)
        launch(args, options.nproc, options.max_restarts, RunFolder(path or begun).last)
        raise SystemExit(0)  # the first process has said how it went
    if path is not None:
        total, stop_at = settings.total_timesteps, options.stop_at
        return resume(path, total, interrupts, argv, _draw_curve, network, stop_at, meeting)
    return start(
        settings,
        options.run_dir,
        source,
        interrupts,
        argv,
        _draw_curve,
        options.label,
        network,
        options.stop_at,
        meeting,
    )


def _draw_curve(folder: RunFolder, config: Config) -> str | None:
    """See :func:`acktr.report.plot.draw_curve`."""
    from acktr.report.plot import draw_curve  # matplotlib is not waited for before training

    return draw_curve(folder, config)


def _network(names: str | None) -> NetworkSource | None:
    """The network of one's own that an option names; the command line is trusted to import it.

    Raises:
        UsageError: There is none of this name.
    """
    if names is None:
        return None
    each = tuple(_named(name) for name in names.split(","))
    if len(each) > 2:
        raise UsageError(f"--network {names}: one network, or an actor and a critic")
    return each[0] if len(each) == 1 else (each[0], each[1])


def _named(name: str) -> Any:
    """What ``module:Name`` names."""
    module, colon, path = name.strip().partition(":")
    if not colon or not module or not path:
        raise UsageError(f"--network {name}: MODULE:NET is needed, such as my_package.nets:Net")
    try:
        return reduce(getattr, path.split("."), importlib.import_module(module))
    except Exception as error:  # whatever the module raises
        kind = "" if isinstance(error, ImportError | AttributeError) else type(error).__name__
        raise UsageError(
            f"--network {name}: {kind}{': ' if kind else ''}{one_line(error)}"
        ) from error


def _compare(options: CompareOptions, args: Sequence[str], interrupts: Interrupts) -> str:
    common = None
    if options.config is not None:
        common = Overlay(options.config, read_settings(options.config))
    changes: dict[str, Any] = {
        "total_timesteps": options.total_timesteps,
        "eval_episodes": options.eval_episodes,
    }
    changes |= {"env_kwargs": options.env_kwargs or None, "wrappers": options.wrappers or None}
    network = _network(options.network)
    plans = make_plans(
        options.envs,
        [parse_algo(text) for text in options.algos],
        parse_seeds(options.seeds),
        options.run_dir,
        common,
        {name: value for name, value in changes.items() if value is not None},
        None if network is None else NamedNetwork(options.network or "", network),
        options.stop_at,
    )
    command = shlex.join(["acktr", "compare", *args])
    return compare(
        plans, options.workers, interrupts, command, options.import_module, options.engine
    )


def _eval(options: EvalOptions, *_: object) -> str:
    found = _runs(options.run)
    # Runs of scripts.peers, for example, keep no agent.
    paths = [run for run in found if len(found) == 1 or (run / "checkpoints").is_dir()] or found
    network = _network(options.network)
    with closing(Display("acktr eval", interval=5.0)) as display:
        show, total = counting(display, "playing episodes"), len(paths) * options.episodes
        for path in paths[1:]:  # a damaged one is told before the others have played for hours
            find_agent(path, options.checkpoint, network)

        def further(before: int) -> Callable[[int], None]:
            return lambda ended: show(before + ended, total)

        for number, path in enumerate(paths):
            agent = find_agent(path, options.checkpoint, network)
            report, line = _evaluated(agent, options, further(number * options.episodes))
            name = "" if len(paths) == 1 else f"{path}: "
            line = json.dumps(report) if options.json else f"{name}{line}"
            display.hide()
            if number + 1 < len(paths):  # what comes later may fail, or never come
                sys.stdout.write(f"{line}\n")
                sys.stdout.flush()
    return line


def _runs(path: Path) -> list[Path]:
    """The run or checkpoint at a path, or the runs below it."""
    own = (path / "config.json").is_file() or checkpoint_exists(path) or not path.is_dir()
    return [path] if own else find_runs([path])


def _only_agent(options: RecordOptions | ExportOptions) -> SavedAgent:
    """The agent of a command that takes one.

    Raises:
        UsageError: The folder holds several runs.
    """
    first, *others = _runs(options.run)
    if others:
        raise UsageError(f"{options.run}: {len(others) + 1} runs; name one, such as {first}")
    return find_agent(first, options.checkpoint, _network(options.network))


def _evaluated(
    agent: SavedAgent, options: EvalOptions, note: Callable[[int], None]
) -> tuple[dict[str, Any], str]:
    """What evaluating an agent came to: for programs, and as a line; see :func:`play`."""
    usual = not options.stochastic and usually_deterministic(agent.config.env)
    deterministic = options.deterministic or usual
    played = play(
        agent,
        options.episodes,
        seed=options.seed,
        num_envs=options.num_envs,
        deterministic=deterministic,
        device=options.device,
        note=note,
    )
    report: dict[str, Any] = {
        "env": agent.config.env,
        "algo": agent.config.algo,
        "seed": agent.config.seed,
        "timesteps": agent.timesteps,
        "episodes": len(played.returns),
        "mean_reward": played.mean,
        "std_reward": played.std,
        "mean_length": sum(played.lengths) / len(played.lengths),
        "returns": list(played.returns),
        "lengths": list(played.lengths),
        "deterministic": deterministic,
        "eval_seed": options.seed,
        "checkpoint": str(agent.path),
    }
    record = agent.config.record
    if record:
        report["recorded"] = {
            key: {
                "mean": _number(played.mean_of(key)),
                "values": [_number(info.get(key)) for info in played.infos],
            }
            for key in record
        }
    others = "".join(f", {key} {played.mean_of(key):,.4g}" for key in record)
    line = (
        f"{agent.config.env}, {agent.config.algo}, seed {agent.config.seed}, step "
        f"{agent.timesteps:,}: return {played.mean:,.2f} +- {played.std:,.2f} "
        f"({len(played.returns)} episodes, mean length {report['mean_length']:,.1f}{others}, "
        f"{'most likely' if deterministic else 'sampled'} actions)"
    )
    return report, line


def _number(value: float | None) -> float | None:
    """A number as JSON has it, which knows no NaN."""
    return None if value is None or math.isnan(value) else value


def _record(options: RecordOptions, *_: object) -> str:
    agent = _only_agent(options)
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
    return f"{out}: returns {', '.join(map(score, returns))}"


def _export(options: ExportOptions, *_: object) -> str:
    agent = _only_agent(options)
    export_saved(agent, options.out)
    return f"{options.out}: observation in; {', '.join(OUTPUTS)} out"


def _plot(options: PlotOptions, *_: object) -> str:
    from acktr.report.plot import plot_runs

    published = ("acktr",) if options.published else ()
    try:
        drawn = plot_runs(
            options.runs, options.out, published=published, title=options.title, x=options.x
        )
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    young = f"; no episode has ended yet in {', '.join(drawn.left_out)}"
    return f"{options.out} and {drawn.numbers}{young if drawn.left_out else ''}"


def _report(options: ReportOptions, args: Sequence[str], interrupts: Interrupts) -> str:
    from acktr.report.page import ReportSettings, write_report

    argv = ["acktr", "report", *args]
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
        with closing(Display("acktr report", interval=5.0)) as display:
            show = counting(display, "reading runs")
            return write_report(options.runs, options.out, settings, argv, show)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


COMMANDS: dict[str, Callable[[Any, Sequence[str], Interrupts], str]] = {
    "train": _train,
    "compare": _compare,
    "eval": _eval,
    "record": _record,
    "export": _export,
    "plot": _plot,
    "report": _report,
    "list": looks.list_runs,
    "diff": looks.diff,
    "presets": looks.presets,
    "card": looks.write_card,
}
