"""What is checked and measured, each stage in a process of its own, and for how long at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

TOTAL = 480.0
"""Seconds for all stages together."""

Kind = Literal["updates", "kfac", "compile", "speed", "tests"]
Row = dict[str, Any]
"""A line of the table as JSON values: what, value, and for checks ``bound`` and ``right``."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage."""

    name: str
    """Unique."""
    kind: Kind
    """What it does."""
    budget: float
    """Seconds after which it is stopped."""
    precision: str = "float32"
    """Of forward passes: float32, bfloat16 or auto."""
    env: str = ""
    """Environment of a measurement."""
    compiled: bool = False
    """Whether torch.compile is used, with CUDA graphs for acting."""
    dry: bool = True
    """Whether a dry run has it."""


STAGES = (
    Stage(name="kfac", kind="kfac", budget=40),
    Stage(name="float32", kind="updates", budget=50),
    Stage(name="bfloat16", kind="updates", precision="bfloat16", budget=40),
    Stage(name="breakout", kind="speed", env="BreakoutNoFrameskip-v4", budget=35),
    Stage(name="halfcheetah", kind="speed", env="HalfCheetah-v5", budget=30),
    Stage(name="compile", kind="compile", compiled=True, budget=100, dry=False),
    Stage(
        name="breakout compiled",
        kind="speed",
        env="BreakoutNoFrameskip-v4",
        compiled=True,
        budget=75,
        dry=False,
    ),
    Stage(
        name="halfcheetah compiled",
        kind="speed",
        env="HalfCheetah-v5",
        compiled=True,
        budget=60,
        dry=False,
    ),
    Stage(name="tests", kind="tests", budget=120),
)
"""In their order: what is most wanted first, should the time run out."""
