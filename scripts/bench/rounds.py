"""Cases that are measured several times, in turn."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from scripts.bench.cases import Case, Timing, Turn
from scripts.bench.runner import Outcome


def turns(
    cases: Sequence[Case], timing: Timing, rounds: int, skipped: Collection[str]
) -> list[Turn]:
    """The cases in the order in which they are measured, without the keys that are skipped.

    Comparisons of optimizers alternate between them by themselves: one turn has the windows of
    all rounds.
    """
    found: list[Turn] = []
    for number in range(rounds):
        for case in cases:
            if case.key in skipped:
                continue
            if case.kind != "supervised":
                found.append(Turn(case=case, timing=timing))
            elif number == 0:
                whole = replace(timing, windows=rounds * timing.windows)
                found.append(Turn(case=case, timing=whole))
    return found


def together(first: Outcome, second: Outcome) -> Outcome:
    """Two measurements of a case as one; a failure of either is one of both."""
    if first.found is None or second.found is None:
        return first if first.found is None else second
    one, other = first.found, second.found
    joined: dict[str, Any] = {
        "rates": one["rates"] + other["rates"],
        "updates": one["updates"] + other["updates"],
        "seconds": one["seconds"] + other["seconds"],
        "peak_mib": None,
    }
    peaks = [each["peak_mib"] for each in (one, other) if each["peak_mib"] is not None]
    if peaks:
        joined["peak_mib"] = max(peaks)
    if "shares" in one:
        joined["shares"] = {
            part: sum(each["seconds"] * each["shares"].get(part, 0.0) for each in (one, other))
            / joined["seconds"]
            for part in {**one["shares"], **other["shares"]}
        }
    return Outcome(joined)
