"""TensorBoard events that can fail without stopping training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_FLUSH_SECONDS = 30

_logger = logging.getLogger(__name__)


class Board:
    """Scalars by tag and timestep in TensorBoard's event files.

    The first failure (a full disk) is reported as a warning and ends the writing of events.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        """Open a new event file.

        Args:
            folder: Where to put it.
            purge_step: TensorBoard hides events of earlier files from this step on.
        """
        self._folder = folder
        self._writer: SummaryWriter | None = None
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._writer = SummaryWriter(
                str(folder), purge_step=purge_step, flush_secs=_FLUSH_SECONDS
            )
        except Exception as error:
            self._fail(error)

    def add(self, timesteps: int, scalars: Mapping[str, float]) -> None:
        """Add one point of several scalars."""
        if self._writer is None:
            return
        try:
            for tag, value in scalars.items():
                self._writer.add_scalar(tag, value, timesteps)
        except Exception as error:
            self._fail(error)

    def flush(self) -> None:
        """Wait until all points are in the file."""
        if self._writer is None:
            return
        try:
            self._writer.flush()
        except Exception as error:
            self._fail(error)

    def close(self) -> None:
        """Write what is left and close the file; further calls do nothing."""
        if self._writer is None:
            return
        try:
            self._writer.close()
        except Exception as error:
            self._fail(error)
        self._writer = None

    def _fail(self, error: Exception) -> None:
        """Give up: the writer's thread may be dead, so it is not even closed."""
        self._writer = None
        _logger.warning("%s: no more TensorBoard events: %s", self._folder, error)
