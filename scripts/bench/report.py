"""The report of a suite, as JSON values and as Markdown."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from acktr.files import reason, write_atomic
from acktr.runs.folder import versions
from scripts.bench.cases import Case, Timing
from scripts.bench.errors import BenchError
from scripts.bench.runner import Outcome
from scripts.bench.suites import BASELINE, Suite, compute_key, environment_key
from scripts.bench.tables import limit_table, notes, rate_table, ratio_lines, share_table
from scripts.machine import cpu_model
from scripts.supervised import overhead

_PEERS = ("stable-baselines3", "sb3-contrib", "opencv-python-headless", "opencv-python")
_ROWS = ("training", "atari peer", "mujoco peer")


def load_average() -> list[float] | None:
    """Processes that wanted to run in the last 1, 5 and 15 minutes; None where it is unknown."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except OSError:
        return None


def about(command: str, timing: Timing, rounds: int, load: list[float] | None) -> dict[str, Any]:
    """What a report says of its making.

    Args:
        command: The command line.
        timing: Lengths and threads.
        rounds: How often all cases were gone through.
        load: Load average before the measurement.
    """
    found = {key: value for key, value in versions().items() if value is not None}
    del found["torch_threads"]  # of this process, which does not measure
    for package in _PEERS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {**found, "cpu": cpu_model(), "load_average_before": load},
        "timing": {**asdict(timing), "rounds": rounds},
    }


def document(
    suite: Suite,
    outcomes: Mapping[str, Outcome],
    skipped: Mapping[str, str],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that is known of a suite, as JSON values.

    Args:
        suite: The cases.
        outcomes: What became of those that were measured, by key.
        skipped: Why others were not, by key.
        about: Of :func:`about`.
    """
    found = {key: each.found for key, each in outcomes.items() if each.found is not None}
    named = {case.key: case for case in suite.cases}
    return {
        "suite": suite.name,
        **about,
        "rows": [_row(case, found, named) for case in suite.cases if _is_row(case, found)],
        "ratios": _ratios(suite, found),
        "limits": [
            limit
            for case in suite.cases
            if case.kind == "training" and (limit := _limit(case, found)) is not None
        ],
        "supervised": [
            {"what": case.what, "settings": case.settings, **found[case.key]}
            for case in suite.cases
            if case.kind == "supervised" and case.key in found
        ],
        "skipped": [{"what": named[key].what, "why": why} for key, why in skipped.items()],
        "failed": [
            {"what": named[key].what, "env": named[key].env, "why": each.failure}
            for key, each in outcomes.items()
            if each.found is None
        ],
    }


def _is_row(case: Case, found: Mapping[str, Any]) -> bool:
    return case.kind in _ROWS and case.key in found


def _row(case: Case, found: Mapping[str, Any], named: Mapping[str, Case]) -> dict[str, Any]:
    """A trained algorithm; its ratio is that of the speeds, on the same environment alone."""
    mine = found[case.key]
    comparable = BASELINE in found and named[BASELINE].env == case.env
    return {
        "key": case.key,
        "what": case.what,
        "env": case.env,
        "batch": case.batch,
        "steps_per_second": summary(mine["rates"]),
        "ratio": rate(mine) / rate(found[BASELINE]) if comparable else None,
        "milliseconds_per_update": 1000 * mine["seconds"] / mine["updates"],
        "updates": mine["updates"],
        "peak_mib": mine["peak_mib"],
        "shares": mine.get("shares"),
        "settings": case.settings,
    }


def summary(rates: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and all of the windows' speeds."""
    return {
        "median": statistics.median(rates),
        "min": min(rates),
        "max": max(rates),
        "windows": list(rates),
    }


def rate(found: Mapping[str, Any]) -> float:
    """Median speed of a measurement in steps per second."""
    return float(statistics.median(found["rates"]))


def _ratios(suite: Suite, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Ratios of the times per step, which are those of the speeds upside down."""
    return [
        {"what": what, "value": rate(found[below]) / rate(found[above])}
        for what, above, below in suite.ratios
        if above in found and below in found
    ]


def _limit(case: Case, found: Mapping[str, Any]) -> dict[str, Any] | None:
    """How far a training is from its limit; None if a part of it was not measured."""
    keys = (case.key, environment_key(case), compute_key(case))
    if any(key not in found for key in keys):
        return None
    achieved, environment, compute = (rate(found[key]) for key in keys)
    limit = sequential(environment, compute)
    return {
        "what": case.what,
        "env": case.env,
        "batch": case.batch,
        "environment": summary(found[keys[1]]["rates"]),
        "compute": summary(found[keys[2]]["rates"]),
        "limit": limit,
        "achieved": achieved,
        "part": achieved / limit,
    }


def sequential(environment: float, compute: float) -> float:
    """Speed of stepping and computing in turn: 1 / (1 / environment + 1 / compute)."""
    return 1 / (1 / environment + 1 / compute)


def markdown(document: Mapping[str, Any]) -> str:
    """The report for readers."""
    timing, rows = document["timing"], document["rows"]
    lines = [f"# Performance, {document['suite']}", "", f"Command: `{document['command']}`", ""]
    if rows:
        lines += [notes(timing), "", *rate_table(rows), ""]
    lines += ratio_lines(document["ratios"])
    shared = [row for row in rows if row["shares"] is not None]
    if shared:
        lines += ["## Where the time goes", "", *share_table(shared), ""]
    if document["limits"]:
        lines += ["## Distance to the limit", "", *limit_table(document["limits"]), ""]
    for each in document["supervised"]:
        lines += [*_supervised(each, timing), ""]
    for each in document["skipped"]:
        lines.append(f"- {each['what']}: skipped, {each['why']}")
    for each in document["failed"]:
        lines.append(f"- {each['what']} {each['env']}: failed: {each['why']}")
    if document["skipped"] or document["failed"]:
        lines.append("")
    described = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
    lines += [f"{document['date']}. Machine: {described}, torch threads {timing['threads']}."]
    return "\n".join(lines) + "\n"


def _supervised(each: Mapping[str, Any], timing: Mapping[str, Any]) -> list[str]:
    found, size = each["overhead"], each["settings"]["size"]
    return [
        f"## {each['what']}",
        "",
        f"Three 3x3 convolutions and two dense layers, random {size} x {size} colour images, batch"
        f" {found['batch']}, inverses every {found['refresh_every']} updates, {timing['threads']}"
        f" torch threads. Medians over {found['blocks']} alternating blocks of"
        f" {found['block_updates']} updates after {found['warm_up']} to warm up. {overhead.PARTS}",
        "",
        *overhead.table(found),
    ]


def write(out: Path, document: Mapping[str, Any]) -> None:
    """Write SUITE.json and SUITE.md.

    Raises:
        BenchError: One of them cannot be written.
    """
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    files = {"json": text, "md": markdown(document)}
    for suffix, content in files.items():
        path = out / f"{document['suite']}.{suffix}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content.encode())
        except OSError as error:
            raise BenchError(f"{path}: cannot write: {reason(error)}") from error
