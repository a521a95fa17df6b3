"""Counting what went wrong with one block."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from acktr.kfac.linalg import FactorError, Parts

_logger = logging.getLogger(__name__)
COUNTS = ("failures", "total_failures", "rejected")
"""Entries of the state of :class:`FailureCount`."""


class FailureCount:
    """Failures in a row, of decompositions (on the host) and of statistics (on the device)."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.failures = 0
        self.total_failures = 0
        self.rejected = torch.zeros((), dtype=torch.int64, device=device)

    def judge(self, valid: Tensor) -> None:
        """Count a batch whose statistics are not finite; a good one starts the count again."""
        self.rejected = torch.where(valid, 0, self.rejected + 1)

    def check_rejected(self, limit: int) -> None:
        """Raise FactorError after ``limit`` batches of NaN or Inf in a row."""
        rejected = int(self.rejected)
        if rejected >= limit:
            raise FactorError(
                f"K-FAC layer {self.name!r}: the statistics of {rejected} batches in a row were"
                " NaN or Inf (lower lr or kl_clip, or normalise rewards)"
            )

    def settle(self, results: Sequence[Parts | FactorError | None], limit: int) -> bool:
        """Whether every decomposition succeeded; raises FactorError after ``limit`` failures."""
        error = next((result for result in results if isinstance(result, FactorError)), None)
        if error is None:
            self.failures = 0
            return True
        self.failures += 1
        self.total_failures += 1
        if self.failures >= limit:
            raise FactorError(
                f"K-FAC layer {self.name!r}: {error}; {self.failures} refreshes failed in a"
                " row (lower lr or kl_clip, raise damping, or normalise rewards)"
            ) from error
        _logger.warning("K-FAC layer %r keeps its former basis: %s", self.name, error)
        return False

    def state_dict(self) -> dict[str, int]:
        """The three counts."""
        return {
            "failures": self.failures,
            "total_failures": self.total_failures,
            "rejected": int(self.rejected),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore checked counts."""
        self.failures = state["failures"]
        self.total_failures = state["total_failures"]
        self.rejected = torch.tensor(state["rejected"], device=self.rejected.device)
