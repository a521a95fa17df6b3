"""The options of ``acktr train``: every setting of a run is one, with the preset's value."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from acktr.cli.flags import HELP_ALL, UsageError, with_named_env
from acktr.cli.options import File, Module, Network, require
from acktr.cli.parsing import parse, peek
from acktr.config import (
    ALGOS,
    Config,
    ConfigError,
    merge,
    preset,
    read_settings,
    refuse_import,
)
from acktr.envs import EnvError, is_atari
from acktr.runs.folder import stored_config
from acktr.runs.meeting import RANK_TIMEOUT

_HELP_ENV = "HalfCheetah-v5"
_PROCESSES = ("--nproc", "--curvature-ranks", "--rank-timeout", "--max-restarts")
_WITH_RESUME = (
    *("--resume", "--total-timesteps", "--stop-at", "--import", "--network"),
    *_PROCESSES,
)
"""The options that may be given besides --resume, itself included."""
_MOST_PROCESSES, _MOST_RESTARTS, _LONGEST = 1024, 1000, 86_400
_BOX = re.compile(r"^(?:╭─)? (?:(\S+) )?options (?:─|  )")
"""First line of a group on tyro's page, with and without Unicode."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train an agent. Every setting below may be given; the rest comes from --config or --preset.

    Defaults shown are those of HalfCheetah-v5, or of the environment given besides --help-all.
    """

    settings: Annotated[Config, tyro.conf.arg(name="")]
    config: File = None
    """JSON file with settings (all or part of a config.json), between preset and flags."""
    run_dir: Path = Path("runs")
    """Folder of all runs; this one goes to RUN_DIR/ENV/LABEL/seedN."""
    label: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Name of the run's folder in place of the algorithm's, to keep variants apart."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Run folder to go on with; of the settings only --total-timesteps may be given besides."""
    stop_at: Annotated[int | None, tyro.conf.arg(metavar="STEPS")] = None
    """Steps at which to stop early, on the schedule of the whole run; --resume goes on."""
    nproc: int = 1
    """Processes of this machine that train together, each with a part of the environments."""
    curvature_ranks: int = 0
    """0 or 1 of these processes, which decomposes for the others in place of training."""
    rank_timeout: float = RANK_TIMEOUT
    """Seconds that one of several processes waits for the others."""
    max_restarts: int = 0
    """How often several processes go on from the last checkpoint after one of them failed."""
    network: Network = None
    import_module: Module = None

    def __post_init__(self) -> None:
        require(1, _MOST_PROCESSES, nproc=self.nproc)
        require(0, 1, curvature_ranks=self.curvature_ranks)
        require(0, _MOST_RESTARTS, max_restarts=self.max_restarts)
        if not 1 <= self.rank_timeout <= _LONGEST:
            raise UsageError(
                f"--rank-timeout must be in [1, {_LONGEST:,}] seconds, got {self.rank_timeout:g}"
            )


def parse_train(args: Sequence[str]) -> tuple[TrainOptions, str]:
    """Options of ``train`` and the line that says where the configuration comes from.

    Settings come from the preset, then the --config file, then the flags.

    Raises:
        UsageError, ConfigError, EnvError, RunError: One line.
    """
    args = with_named_env(args)
    run = peek(args, "resume")
    if run is not None:
        default, source = stored_config(Path(run)), ""
    else:
        default, source = _defaults(args)
    if HELP_ALL in args:
        raise HelpAsked(_help(default, args[args.index(HELP_ALL) + 1 :]))
    options = parse(TrainOptions, args, "train", TrainOptions(settings=default))
    if options.resume is None:
        return options, source + _idle(args, options.settings)
    for name in (arg.partition("=")[0] for arg in args if arg.startswith("--")):
        if name.replace("_", "-") not in _WITH_RESUME:
            raise UsageError(
                f"{name} cannot be given with --resume, only --total-timesteps and --stop-at can"
            )
    return options, source


