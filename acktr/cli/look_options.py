"""The options of the commands that look at runs and presets; nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from acktr.cli.options import File, Flag


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
