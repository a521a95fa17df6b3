"""The options of each command but train and doctor; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from acktr.cli.look_options import CardOptions, DiffOptions, ListOptions, PresetsOptions
from acktr.cli.options import (
    CompareOptions,
    EvalOptions,
    ExportOptions,
    PlotOptions,
    RecordOptions,
    ReportOptions,
)

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