def _idle(args: Sequence[str], settings: Config) -> str:
    """Options of other algorithms and kinds of environments, which change nothing; in words."""
    uses = {
        **{f"--{algo}.": settings.algo == algo for algo in ALGOS},
        "--atari.": is_atari(settings.env),
        "--pixels.": "Pixels/" in settings.env,
    }
    names = dict.fromkeys(arg.partition("=")[0] for arg in args)
    idle = [n for n in names if any(n.startswith(p) and not used for p, used in uses.items())]
    of = f"{settings.algo} in {settings.env}"
    return f"; warning: {', '.join(idle)} changes nothing of {of}" if idle else ""


def require_work(config: Config, processes: int) -> None:
    """Refuse a process that decomposes where nobody trains beside it, or has nothing for it.

    Raises:
        UsageError: One line.
    """
    if processes < 2:
        raise UsageError("--curvature-ranks 1 needs --nproc 2 or more: the others train")
    if config.algo != "acktr":
        raise UsageError(
            f"--curvature-ranks 1 is for acktr: {config.algo} has no factors to decompose"
        )


def _defaults(args: Sequence[str]) -> tuple[Config, str]:
    """Preset, overlaid by the --config file."""
    file = peek(args, "config")
    values: Mapping[str, Any] = {} if file is None else read_settings(Path(file))
    env, algo = (peek(args, name) or _name(values, name) for name in ("env", "algo"))
    if env is None and HELP_ALL in args:
        env = _HELP_ENV
    if env is None:
        raise UsageError(f"which environment? For example: acktr train --env {_HELP_ENV}")
    if "env" in values and peek(args, "env") is None:
        refuse_import(env)
    name = peek(args, "preset") or _name(values, "preset") or "default"
    config, source = preset(env, algo or "acktr", name)
    if file is None:
        return config, source
    try:
        merged = merge(config, {**values, "env": env})
        for wrapper in merged.wrappers:
            refuse_import(wrapper, "wrapper")
        return merged, f"{source}; overlaid by {file}"
    except (ConfigError, EnvError) as error:
        raise ConfigError(f"{file}: {error}") from error


def _name(values: Mapping[str, Any], key: str) -> str | None:
    value = values.get(key)
    return value if isinstance(value, str) else None


class HelpAsked(Exception):  # noqa: N818 - no error
    """The page of all options was asked for; it is the message."""


def _help(config: Config, groups: Sequence[str]) -> str:
    """The page of all options with the defaults of a configuration.

    Args:
        config: It; the groups of other algorithms, and Atari's and pixels' elsewhere, are left out.
        groups: Those to show alone, such as acktr.actor; all if none is named.

    Raises:
        UsageError: There is no such group.
    """
    page = io.TextIOWrapper(io.BytesIO(), getattr(sys.stdout, "encoding", None) or "utf-8")
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        parse(TrainOptions, ["--help"], "train", TrainOptions(settings=config))
    head: list[str] = []
    boxes: dict[str, list[str]] = {}
    into = head
    page.seek(0)
    for line in page.read().rstrip().splitlines():
        if begins := _BOX.match(line):
            into = boxes.setdefault(begins[1] or "general", [])
        into.append(line)
    wanted = [name for name in groups if not name.startswith("-")]
    if unknown := [name for name in wanted if name not in boxes]:
        raise UsageError(f"no group {unknown[0]!r} of options; there are {', '.join(boxes)}")
    others = {"acktr", "a2c", "trpo", "atari", "pixels"} - {config.algo}
    others -= {"atari"} if _plays_atari(config.env) else set()
    others -= {"pixels"} if "Pixels/" in config.env else set()
    left_out = [] if wanted else [name for name in boxes if name.split(".")[0] in others]
    shown = [name for name in wanted or boxes if name not in left_out]
    lines = [*([] if wanted else head), *(line for name in shown for line in boxes[name])]
    if left_out:
        lines.append(
            f"left out: {', '.join(left_out)}; {HELP_ALL} GROUP shows one, and --algo and --env"
            " choose"
        )
    return "\n".join(lines)


def _plays_atari(env: str) -> bool:
    try:
        return is_atari(env)
    except EnvError:
        return False
