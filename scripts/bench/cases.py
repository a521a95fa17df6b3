"""What is measured, each case in a process of its own, and for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["training", "environment", "compute", "atari peer", "mujoco peer", "supervised"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure; JSON values only, since it is handed to another process."""

    key: str
    """Unique in its suite."""
    what: str
    """For the reader."""
    kind: Kind
    """Training, random actions alone, computation alone, a peer, or K-FAC beside SGD."""
    env: str = ""
    """Environment id; not used by ``supervised``."""
    num_envs: int = 0
    """Parallel environments."""
    num_steps: int = 0
    """Steps of each environment per update."""
    settings: dict[str, Any]
    """Our configuration, the peer's values, or those of the supervised problem."""
    needs: tuple[str, ...] = ()
    """Modules without which it cannot run."""

    @property
    def batch(self) -> str:
        """Environments times steps."""
        return f"{self.num_envs} x {self.num_steps}"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long and with how many threads everything is measured."""

    threads: int
    """Of torch."""
    seconds: float
    """Least length of a window, which ends with an update."""
    windows: int
    """Windows, one after another."""
    warm_up: float
    """Least seconds before the first window."""
    warm_up_updates: int
    """Least updates before the first window, such as the cold steps of K-FAC."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One measurement of a case."""

    case: Case
    """What is measured."""
    timing: Timing
    """For how long."""
