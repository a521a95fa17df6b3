"""What runs are compared with: reference returns, thresholds, and published learning curves."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from acktr.report.curves import Floats, read_columns

SHIPPED = Path(__file__).with_name("published") / "references_mujoco.csv"
"""The references of this package; the file names its sources."""

_CURVES = SHIPPED.with_name("acktr_paper.csv")
_SOURCES = {
    "paper": ("Wu et al. 2017", "NoFrameskip-v3", "-v1"),
    "baselines": ("OpenAI Baselines", "NoFrameskip-v4", "-v2"),
}
_KNOWN_MODULES = ("gymnasium", "ale_py")
"""Modules that register the environments of these references."""
_ATARI = frozenset(
    {"BeamRider", "Breakout", "Enduro", "Pong", "Qbert", "Seaquest", "SpaceInvaders"}
)


@dataclass(frozen=True)
class PublishedCurve:
    """A learning curve that somebody published."""

    algo: str
    """acktr, a2c or trpo."""
    source: str
    """Who published it."""
    label: str
    """Algorithm, source and the version of the environment it was measured on."""
    steps: Floats
    """Environment steps, shape (points,)."""
    returns: Floats
    """Mean returns, shape (points,)."""


@dataclass(frozen=True)
class Reference:
    """The reference returns of one environment."""

    env: str
    """Environment id, or its name without version for all versions."""
    low: float | None
    """Return that counts as 0; None where scores are not defined."""
    high: float | None
    """Return that counts as 1; above ``low``."""
    thresholds: tuple[float, ...]
    """Returns for steps-to-threshold."""
    source: str
    """Where the numbers come from, in words; may be empty."""


def load_references(path: Path = SHIPPED) -> dict[str, Reference]:
    """Read a CSV file with the columns env, low, high, threshold and, if wanted, source.

    ``low`` and ``high`` may both be empty; ``threshold`` holds any number of returns, separated by
    semicolons. The first line may be a comment.

    Raises:
        ValueError: if it cannot be read or is not such a file; one line that names it.
    """
    found: dict[str, Reference] = {}
    for row in read_columns(path, "env", "low", "high", "threshold").rows:
        try:
            reference = _reference(row)
            if reference.env in found:
                raise ValueError("stands twice")
        except ValueError as error:
            raise ValueError(f"{path}: environment {row['env']!r:.60}: {error}") from error
        found[reference.env] = reference
    return found


def find_reference(references: Mapping[str, Reference], env_id: str) -> Reference | None:
    """The reference of an environment id, else that of its name without version."""
    return references.get(env_id) or references.get(environment_name(env_id))


def normalise(returns: Floats, reference: Reference) -> Floats:
    """Scores (return - low) / (high - low), any shape.

    Raises:
        ValueError: if the reference has no ``low`` and ``high``.
    """
    if reference.low is None or reference.high is None:
        raise ValueError(f"{reference.env} has no low and high")
    return (returns - reference.low) / (reference.high - reference.low)


def _reference(row: Mapping[str, str]) -> Reference:
    env, source = row["env"].strip(), row.get("source", "")
    if not env or not env.isprintable() or not source.isprintable():
        raise ValueError("env and source must be printable, and env not empty")
    low, high = (_number(row[name]) if row[name].strip() else None for name in ("low", "high"))
    if (low is None) != (high is None):
        raise ValueError("low and high must both be given or both be empty")
    if low is not None and high is not None and not low < high:
        raise ValueError(f"low must be below high, got {low:g} and {high:g}")
    cells = [cell for cell in row["threshold"].split(";") if cell.strip()]
    return Reference(env, low, high, tuple(_number(cell) for cell in cells), source)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"a finite number is needed, got {text!r:.40}")
    return value


def environment_name(env_id: str) -> str:
    """Name of an environment without version, frame skip and ale-py's namespace: Pong, Hopper.

    Environments of other modules and namespaces are other tasks, which keep them: mine:Hopper,
    MinAtar/Breakout, and Pixels/Hopper, seen by its pictures.
    """
    module, _, name = env_id.rpartition(":")
    name = name.removeprefix("ALE/")
    name = name if module in ("", *_KNOWN_MODULES) else f"{module}:{name}"
    return re.sub(r"((NoFrameskip|Deterministic)?-v\d+)$", "", name)


def published_curves(env_id: str, algos: Sequence[str] = ("acktr",)) -> list[PublishedCurve]:
    """Published curves of acktr, a2c or trpo, on whichever version they were measured."""
    env = environment_name(env_id)
    lines = [line for line in _CURVES.read_text("utf-8").splitlines() if line[:1] != "#"]
    rows = [row for row in csv.DictReader(lines) if row["env"] == env and row["algo"] in algos]
    curves = []
    for (algo, source), points in groupby(rows, key=lambda row: (row["algo"], row["source"])):
        name, atari, mujoco = _SOURCES[source]
        measured_on = env + (atari if env in _ATARI else mujoco)
        older = "" if measured_on == env_id else ", older version"
        label = f"{algo.upper()}, {name} ({measured_on}{older})"
        table = np.array([(float(row["step"]), float(row["return"])) for row in points])
        curves.append(PublishedCurve(algo, name, label, table[:, 0], table[:, 1]))
    return curves
