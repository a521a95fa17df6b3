"""The options of the commands as frozen dataclasses, which tyro parses.

Those of ``train``, whose defaults take seconds to find, are in :mod:`acktr.cli.training`; nothing
here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from acktr.cli.flags import UsageError
from acktr.cli.parsing import JsonObject

_MOST = 2**63 - 1

Module = Annotated[
    str | None,
    tyro.conf.arg(
        name="import",
        metavar="MODULE",
        help="Python module that registers the environment, or several, with commas between them;"
        " needed where a file names MODULE:Id or the MODULE:Name of a wrapper.",
    ),
]
Network = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="MODULE:NET",
        help="Network of one's own, by what it returns, or MODULE:ACTOR,MODULE:CRITIC.",
    ),
]
Run = Annotated[
    Path,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="RUN", help="Run folder, a folder with it below, or a checkpoint (folder or .zip)."
    ),
]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True, kw_only=True)
class _AgentOptions:
    run: Run
    checkpoint: Literal["last", "best"] = "last"
    """Checkpoint of the run to take."""
    seed: int = 1_000_000
    """Seed of the environment and of sampled actions."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    network: Network = None
    import_module: Module = None

    def __post_init__(self) -> None:
        require(0, _MOST, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class EvalOptions(_AgentOptions):
    """Play whole episodes with a trained agent, or every one below a folder; report the returns."""

    episodes: int = 20
    """Episodes to play."""
    num_envs: int = 8
    """Parallel environments."""
    deterministic: Flag = False
    """Take the most likely actions; the default except in Atari games."""
    stochastic: Flag = False
    """Sample the actions; the default in Atari games."""
    json: Flag = False
    """Write one JSON object, one on a line for each run, and nothing else to standard output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1, _MOST, episodes=self.episodes, num_envs=self.num_envs)
        if self.deterministic and self.stochastic:
            raise UsageError("--deterministic and --stochastic exclude each other")


@dataclass(frozen=True, kw_only=True)
class RecordOptions(_AgentOptions):
    """Record a video of a trained agent; works without a display."""

    out: File = None
    """Video to write, .mp4 or .gif; clip.mp4 in the folder if not given."""
    episodes: int = 1
    """Episodes to record."""
    max_steps: int = 27_000
    """Most steps of each episode."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1, _MOST, episodes=self.episodes, max_steps=self.max_steps)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a trained policy for other programs, with the normalisation of observations inside.

    It takes observations (N, ...) and gives the most likely action, the parameters of the
    distribution and the value.
    """

    run: Run
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """File to write: .onnx, or .pt2 for torch.export.load."""
    checkpoint: Literal["last", "best"] = "last"
    """Checkpoint of the run to take."""
    network: Network = None
    import_module: Module = None


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Draw the learning curves of runs, beside published ones of the same environments."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Run folders, folders with runs below them, or archives; runs of one label are averaged."""
    out: Path = Path("curves.png")
    """Picture to write, .png or .svg; the numbers go to a .csv of the same name."""
    x: Literal["steps", "time"] = "steps"
    """What returns are drawn over: environment steps, or minutes of training."""
    title: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """Title of the figure."""
    published: bool = True
    """Whether to add published curves."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Train a grid of environments, algorithms and seeds, several runs at a time.

    Started again it skips finished runs and continues the others. Settings come from each preset,
    then --config, then the file of LABEL=FILE, then the options here.
    """

    envs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="ID...")]
    """Environments."""
    algos: Annotated[tuple[str, ...], tyro.conf.arg(metavar="ALGO...")] = ("acktr", "a2c", "trpo")
    """ALGO, ALGO-PRESET (as acktr-paper), or LABEL=FILE.json with settings laid over a preset."""
    seeds: Annotated[tuple[str, ...], tyro.conf.arg(metavar="N...")] = ("0-4",)
    """Seeds, or ranges of them such as 0-4."""
    workers: int = 1
    """Runs at a time; each is a process of one thread."""
    engine: Literal["local", "ray", "slurm"] = "local"
    """Where they run: on this machine, or on those of a Ray or Slurm cluster."""
    run_dir: Path = Path("runs")
    """Folder of all runs; each goes to RUN_DIR/ENV/LABEL/seedN, its output to RUN_DIR/logs."""
    total_timesteps: int | None = None
    """Environment steps of every run, in place of the preset's."""
    stop_at: Annotated[int | None, tyro.conf.arg(metavar="STEPS")] = None
    """Stop every run at so many steps, on the schedule of all; without it the rest is trained."""
    eval_episodes: int | None = None
    """Episodes of each evaluation; 20 if no file says otherwise."""
    env_kwargs: JsonObject = field(default_factory=dict)
    """Arguments of the environments, as gymnasium.make takes them."""
    wrappers: tuple[str, ...] = ()
    """Wrappers around each environment as module:Name, the innermost first."""
    config: File = None
    """JSON file with settings of all runs; its env, seed, algo and preset do not count."""
    network: Network = None
    import_module: Module = None

    def __post_init__(self) -> None:
        require(1, _MOST, workers=self.workers)
        for name in ("total_timesteps", "eval_episodes"):
            if getattr(self, name) is not None:
                require(1, _MOST, **{name: getattr(self, name)})


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Compare finished runs: tables with intervals, learning curves, scores over environments."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Run folders, folders with runs below them (ENV/LABEL/seedN), or archives (runs.zip)."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder for report.md, the CSV files and the figures."""
    metric: Literal["last100", "eval"] = "last100"
    """Return of the scores: last 100 training episodes or final evaluation."""
    labels: Annotated[tuple[str, ...], tyro.conf.arg(metavar="LABEL...")] = ()
    """Labels to compare, in this order; all if none is given."""
    baseline: Annotated[str | None, tyro.conf.arg(metavar="LABEL")] = None
    """Label that the others are compared with; acktr, or the first, if not given."""
    resamples: int = 2000
    """Bootstrap resamples of the intervals."""
    references: File = None
    """CSV file with columns env,low,high,threshold, before the shipped ones of MuJoCo."""
    published: bool = True
    """Whether to draw published curves."""

    def __post_init__(self) -> None:
        require(100, 100_000, resamples=self.resamples)
        if not self.runs:
            raise UsageError("no runs to report; for example: acktr report runs --out DIR")
        if len(set(self.labels)) != len(self.labels):
            raise UsageError("--labels: each label once")


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """List runs: steps, returns, time, and the settings that are not their preset's."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")] = (
        Path("runs"),
    )
    """Run folders, folders with runs below them, or archives."""
    sort: Literal["name", "last100", "evaluation", "best", "minutes"] = "name"
    """Order; of numbers the largest come first."""
    json: Flag = False
    """Write a JSON list and nothing else to standard output."""


