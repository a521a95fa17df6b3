"""The commands that look at runs and presets, and train nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

from acktr.cli.flags import UsageError
from acktr.cli.options import CardOptions, DiffOptions, ListOptions, PresetsOptions
from acktr.config import known_presets, preset, to_dict
from acktr.envs import lookup
from acktr.files import reason, write_atomic
from acktr.report.archives import unpacked
from acktr.report.listing import MARK, aligned_text, card, differences, row, rows_json, rows_table
from acktr.report.results import find_runs


def list_runs(options: ListOptions, *_: object) -> str:
    """The table of runs."""
    try:
        with unpacked(options.runs) as folders:
            rows = [
                row(run, named=any(run.is_relative_to(path) for path in options.runs))
                for run in find_runs(folders)
            ]
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    if options.sort != "name":
        values = {each.run: getattr(each, options.sort) for each in rows}
        rows.sort(key=lambda each: -math.inf if values[each.run] is None else values[each.run])
        rows.reverse()
    return rows_json(rows) if options.json else rows_table(rows)


def diff(options: DiffOptions, *_: object) -> str:
    """What sets two runs apart."""
    try:
        found = differences(options.one, options.other)
    except ValueError as error:
        raise UsageError(str(error)) from error
    head = ("setting", str(options.one), str(options.other))
    if not found:
        return "no difference"
    return aligned_text(head, found, words=(0, 1, 2))


def presets(options: PresetsOptions, *_: object) -> str:
    """The table of presets, or the settings of one."""
    if options.env is not None:
        lookup(options.env)  # any other word would have the preset of any environment
        config = preset(options.env, options.algo, options.preset)[0]
        return json.dumps(to_dict(config), indent=2)
    head = ("algorithm", "preset", "for", "what")
    return aligned_text(head, known_presets(), words=(0, 1, 2, 3))


def write_card(options: CardOptions, *_: object) -> str:
    """The page about a run."""
    out: Path = options.run / "README.md" if options.out is None else options.out
    try:
        text = card(options.run)
        if out.exists() and MARK not in out.read_text(errors="replace"):
            raise UsageError(f"{out}: is no card of a run; choose another --out")
        write_atomic(out, text.encode())
    except OSError as error:
        raise UsageError(f"{out}: cannot write: {reason(error)}") from error
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error
    return str(out)
