"""Cases that are measured several times, in turn."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from bench_lib.cases import Case
from bench_lib.runner import Outcome


def turns(cases: Sequence[Case], rounds: int, skipped: Collection[str]) -> list[Case]:
    """The cases in the order in which they are measured, without the keys that are skipped.

    Comparisons of optimizers alternate between them by themselves and are measured once.
    """
    wanted = [case for case in cases if case.key not in skipped]
    return [
        case for turn in range(rounds) for case in wanted if turn == 0 or case.kind != "supervised"
    ]


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
