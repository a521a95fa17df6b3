"""The runs of a comparison, environments x algorithms x seeds, and how far each of them is."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from acktr.config import Config, ConfigError, merge, read_settings, to_dict
from acktr.envs import EnvError
from acktr.files import flat, reason
from acktr.presets import ALGOS, PRESETS, PUBLISHED, preset
from acktr.runs.checkpoint import CheckpointError, checkpoint_exists
from acktr.runs.folder import RunError, RunFolder, locked, run_path, stored_config
from acktr.runs.saved import read_agent
from acktr.runs.start import check, difference

EVAL_EPISODES = 20
"""Episodes of each evaluation, unless something else is asked for."""

_MOST_SEEDS = 10_000
_OF_THE_GRID = ("env", "algo", "preset", "seed")


@dataclass(frozen=True)
class Overlay:
    """A file of settings that are laid over a preset."""

    file: Path
    """Where they come from."""
    settings: Mapping[str, Any]
    """Part of a config.json; what the grid decides in it does not count."""


@dataclass(frozen=True)
class Entry:
    """One algorithm of the grid: a preset and what is laid over it."""

    label: str
    """Name of its folders."""
    algo: str
    """Algorithm."""
    preset: str = "default"
    """Preset of the algorithm."""
    overlay: Overlay | None = None
    """Settings that differ from the preset's."""


@dataclass(frozen=True)
class RunPlan:
    """One run of the grid."""

    config: Config
    """Everything that defines it."""
    base: Config
    """The preset that the configuration starts from."""
    label: str
    """Name of its algorithm's folder."""
    run_dir: Path
    """Folder of all runs."""

    @cached_property
    def path(self) -> Path:
        """The run's folder."""
        return run_path(self.run_dir, self.config, self.label)

    @property
    def log(self) -> Path:
        """File with the output of its processes; the folder is not made before training starts."""
        path = self.path.relative_to(self.run_dir)
        return self.run_dir / "logs" / path.parent.parent / f"{self.label}-{path.name}.log"

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.config.env} {self.label} seed {self.config.seed}"


class State(Enum):
    """What there is of a run."""

    NEW = "new"
    UNFINISHED = "unfinished"
    FINISHED = "finished"
    STUCK = "stuck"


@dataclass(frozen=True)
class Status:
    """How far a run is."""

    state: State
    timesteps: int = 0
    """Environment steps done, as its checkpoint says."""
    reason: str = ""
    """Why it is stuck and what to do, one line."""


def parse_seeds(texts: Sequence[str]) -> tuple[int, ...]:
    """Seeds of integers and ranges: ``["0-2", "7"]`` gives ``(0, 1, 2, 7)``.

    Raises:
        ConfigError: Something else, or more than 10,000 of them.
    """
    seeds: list[int] = []
    for text in texts:
        found = re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", text)
        if found is None:
            raise ConfigError(f"seeds: an integer or a range such as 0-4 is needed, not {text!r}")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise ConfigError(f"seeds: {text} ends before it begins")
        if len(seeds) + last - first >= _MOST_SEEDS:
            raise ConfigError(f"seeds: more than {_MOST_SEEDS:,} of them in {text}")
        seeds += range(first, last + 1)
    return tuple(seeds)


def parse_algo(text: str) -> Entry:
    """An algorithm of the grid: ALGO, ALGO-PRESET or LABEL=FILE.json.

    The file may name ``algo`` and ``preset``; otherwise they are those that the label starts
    with, or else ACKTR's default.

    Raises:
        ConfigError: Unknown algorithm or preset, or the file cannot be used.
    """
    label, equals, file = text.partition("=")
    algo, name = _known_prefix(label)
    if not equals:
        if algo is None:
            near = difflib.get_close_matches(label, ALGOS, 1)
            hint = f"did you mean {near[0]}?" if near else "or LABEL=FILE.json"
            raise ConfigError(f"algos: {text!r} must be one of {_names()}; {hint}")
        if name not in PRESETS:
            raise ConfigError(
                f"algos: in {text!r} the preset must be one of {', '.join(PRESETS)}, got {name!r}"
            )
        return Entry(text, algo, name)
    if not file:
        raise ConfigError(f"algos: {text!r} must name a file: LABEL=FILE.json")
    values = read_settings(Path(file))
    chosen = _choice(file, values, "algo", ALGOS, algo or ALGOS[0])
    start = _choice(file, values, "preset", PRESETS, name if name in PRESETS else PRESETS[0])
    return Entry(label, chosen, start, Overlay(Path(file), values))


def make_plans(
    envs: Sequence[str],
    entries: Sequence[Entry],
    seeds: Sequence[int],
    run_dir: Path,
    common: Overlay | None = None,
    changes: Mapping[str, Any] | None = None,
) -> list[RunPlan]:
    """All runs of a grid, those of the first seed first, so that a part of it is balanced.

    Args:
        envs: Environment ids.
        entries: Algorithms.
        seeds: Seeds.
        run_dir: Folder of all runs.
        common: Laid over every preset before the entry's own overlay.
        changes: Settings laid over everything.

    Raises:
        ConfigError: No runs, a setting that cannot be used, or two runs with the same folder.
    """
    for name, found in (("envs", envs), ("algos", entries), ("seeds", seeds)):
        if not found:
            raise ConfigError(f"{name}: at least one is needed")
    cells = [
        (entry, *_cell(env, entry, (common, entry.overlay), changes or {}))
        for env in envs
        for entry in entries
    ]
    plans = [
        RunPlan(dataclasses.replace(config, seed=seed), base, entry.label, run_dir)
        for seed in seeds
        for entry, base, config in cells
    ]
    paths: set[Path] = set()
    for plan in plans:
        if plan.path in paths:
            raise ConfigError(f"the grid has two runs for the folder {plan.path}; name each once")
        paths.add(plan.path)
    return plans


