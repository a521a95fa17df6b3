"""The report of a suite, as JSON values and as Markdown."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from acktr.report.tables import markdown as table
from scripts.bench.cases import BASELINE, Case, Timing
from scripts.common import machine

_PEERS = ("stable-baselines3", "sb3-contrib", "opencv-python-headless", "opencv-python")
_ROWS = ("training", "atari peer", "mujoco peer")
_SAME_BATCH = "time per step, ACKTR over A2C at the same batch"
_RATIOS = (
    (_SAME_BATCH, BASELINE, "a2c-equal"),
    (f"{_SAME_BATCH}, all samples", "acktr-whole", "a2c-equal"),
)
"""Times per step to compare: what is said, and the keys of numerator and denominator."""
PARTS = {
    "env": "environments",
    "act": "act",
    "batch": "batch",
    "forward": "forward",
    "fisher": "Fisher backward",
    "backward": "loss backward",
    "statistics": "statistics",
    "refresh": "refresh",
    "precondition": "precondition",
    "exact": "exact forms",
    "step": "rest of step",
    "policy": "policy",
    "critic": "critic",
    "rest": "rest of update",
}
"""Headings by part of the time, in the order of the table."""


def about(command: str, timing: Timing, rounds: int) -> dict[str, Any]:
    """What a report says of its making, before the measurement.

    Args:
        command: The command line.
        timing: Lengths and threads.
        rounds: How often all cases were gone through.
    """
    described = machine()
    del described["torch_threads"]  # of this process, which does not measure
    for package in _PEERS:
        with suppress(metadata.PackageNotFoundError):
            described[package] = metadata.version(package)
    described["load_average_before"] = [round(value, 2) for value in os.getloadavg()]
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": described,
        "timing": {**asdict(timing), "rounds": rounds},
    }


def results(
    cases: Sequence[Case], outcomes: Mapping[str, dict[str, Any]], skipped: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that is known of a suite, as JSON values.

    Args:
        cases: All of them.
        outcomes: Measurements or failures of those that were measured, by key.
        skipped: Why others were not, by key.
    """
    found = {key: each for key, each in outcomes.items() if "failure" not in each}
    done = [case for case in cases if case.key in found]
    named = {case.key: case for case in cases}
    return {
        "rows": [_row(case, found, named) for case in done if case.kind in _ROWS],
        "ratios": [  # those of the times per step are those of the speeds upside down
            {"what": what, "value": rate(found[below]) / rate(found[above])}
            for what, above, below in _RATIOS
            if above in found and below in found
        ],
        "limits": [
            _limit(case, found)
            for case in done
            if case.kind == "training" and {case.environment_key, case.compute_key} <= found.keys()
        ],
        "supervised": [
            {"what": case.what, "settings": case.settings, **found[case.key]}
            for case in done
            if case.kind == "kfac"
        ],
        "drawing": [_drawn(case, found) for case in done if case.kind == "drawing"],
        "skipped": [{"what": named[key].what, "why": why} for key, why in skipped.items()],
        "failed": [
            {"what": named[key].what, "env": named[key].env, "why": each["failure"]}
            for key, each in outcomes.items()
            if "failure" in each
        ],
    }


def _row(case: Case, found: Mapping[str, Any], named: Mapping[str, Case]) -> dict[str, Any]:
    """A trained algorithm; its ratio is that of the speeds, on the same environment alone."""
    mine = found[case.key]
    comparable = case.beside in found and named[case.beside].env == case.env
    return {
        "key": case.key,
        "what": case.what,
        "env": case.env,
        "batch": case.batch,
        "steps_per_second": summary(mine["rates"]),
        "ratio": rate(mine) / rate(found[case.beside]) if comparable else None,
        "milliseconds_per_update": 1000 * mine["seconds"] / mine["updates"],
        "updates": mine["updates"],
        "processor_seconds_per_million": _processor(mine),
        "peak_mib": mine["peak_mib"],
        "shares": mine.get("shares"),
        "messages": mine.get("messages"),
        "settings": case.settings,
    }


def _processor(found: Mapping[str, Any]) -> float | None:
    """Seconds of processors for a million steps; None if not known."""
    worked: float | None = found["processor"]
    return None if worked is None else 1e6 * worked / found["steps"]


def _drawn(case: Case, found: Mapping[str, Any]) -> dict[str, Any]:
    """Steps with a picture per second; the ratio is to Gymnasium's of the same size."""
    other = found.get(f"drawing-{case.env.partition('/')[2]}-{case.settings['size']}-gymnasium")
    mine = found[case.key]
    return {
        "what": case.what,
        "env": case.env,
        "steps_per_second": summary(mine["rates"]),
        "ratio": None if other is None else rate(mine) / rate(other),
    }


