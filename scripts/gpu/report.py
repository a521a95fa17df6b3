"""One table of all stages, and the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from scripts.gpu.stages import Row, Stage

DONE, WRONG, FAILED, LATE, NOT_RUN = "right", "WRONG", "failed", "over time", "not run"


@dataclass
class Outcome:
    """What became of a stage."""

    stage: Stage
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    state: str = NOT_RUN
    """One of the five."""
    why: str = ""
    """Of what was not done: the reason."""

    @property
    def bad(self) -> bool:
        """Whether the check as a whole has failed by it."""
        return self.state in (WRONG, FAILED, LATE)


def settled(outcome: Outcome) -> Outcome:
    """The same, WRONG if a row is, whatever became of the stage afterwards."""
    if any(row.get("right") is False for row in outcome.rows):
        outcome.state = WRONG
    return outcome


def document(about: dict[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """JSON values of the whole."""
    stages = [
        {
            "stage": each.stage.name,
            "state": each.state,
            "why": each.why,
            "seconds": round(each.seconds, 1),
            "budget": each.stage.budget,
            "rows": each.rows,
        }
        for each in outcomes
    ]
    return {**about, "stages": stages}


def markdown(about: dict[str, Any], outcomes: Sequence[Outcome]) -> str:
    """The table, with a line for every number and for every stage that has none."""
    lines = [
        "# GPU check",
        "",
        f"Device: {about['device']}. " + (_DRY if about["dry"] else _REAL),
        "",
        "| stage | what | value | CPU's | at most | |",
        "|---|---|---:|---:|---:|---|",
    ]
    for each in outcomes:
        lines += [_line(each.stage.name, row) for row in each.rows]
        if not each.rows or each.state in (FAILED, LATE, NOT_RUN):
            why = f": {each.why}" if each.why else ""
            lines.append(
                f"| {each.stage.name} | ({each.seconds:.0f} s) | | | | {each.state}{why} |"
            )
    return "\n".join(lines) + "\n"


_REAL = (
    "Errors are relative to the same computation in float64 on the CPU, beside those of the CPU in"
    " the device's precision. Kernels run behind the program: a part of the time holds what was"
    " queued before it and is waited for in it."
)
_DRY = (
    "**Dry run: the CPU beside itself with another number of threads, at tiny sizes. No number here"
    " says anything about a GPU.**"
)


def _line(stage: str, row: Row) -> str:
    right = {True: DONE, False: f"**{WRONG}**", None: ""}[row.get("right")]
    cells = (row["what"], *(_number(row.get(key)) for key in ("value", "cpu", "bound")), right)
    return f"| {stage} | " + " | ".join(cells) + " |"


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(_number, value))
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}"


def files(about: dict[str, Any], outcomes: Sequence[Outcome]) -> dict[str, bytes]:
    """Both, by name."""
    text = json.dumps(document(about, outcomes), indent=1) + "\n"
    return {"gpu_check.md": markdown(about, outcomes).encode(), "gpu_check.json": text.encode()}
