"""TensorBoard's event files, written so that a full disk loses nothing.

TensorBoard's own writer ends with the first failure, and its thread with a traceback. Here records
wait in memory until they are in the file; a write that fails leaves the file as it was, and is
tried again with the next point.
"""

from __future__ import annotations

import io
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from acktr.files import append_whole, reason

FLUSH_SECONDS = 30.0
"""Seconds that records wait at most for others, so that many are written at once."""

_MOST_BYTES = 16 << 20

_logger = logging.getLogger(__name__)


class EventFile:
    """Scalars for TensorBoard, in a new file of a folder.

    Args:
        folder: Where to.
        first_step: Points of earlier files count below this step only; None: all of them do.
        clock: Seconds.
    """

    def __init__(
        self, folder: Path, first_step: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._path: Path | None = None
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._clock, self._due = clock, clock()
        self._failing, self._lossy = False, False
        self._beginning = _record(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if first_step is not None:
            started = SessionLog(status=SessionLog.START)
            event = Event(wall_time=time.time(), step=first_step, session_log=started)
            self._beginning += _record(event)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record a point; it is in the file after :meth:`flush`, or soon."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        if values:
            event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
            self._keep(_record(event))
            if self._failing or self._clock() >= self._due:
                self.flush()

    def flush(self) -> None:
        """Write all records to the file; a failure is a warning, and they are kept."""
        self._due = self._clock() + FLUSH_SECONDS
        try:
            if self._path is None or not self._path.exists():
                self._path = _new_file(self._folder)
            begun = self._path.stat().st_size > 0
            data = b"".join([b"" if begun else self._beginning, *self._waiting])
            append_whole(self._path, data)
        except OSError as error:
            if not self._failing:
                _logger.warning(
                    "%s: cannot write TensorBoard events, they are written later: %s",
                    self._folder,
                    reason(error),
                )
            self._failing = True
            return
        self._failing = False
        self._waiting.clear()
        self._bytes = 0

    def _keep(self, record: bytes) -> None:
        self._waiting.append(record)
        self._bytes += len(record)
        while self._bytes > _MOST_BYTES:  # memory is bounded: the oldest points go
            self._bytes -= len(self._waiting.popleft())
            if not self._lossy:
                _logger.warning("%s: too many TensorBoard events wait, some are lost", self._folder)
            self._lossy = True


def _record(event: Any) -> bytes:
    record = io.BytesIO()
    RecordWriter(record).write(event.SerializeToString())
    return record.getvalue()


def _new_file(folder: Path) -> Path:
    for number in count():
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
        path = folder / f"{name}.{os.getpid()}.{number}"
        try:
            path.open("xb").close()
        except FileExistsError:
            continue
        return path
    raise AssertionError