def summary(rates: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and all of the windows' speeds."""
    median = statistics.median(rates)
    return {"median": median, "min": min(rates), "max": max(rates), "windows": list(rates)}


def rate(found: Mapping[str, Any]) -> float:
    """Median speed of a measurement in steps per second."""
    return float(statistics.median(found["rates"]))


def _limit(case: Case, found: Mapping[str, Any]) -> dict[str, Any]:
    """How far a training is from stepping and computing in turn."""
    environment, compute = found[case.environment_key], found[case.compute_key]
    limit = 1 / (1 / rate(environment) + 1 / rate(compute))
    achieved = rate(found[case.key])
    return {
        "what": case.what,
        "env": case.env,
        "batch": case.batch,
        "environment": summary(environment["rates"]),
        "compute": summary(compute["rates"]),
        "limit": limit,
        "achieved": achieved,
        "part": achieved / limit,
    }


def markdown(document: Mapping[str, Any]) -> str:
    """The report for readers."""
    timing, rows = document["timing"], document["rows"]
    parts = [f"# Performance, {document['suite']}\n", f"Command: `{document['command']}`\n"]
    if rows:
        parts += [_notes(timing), _rate_table(rows)]
    if document["ratios"]:
        said = (f"- {each['what']}: {each['value']:.3f}\n" for each in document["ratios"])
        parts.append("".join(said))
    shared = [row for row in rows if row["shares"] is not None]
    if shared:
        parts += ["## Where the time goes\n", _SHARES, share_table(shared)]
    telling = [row for row in rows if row["messages"] is not None]
    if telling:
        parts += ["## Messages\n", _MESSAGES, _message_table(telling)]
    if document["limits"]:
        parts += ["## Distance to the limit\n", _LIMITS, _limit_table(document["limits"])]
    if document["drawing"]:
        parts += ["## Pictures\n", _DRAWING, _drawing_table(document["drawing"])]
    for each in document["supervised"]:
        parts += _kfac(each, timing)
    missing = [f"- {e['what']}: skipped, {e['why']}\n" for e in document["skipped"]]
    missing += [f"- {e['what']} {e['env']}: failed: {e['why']}\n" for e in document["failed"]]
    if missing:
        parts.append("".join(missing))
    described = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
    threads = f"torch threads {timing['threads']}"
    parts.append(f"{document['date']}. Machine: {described}, {threads}.\n")
    return "\n".join(parts)


_SHARES = """\
Per cent of the time of the same windows; a line sums to 100. Acting is normalisation or the \
conversion of images, the forward passes of the rollout and sampling; environments are the time \
spent waiting for them; statistics are K-FAC's covariances, precondition the application of the \
inverses, the rest of the step among others the exact quadratic form and the change of the \
weights. Of TRPO, policy and critic are the whole update. Of ACKTR with networks of vectors \
only the actor's update is told, as the critic's steps are another process's while this one \
collects.
"""
_MESSAGES = """\
What the first of the processes sends, with both gloo's sums and its broadcasts counted once, per \
update; its time holds the wait for the slowest process. A group of one sends nothing.
"""
_LIMITS = """\
Steps per second: the same vector environment with random actions and nothing else; acting on \
fixed observations and learning from a fixed batch without environments; both in turn, \
1 / (1/environments + 1/computation); and the training above, which is bounded by that unless a \
group of environments is stepped while the policy acts for another, or a separate critic learns \
while the next rollout is collected.
"""


_DRAWING = """\
Steps per second of one core, with random actions and a picture each; the ratio is to Gymnasium's \
own renderer, by the same camera where it follows the robot.
"""


def _notes(timing: Mapping[str, Any]) -> str:
    """How the speeds were measured."""
    count = timing["rounds"] * timing["windows"]
    rounds = f", in {timing['rounds']} rounds through all lines" if timing["rounds"] > 1 else ""
    return (
        f"Environment steps per second of training, environments included: median [least, most] of"
        f" {count} windows of at least {timing['seconds']:g} s{rounds}, which end with an"
        f" update, after at least {timing['warm_up']:g} s and {timing['warm_up_updates']} updates"
        f" to warm up. CPU, {timing['threads']} torch threads; every line in a process of its own,"
        " one after another; ours takes one thread for networks of vectors, as acktr train does."
        " The ratio is that of the speeds. CPU s/M is seconds of all processors together, of"
        " processes that wait for work in a loop too, for a million steps. Peak memory is resident"
        " and includes the interpreter and libraries; processes that step environments are added"
        " up. Peers train with the settings of rl-baselines3-zoo on their own environments.\n"
    )


def _rate_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Speed of every training."""
    head = ["what", "environment", "envs x steps", "steps/s", "ratio to ACKTR", "ms per update"]
    body = []
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        worked = row["processor_seconds_per_million"]
        peak = "unknown" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
        speeds = [_rate(row["steps_per_second"]), ratio, f"{row['milliseconds_per_update']:.1f}"]
        speeds.append("unknown" if worked is None else f"{worked:,.0f}")
        body.append([row["what"], row["env"], row["batch"], *speeds, peak])
    return table([*head, "CPU s/M", "peak RSS, MiB"], body, left=2)


def share_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Per cent of the time of the windows by part; each line sums to 100."""
    used = [part for part in PARTS if any(part in row["shares"] for row in rows)]
    unknown = {part for row in rows for part in row["shares"]} - set(used)
    if unknown:
        raise ValueError(f"parts of the time without a heading: {', '.join(sorted(unknown))}")
    body = []
    for row in rows:
        cells = (f"{100 * row['shares'][p]:.1f}" if p in row["shares"] else "" for p in used)
        body.append([row["what"], row["env"], *cells])
    return table(["what", "environment", *(PARTS[part] for part in used)], body, left=2)


def _message_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What an update's messages are."""
    head = ["what", "environment", "calls per update", "MB per update", "ms per update"]
    body = []
    for row in rows:
        calls, size, seconds = (row["messages"][name] for name in ("calls", "bytes", "seconds"))
        numbers = (f"{calls:.1f}", f"{size / 1e6:.2f}", f"{1000 * seconds:.1f}")
        body.append([row["what"], row["env"], *numbers])
    return table(head, body, left=2)


def _limit_table(limits: Sequence[Mapping[str, Any]]) -> str:
    """What environments and computation alone allow, and how much of it is reached."""
    head = ["what", "environment", "envs x steps", "environments alone", "computation alone"]
    head += ["in turn", "achieved", "of in turn"]
    body = []
    for each in limits:
        alone = [_rate(each["environment"]), _rate(each["compute"])]
        ends = [f"{each['limit']:,.0f}", f"{each['achieved']:,.0f}", f"{100 * each['part']:.1f} %"]
        body.append([each["what"], each["env"], each["batch"], *alone, *ends])
    return table(head, body, left=2)


def _drawing_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Steps with a picture per second, and how many times Gymnasium's."""
    body = []
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.1f}"
        body.append([row["what"], row["env"], _rate(row["steps_per_second"]), ratio])
    return table(["what", "environment", "steps/s", "ratio"], body, left=2)


