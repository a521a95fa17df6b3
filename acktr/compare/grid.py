"""The runs of a comparison: environments x algorithms x seeds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from acktr.compare.entries import Entry, Overlay
from acktr.config import (
    Config,
    ConfigError,
    has_own,
    merge,
    modules_of,
    preset,
    refuse_import,
    to_dict,
)
from acktr.envs import EnvError
from acktr.files import flat
from acktr.policies import NetworkSource, with_network
from acktr.runs.folder import run_path

EVAL_EPISODES = 20
"""Episodes of each evaluation, unless something else is asked for."""

_OF_THE_GRID = ("env", "algo", "preset", "seed")


@dataclass(frozen=True)
class NamedNetwork:
    """A network of one's own, and what ``acktr train --network`` calls it."""

    name: str
    source: NetworkSource


@dataclass(frozen=True)
class RunPlan:
    """One run of the grid."""

    config: Config
    base: Config
    """The preset that the configuration starts from."""
    label: str
    """Name of its algorithm's folder."""
    run_dir: Path
    """Folder of all runs."""
    network: NamedNetwork | None = None
    """The network of one's own that it trains."""
    stop_at: int | None = None
    """Steps at which it stops early, on the schedule of all of them."""

    @property
    def goal(self) -> int:
        """Environment steps that it is to make."""
        return self.stop_at or self.config.total_timesteps

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


def make_plans(
    envs: Sequence[str],
    entries: Sequence[Entry],
    seeds: Sequence[int],
    run_dir: Path,
    common: Overlay | None = None,
    changes: Mapping[str, Any] | None = None,
    network: NamedNetwork | None = None,
    stop_at: int | None = None,
) -> list[RunPlan]:
    """All runs of a grid, those of the first seed first, so that a part of it is balanced.

    ``common`` is laid over every preset before the entry's own overlay, ``changes`` over
    everything; all runs train ``network`` if one of one's own is given, and stop at ``stop_at``
    steps.

    Raises:
        ConfigError: No runs, a setting that cannot be used, or two runs with the same folder.
    """
    for name, found in (("envs", envs), ("algos", entries), ("seeds", seeds)):
        if not found:
            raise ConfigError(f"{name}: at least one is needed")
    own = None if network is None else network.source
    cells = [
        (entry, *_cell(env, entry, (common, entry.overlay), changes or {}))
        for env in envs
        for entry in entries
    ]
    plans = [
        RunPlan(
            dataclasses.replace(with_network(config, own), seed=seed),
            base,
            entry.label,
            run_dir,
            network,
            stop_at,
        )
        for seed in seeds
        for entry, base, config in cells
    ]
    paths: set[Path] = set()
    for plan in plans:
        if plan.path in paths:
            raise ConfigError(f"the grid has two runs for the folder {plan.path}; name each once")
        paths.add(plan.path)
    return plans


def unequal_presets(plans: Sequence[RunPlan]) -> list[str]:
    """A line for each environment whose own values only some of the algorithms start from."""
    lines = []
    for env in dict.fromkeys(plan.config.env for plan in plans):
        own = {
            plan.label: plan.config.preset == "default" and has_own(env, plan.config.algo)
            for plan in plans
            if plan.config.env == env
        }
        with_one, without = (
            ", ".join(n for n in own if own[n] is there) for there in (True, False)
        )
        if with_one and without:
            lines.append(
                f"{env}: {with_one} with the preset of this id, {without} without one:"
                " acktr-family starts from values of the family"
            )
    return lines


def train_args(plan: RunPlan, resume: bool, module: str | None = None) -> list[str]:
    """Arguments of ``acktr`` that train a run; they depend on no other file.

    A run with a checkpoint is to ``resume``; ``module`` is what --import names.
    """
    if resume:  # the user named them, so they may be imported
        given = [module] if module else []
        module = ",".join(dict.fromkeys([*given, *modules_of(plan.config)]))
    imports = _flag("import", module) if module else []
    if plan.network is not None:
        imports += _flag("network", plan.network.name)
    stop = [] if plan.stop_at is None else _flag("stop-at", str(plan.stop_at))
    if resume:
        return ["train", *_flag("resume", str(plan.path)), *stop, *imports]
    config = plan.config
    args = ["train", *_flag("env", config.env), *_flag("algo", config.algo)]
    args += [*_flag("preset", config.preset), *_flag("label", plan.label)]
    args += [*_flag("seed", str(config.seed)), *_flag("run-dir", str(plan.run_dir))]
    args += [*stop, *imports]
    settings = to_dict(config)
    del settings["network"]["custom"]  # --network says it
    if kwargs := settings.pop("env_kwargs"):
        args += ["--env-kwargs", *(f"{key}={json.dumps(kwargs[key])}" for key in kwargs)]
    before = flat(to_dict(plan.base))
    for name, value in flat(settings).items():
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
                for wrapper in config.wrappers:
                    refuse_import(wrapper, "wrapper")
            except (ConfigError, EnvError) as error:
                raise ConfigError(f"{overlay.file}: {error}") from error
    return base, merge(config, changes)


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