def survey(plans: Sequence[RunPlan]) -> list[Status]:
    """How far each run is, after checking that every run that is left can be made.

    Raises:
        ConfigError, EnvError: A run cannot be made.
        RunError: A folder holds another run than the grid's, or is in training.
    """
    statuses = [status(plan) for plan in plans]
    checked: set[Config] = set()
    for plan, found in zip(plans, statuses, strict=True):
        cell = dataclasses.replace(plan.config, seed=0)
        if found.state in (State.NEW, State.UNFINISHED) and cell not in checked:
            try:
                check(plan.config)
            except ConfigError as error:
                raise ConfigError(f"{plan.config.env} {plan.label}: {error}") from error
            checked.add(cell)
    return statuses


def status(plan: RunPlan) -> Status:
    """What there is of a run.

    It is finished when eval.csv has an evaluation at its last step or later and its checkpoint,
    if there is one, is there too.

    Raises:
        RunError: The folder cannot be read, holds another run, or is in training.
    """
    path, total = plan.path, plan.config.total_timesteps
    try:
        if not path.exists() or not any(path.iterdir()):
            return Status(State.NEW)
    except OSError as error:
        raise RunError(f"{path}: cannot read: {reason(error)}") from error
    folder = RunFolder(path)
    with locked(folder):
        if not folder.config.is_file():
            return _stuck(path, "holds no run")
        _same(plan, stored_config(path))
        done = folder.last_evaluation() >= total
        if not checkpoint_exists(folder.last):
            return Status(State.FINISHED, total) if done else _stuck(path, "has no checkpoint")
        try:
            steps = read_agent(folder.last).timesteps
        except CheckpointError:
            return Status(State.UNFINISHED)  # its process will say what is wrong
        return Status(State.FINISHED if done and steps >= total else State.UNFINISHED, steps)


def train_args(plan: RunPlan, resume: bool, module: str | None = None) -> list[str]:
    """Arguments of ``acktr`` that train a run; they depend on no other file.

    Args:
        plan: The run.
        resume: Whether its folder has a checkpoint.
        module: What --import names.
    """
    imports = [] if module is None else _flag("import", module)
    if resume:
        found = plan.config.env.rpartition(":")[0]  # the user named it, so it may be imported
        imports = imports or (_flag("import", found) if found else [])
        return ["train", *_flag("resume", str(plan.path)), *imports]
    config = plan.config
    args = ["train", *_flag("env", config.env), *_flag("algo", config.algo)]
    args += [*_flag("preset", config.preset), *_flag("label", plan.label)]
    args += [*_flag("seed", str(config.seed)), *_flag("run-dir", str(plan.run_dir)), *imports]
    before = flat(to_dict(plan.base))
    for name, value in flat(to_dict(config)).items():
        if name not in _OF_THE_GRID and value != before[name]:
            args += _setting(name.replace("_", "-"), value)
    return args


def _cell(
    env: str, entry: Entry, overlays: Sequence[Overlay | None], changes: Mapping[str, Any]
) -> tuple[Config, Config]:
    """The preset, and the configuration made of it, for one environment and algorithm."""
    base, _ = preset(env, entry.algo, entry.preset)
    decided = {name: getattr(base, name) for name in _OF_THE_GRID}
    config = dataclasses.replace(base, eval_episodes=EVAL_EPISODES)
    for overlay in overlays:
        if overlay is not None:
            try:
                config = merge(config, {**overlay.settings, **decided})
            except (ConfigError, EnvError) as error:
                raise ConfigError(f"{overlay.file}: {error}") from error
    return base, merge(config, changes)


def _known_prefix(label: str) -> tuple[str | None, str]:
    """The longest algorithm that a label starts with, and the preset that would follow it."""
    for algo in sorted(ALGOS, key=len, reverse=True):
        if label == algo:
            return algo, PRESETS[0]
        if label.startswith(f"{algo}-"):
            return algo, label[len(algo) + 1 :]
    return None, PRESETS[0]


def _names() -> str:
    return ", ".join((*ALGOS, *(f"{algo}-paper" for algo in PUBLISHED)))


def _choice(
    file: str, values: Mapping[str, Any], key: str, choices: Sequence[str], default: str
) -> str:
    value = values.get(key, default)
    if value not in choices:
        raise ConfigError(f"{file}: {key} must be one of {', '.join(choices)}, got {value!r}")
    return str(value)


def _same(plan: RunPlan, stored: Config) -> None:
    found = difference(stored, plan.config)
    if found is not None:
        name, theirs, ours = found
        raise RunError(
            f"{plan.path}: its {name} is {theirs!r} but the grid's is {ours!r}; "
            "choose another --run-dir, or LABEL=FILE.json for a variant"
        )


def _stuck(path: Path, why: str) -> Status:
    return Status(State.STUCK, reason=f"{path} {why}; delete it and start again")


def _flag(name: str, value: str) -> list[str]:
    return [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]


def _setting(name: str, value: object) -> list[str]:
    """A setting as options of ``acktr train``."""
    if isinstance(value, bool):
        parent, _, last = name.rpartition(".")
        prefix = f"{parent}." if parent else ""
        return [f"--{name}"] if value else [f"--{prefix}no-{last}"]
    if isinstance(value, tuple):
        return [f"--{name}", *(str(item) for item in value)]
    return _flag(name, str(value))