def _rate(found: Mapping[str, Any]) -> str:
    return f"{found['median']:,.0f} [{found['min']:,.0f}, {found['max']:,.0f}]"


def _kfac(each: Mapping[str, Any], timing: Mapping[str, Any]) -> list[str]:
    """K-FAC beside SGD: a heading, how it was measured, and the contestants with their parts."""
    found, size = each["overhead"], each["settings"]["size"]
    contestants: Mapping[str, Any] = found["contestants"]
    parts = list(contestants["kfac"]["parts"])
    body = []
    for name, one in contestants.items():
        cells = (f"{one['parts'][p]:.3f}" if p in one["parts"] else "" for p in parts)
        body.append([name, f"{one['milliseconds']:.3f}", f"{one['ratio_to_sgd']:.3f}", *cells])
    return [
        f"## {each['what']}\n",
        f"Three 3x3 convolutions and two dense layers, random {size} x {size} colour images, batch"
        f" {found['batch']}, inverses every {found['refresh_every']} updates, {timing['threads']}"
        f" torch threads. Medians over {found['blocks']} alternating blocks of"
        f" {found['block_updates']} updates after {found['warm_up']} to warm up. Parts are means in"
        " milliseconds per update: fisher is the backward pass of sampled targets, factors their"
        " covariances, refresh the inverses, apply their application, the rest everything else.\n",
        table(["optimizer", "ms per update", "ratio to sgd", *parts], body),
    ]


def files(document: Mapping[str, Any]) -> dict[str, bytes]:
    """SUITE.json and SUITE.md."""
    name = document["suite"]
    return {
        f"{name}.json": (json.dumps(document, indent=2, allow_nan=False) + "\n").encode(),
        f"{name}.md": markdown(document).encode(),
    }
