"""Reference returns that scores are normalised with, and thresholds to reach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from acktr.files import reason
from acktr.report.curves import environment_name
from acktr.runs.tables import read_table

SHIPPED = Path(__file__).with_name("published") / "references_mujoco.csv"
"""The references of this package; the file names its sources."""

_COLUMNS = ("env", "low", "high", "threshold")


@dataclass(frozen=True)
class Reference:
    """Of one environment."""

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
    try:
        content = read_table(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {reason(error)}") from error
    if not set(_COLUMNS) <= set(content.columns):
        raise ValueError(f"{path}: columns {', '.join(_COLUMNS)} are needed")
    found: dict[str, Reference] = {}
    for row in content.rows:
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


def normalise(returns: NDArray[np.float64], reference: Reference) -> NDArray[np.float64]:
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
