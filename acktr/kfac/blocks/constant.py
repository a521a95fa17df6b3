"""Blocks of parameters whose curvature is not learnt from batches."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor


class PlainBlock:
    """A parameter without curvature: its step direction is its gradient."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.names: tuple[str, ...] = (name,)

    def precondition(self, gradients: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        """Return the gradient itself."""
        return {name: gradients[name] for name in self.names}


class KnownBlock:
    """A parameter whose Fisher is known in closed form and diagonal, such as 2 I of a log-std."""

    def __init__(self, name: str, fisher: float) -> None:
        if not 0 <= fisher < math.inf:
            raise ValueError(f"known_fisher of {name} must be finite and >= 0, got {fisher}")
        self.name = name
        self.names: tuple[str, ...] = (name,)
        self.fisher = fisher

    def precondition(self, gradients: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        """Return g / (F + lambda)."""
        scale = self.fisher + damping
        return {name: gradients[name] / scale for name in self.names}