@dataclass(frozen=True, kw_only=True)
class DiffOptions:
    """Say in which settings and versions two runs, or files of settings, differ."""

    one: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """Run folder or config.json."""
    other: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """Run folder or config.json."""


@dataclass(frozen=True, kw_only=True)
class PresetsOptions:
    """List the presets, or write the settings of one as a --config file has them."""

    env: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[ENV]")] = None
    """Environment whose settings to write."""
    algo: Literal["acktr", "a2c", "trpo"] = "acktr"
    """Algorithm of these."""
    preset: str = "default"
    """Preset of these."""
    import_module: Annotated[
        str | None,
        tyro.conf.arg(name="import", metavar="MODULE", help="Module that registers ENV."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """Write a page about a run, README.md, as model hubs show it."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    out: File = None
    """File to write; README.md in the folder if not given."""


KINDS: Mapping[str, type[Any]] = {
    "compare": CompareOptions,
    "eval": EvalOptions,
    "record": RecordOptions,
    "export": ExportOptions,
    "plot": PlotOptions,
    "report": ReportOptions,
    "list": ListOptions,
    "diff": DiffOptions,
    "presets": PresetsOptions,
    "card": CardOptions,
}
"""The options of each command but train and doctor."""


def require(least: int, most: int, **values: int) -> None:
    """Raise UsageError unless numbers lie between two, by the name of their option."""
    for name, value in values.items():
        if not least <= value <= most:
            flag = name.replace("_", "-")
            low = value < least and most == _MOST
            limits = f"at least {least}" if low else f"in [{least}, {most}]"
            raise UsageError(f"--{flag} must be {limits}, got {value!s:.30}")
