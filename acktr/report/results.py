"""What finished and unfinished runs have come to, read from their folders."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from acktr.files import is_label, read_object, reason, safe_name
from acktr.report.curves import Curve, curve, grid, load_monitor, on_grid, read_columns
from acktr.runs.folder import FORMER_TOTAL, RunError, RunFolder
from acktr.runs.tables import WINDOW, last_row

_SEED = re.compile(r"seed\d{1,20}")
_MOST_STEPS = 10**15
PIXELS = re.compile(r"^([^:]*:)?Pixels/")
"""Ids of environments that are seen by their pictures, whose steps are those of the agent."""


@dataclass(frozen=True)
class Final:
    """The evaluation at the end of a run."""

    steps: int
    """Environment steps of training."""
    mean: float
    std: float
    """Standard deviation over episodes."""
    episodes: int


@dataclass(frozen=True)
class Result:
    """One run."""

    folder: Path
    env: str
    label: str
    """What the run stands for: its algorithm or a variant of it."""
    algo: str
    seed: int
    total_steps: int
    """Environment steps it was to make."""
    steps: int
    """Environment steps it made, as far as its files say: those of the last update or episode."""
    final: Final | None
    """Evaluation at the end; None in an unfinished run."""
    last100: float | None
    """Mean return of the last 100 training episodes; None before the first."""
    minutes: float | None
    """Wall-clock minutes of training until the last episode's end."""
    curve: Curve | None
    """Learning curve on the grid of ``total_steps``; None before the first episode, or where it
    was not asked for."""
    versions: Mapping[str, str]
    """What it was made with; git_commit is the commit."""
    evaluations: Sequence[tuple[int, float]]
    """Steps and mean return of each evaluation."""
    config: Mapping[str, Any]
    """What its config.json holds, unchecked."""
    planned: int
    """Environment steps it was to make when it began; ``total_steps`` unless it was resumed with
    others, as far as its files say."""

    @property
    def finished(self) -> bool:
        """Whether it made all its steps, was evaluated, and ended an episode."""
        return self.final is not None and self.last100 is not None

    @property
    def replanned(self) -> str | None:
        """From which length it was lengthened or shortened, in words; None if it was not."""
        if self.planned == self.total_steps:
            return None
        what = "lengthened" if self.planned < self.total_steps else "shortened"
        return f"{what} from {self.planned:,} steps"

    @property
    def frame_skip(self) -> int:
        """Steps of the environment behind the pictures per step of a `Pixels/` run; else 1."""
        pixels = self.config.get("pixels") if PIXELS.search(self.env) else None
        skip = pixels.get("frame_skip") if isinstance(pixels, Mapping) else None
        return skip if isinstance(skip, int) and skip > 0 else 1

    @property
    def name(self) -> str:
        """ENV/LABEL/seedN."""
        return f"{self.env}/{self.label}/seed{self.seed}"


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Run folders among the paths and anywhere below them, each once, sorted by path.

    A run folder holds config.json and monitor.csv, or config.json only if it is called seedN (a
    run that has just begun). Symbolic links are not followed, and folders below the paths whose
    names start with a dot left out: they are being written, or were left behind.

    Raises:
        RunError: if a path does not exist, has no run in it, or holds a folder that cannot be
            read.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise RunError(f"{path}: no such folder or archive")
        runs = list(_below(path))
        if not runs:
            raise RunError(f"{path}: no run in it (config.json beside monitor.csv)")
        for run in runs:
            found.setdefault(run.resolve(), run)
    return sorted(found.values())


def _below(path: Path) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        raise RunError(f"{error.filename}: cannot read: {reason(error)}") from error

    for root, folders, files in os.walk(path, onerror=unreadable):
        named = _SEED.fullmatch(Path(root).resolve().name) is not None
        if "config.json" in files and ("monitor.csv" in files or named):
            folders.clear()
            yield Path(root)
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def read_results(
    runs: Sequence[Path], note: Callable[[int], None] = lambda count: None
) -> list[Result]:
    """Read runs, sorted by environment, label and seed; ``note`` is told how many were read.

    Raises:
        RunError: if a config.json is missing or damaged.
        ValueError: if another file is damaged, or two runs have the same environment, label and
            seed; one line.
    """
    results = []
    for count, run in enumerate(runs):
        note(count)
        results.append(read_result(run))
    results.sort(key=lambda result: (result.env, result.label, result.seed))
    for one, other in pairwise(results):
        if one.name == other.name:
            raise ValueError(f"two runs of {one.name}: {one.folder} and {other.folder}")
    return results


