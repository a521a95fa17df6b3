"""What the user asks of a grid: seeds, algorithms, and settings laid over their presets."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acktr.config import ALGOS, PRESETS, PUBLISHED, ConfigError, read_settings

_MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Overlay:
    """A file of settings that are laid over a preset."""

    file: Path
    settings: Mapping[str, Any]
    """Part of a config.json; what the grid decides in it does not count."""


@dataclass(frozen=True)
class Entry:
    """One algorithm of the grid: a preset and what is laid over it."""

    label: str
    """Name of its folders."""
    algo: str
    preset: str = "default"
    overlay: Overlay | None = None


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
            names = ", ".join((*ALGOS, *(f"{algo}-paper" for algo in PUBLISHED)))
            raise ConfigError(f"algos: {text!r} must be one of {names}; {hint}")
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


def _known_prefix(label: str) -> tuple[str | None, str]:
    """The longest algorithm that a label starts with, and the preset that would follow it."""
    algos = [algo for algo in ALGOS if f"{label}-".startswith(f"{algo}-")]
    algo = max(algos, key=len, default=None)
    if algo is None or label == algo:
        return algo, PRESETS[0]
    return algo, label[len(algo) + 1 :]


def _choice(
    file: str, values: Mapping[str, Any], key: str, choices: Sequence[str], default: str
) -> str:
    value = values.get(key, default)
    if value not in choices:
        raise ConfigError(f"{file}: {key} must be one of {', '.join(choices)}, got {value!r}")
    return str(value)
