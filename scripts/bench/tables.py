"""Tables of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
    "step": "rest of step",
    "policy": "policy",
    "critic": "critic",
    "rest": "rest of update",
}
"""Headings by part of the time, in the order of the table."""


def notes(timing: Mapping[str, Any]) -> str:
    """How the speeds were measured."""
    count = timing["rounds"] * timing["windows"]
    rounds = f", in {timing['rounds']} rounds through all lines" if timing["rounds"] > 1 else ""
    return (
        f"Environment steps per second of training, environments included: median [least, most] of"
        f" {count} windows of at least {timing['seconds']:g} s{rounds}, which end with an"
        f" update, after at least {timing['warm_up']:g} s and {timing['warm_up_updates']} updates"
        f" to warm up. CPU, {timing['threads']} torch threads; every line in a process of its own,"
        " one after another; ours takes one thread for networks of vectors, as acktr train does."
        " The ratio is that of the speeds. Peak memory is resident and includes"
        " the interpreter and libraries; processes that step environments are added up. Peers train"
        " with the settings of rl-baselines3-zoo on their own environments."
    )


def rate_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Speed of every training."""
    lines = [
        "| what | environment | envs x steps | steps/s | ratio to ACKTR | ms per update"
        " | peak RSS, MiB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        peak = "unknown" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
        lines.append(
            f"| {row['what']} | {row['env']} | {row['batch']} | {_rate(row['steps_per_second'])}"
            f" | {ratio} | {row['milliseconds_per_update']:.1f} | {peak} |"
        )
    return lines


def ratio_lines(ratios: Sequence[Mapping[str, Any]]) -> list[str]:
    """Times per step that are compared, one line each, and an empty line."""
    lines = [f"- {each['what']}: {each['value']:.3f}" for each in ratios]
    return [*lines, ""] if lines else []


def share_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Per cent of the time of the windows by part; each line sums to 100."""
    used = [part for part in PARTS if any(part in row["shares"] for row in rows)]
    unknown = {part for row in rows for part in row["shares"]} - set(used)
    if unknown:
        raise ValueError(f"parts of the time without a heading: {', '.join(sorted(unknown))}")
    lines = [
        "Per cent of the time of the same windows; a line sums to 100. Acting is normalisation or"
        " the conversion of images, the forward passes of the rollout and sampling; environments"
        " are the time spent waiting for them; statistics are"
        " K-FAC's covariances,"
        " precondition the application of the inverses, the rest of the step among others the"
        " exact quadratic form and the change of the weights. Of TRPO, policy and critic are the"
        " whole update.",
        "",
        f"| what | environment | {' | '.join(PARTS[part] for part in used)} |",
        "|---|---|" + "---:|" * len(used),
    ]
    for row in rows:
        cells = (f"{100 * row['shares'][p]:.1f}" if p in row["shares"] else "" for p in used)
        lines.append(f"| {row['what']} | {row['env']} | {' | '.join(cells)} |")
    return lines


def limit_table(limits: Sequence[Mapping[str, Any]]) -> list[str]:
    """What environments and computation alone allow, and how much of it is reached."""
    lines = [
        "Steps per second: the same vector environment with random actions and nothing else; acting"
        " on fixed observations and learning from a fixed batch without environments; both in turn,"
        " 1 / (1/environments + 1/computation); and the training above, which is bounded by that"
        " unless a group of environments is stepped while the policy acts for another.",
        "",
        "| what | environment | envs x steps | environments alone | computation alone | in turn"
        " | achieved | of in turn |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for each in limits:
        lines.append(
            f"| {each['what']} | {each['env']} | {each['batch']} | {_rate(each['environment'])}"
            f" | {_rate(each['compute'])} | {each['limit']:,.0f} | {each['achieved']:,.0f}"
            f" | {100 * each['part']:.1f} % |"
        )
    return lines


def _rate(found: Mapping[str, Any]) -> str:
    return f"{found['median']:,.0f} [{found['min']:,.0f}, {found['max']:,.0f}]"