def read_result(run: Path, with_curve: bool = True) -> Result:
    """Read a run.

    Args:
        run: Its folder.
        with_curve: Whether the learning curve is needed, which takes half of the time.

    Raises:
        RunError, ValueError: as ``read_results``.
    """
    folder = RunFolder.open(run)
    config = folder.read_config()
    env, algo = folder.name_in(config, "env"), folder.name_in(config, "algo")
    seed = _integer(config.get("seed"), "seed", 0, folder.config)
    total = _integer(config.get("total_timesteps"), "total_timesteps", 1, folder.config)
    final, evaluations = _evaluations(folder.evaluations, total)
    steps, last100, minutes, line = _steps_of_updates(folder), None, None, None
    monitor = load_monitor(run) if folder.monitor.exists() else None
    if monitor is not None and len(monitor.steps):
        steps = max(steps, int(monitor.steps[-1]))
        last100 = float(np.mean(monitor.returns[-WINDOW:]))
        minutes = float(monitor.seconds[-1]) / 60
        line = on_grid(curve(run, monitor), grid(total)) if with_curve else None
    made_with = read_object(folder.versions) if folder.versions.exists() else {}
    return Result(
        folder=run,
        env=env,
        label=label_of(run, env, algo),
        algo=algo,
        seed=seed,
        total_steps=total,
        steps=steps if final is None else final.steps,
        final=final,
        last100=last100,
        minutes=minutes,
        curve=line,
        versions=_versions(made_with),
        evaluations=evaluations,
        config=config,
        planned=_planned(made_with.get("sessions"), total),
    )


def _steps_of_updates(folder: RunFolder) -> int:
    """Steps at the last update, which counts where no episode has ended; 0 if it is not known."""
    row = last_row(folder.progress)
    try:
        return int((row or {}).get("timesteps", 0))
    except ValueError:
        return 0


def label_of(run: Path, env: str, algo: str) -> str:
    """Name of the folder that holds seedN, unless it is the environment's; else the algorithm."""
    folder = run.resolve()
    above = folder.parent.name
    labelled = _SEED.fullmatch(folder.name) and is_label(above) and above != safe_name(env)
    return above if labelled else algo


def _evaluations(path: Path, total: int) -> tuple[Final | None, list[tuple[int, float]]]:
    """The last row of eval.csv if it was written at the end of the run, and all rows."""
    if not path.exists():
        return None, []
    names = ("timesteps", "mean_reward", "std_reward", "episodes")
    rows = read_columns(path, *names).rows
    try:
        means = [(int(row["timesteps"]), float(row["mean_reward"])) for row in rows]
        if not rows or means[-1][0] < total:
            return None, means
        final = Final(*means[-1], float(rows[-1]["std_reward"]), int(rows[-1]["episodes"]))
    except ValueError as error:
        raise ValueError(f"{path}: numbers are needed ({error})") from error
    if not (math.isfinite(final.mean) and math.isfinite(final.std)):
        raise ValueError(f"{path}: the last evaluation must be finite")
    return final, means


def _versions(content: Mapping[str, Any]) -> dict[str, str]:
    """Printable texts and numbers of versions.json."""
    return {
        key: f"{value!s:.100}"
        for key, value in content.items()
        if key.isprintable() and isinstance(value, str | int | float) and str(value).isprintable()
    }


def _planned(sessions: object, total: int) -> int:
    """The steps that a run was to make before any session had others in mind."""
    each = sessions if isinstance(sessions, list) else []
    pairs = [(s.get(FORMER_TOTAL), s.get("total_timesteps")) for s in each if isinstance(s, dict)]
    # The last one is of a session that did not begin, where config.json says otherwise.
    while pairs and pairs[-1][1] != total:
        pairs.pop()
    former = [before for before, _ in pairs if type(before) is int and 0 < before <= _MOST_STEPS]
    return former[0] if former else total


def _integer(value: object, key: str, least: int, path: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST_STEPS:
        raise ValueError(f"{path}: {key} must be an integer in [{least}, 10^15]")
    return value
