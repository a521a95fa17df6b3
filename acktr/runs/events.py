"""TensorBoard's event files, written so that a full disk loses nothing.

TensorBoard's own writer ends with the first failure, and its thread with a traceback. Here records
wait in memory until they are in the file; a write that fails leaves the file as it was, and is
tried again with the next point.
"""

from __future__ import annotations

import io
import logging
import os
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.hparams.api_pb2 import (
    DataType,
    Experiment,
    HParamInfo,
    MetricInfo,
    MetricName,
)
from tensorboard.plugins.hparams.metadata import (
    EXPERIMENT_TAG,
    PLUGIN_DATA_VERSION,
    PLUGIN_NAME,
    SESSION_START_INFO_TAG,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo
from tensorboard.plugins.text.plugin_data_pb2 import TextPluginData
from tensorboard.summary.writer.record_writer import RecordWriter

from acktr.files import append_whole, reason

FLUSH_SECONDS = 30.0
"""Seconds that records wait at most for others, so that many are written at once."""

_MOST_BYTES = 16 << 20
_NAMED = re.compile(r"events\.out\.tfevents\.([0-9]{10})\.")
_LAST_SECOND = 10**10 - 1

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

    def describe(self, settings: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Record the settings, as a text and for the table of hyper-parameters.

        Args:
            settings: Numbers, booleans, texts and lists by dotted name.
            metrics: Tags of the scalars that the table shows beside them.
        """
        values = [*_hyper_parameters(settings, metrics), _text("config", settings)]
        self._keep(_record(Event(wall_time=time.time(), summary=Summary(value=values))))

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


def _hyper_parameters(settings: Mapping[str, Any], metrics: Sequence[str]) -> list[Any]:
    """What TensorBoard's table of hyper-parameters reads: which there are, and a session's."""
    begun, infos = SessionStartInfo(start_time_secs=time.time()), []
    for name, value in settings.items():
        if value is None:
            continue  # a setting that is off has no value to compare
        kind = "DATA_TYPE_FLOAT64"
        if isinstance(value, bool):
            kind, begun.hparams[name].bool_value = "DATA_TYPE_BOOL", value
        elif isinstance(value, int | float):
            begun.hparams[name].number_value = value
        else:
            kind, begun.hparams[name].string_value = "DATA_TYPE_STRING", str(value)
        infos.append(HParamInfo(name=name, type=DataType.Value(kind)))
    shown = [MetricInfo(name=MetricName(tag=tag)) for tag in metrics]
    experiment = Experiment(hparam_infos=infos, metric_infos=shown)
    version = PLUGIN_DATA_VERSION
    parts = {
        EXPERIMENT_TAG: HParamsPluginData(experiment=experiment, version=version),
        SESSION_START_INFO_TAG: HParamsPluginData(session_start_info=begun, version=version),
    }
    return [_of_plugin(tag, PLUGIN_NAME, data) for tag, data in parts.items()]


def _text(tag: str, settings: Mapping[str, Any]) -> Any:
    """The settings as a table in TensorBoard's texts."""
    rows = "".join(f"| {name} | {value} |\n" for name, value in settings.items())
    value = _of_plugin(f"{tag}/text_summary", "text", TextPluginData(version=0))
    value.tensor.dtype = DT_STRING
    value.tensor.tensor_shape.dim.add(size=1)
    value.tensor.string_val.append(f"| setting | value |\n|---|---|\n{rows}".encode())
    return value


def _of_plugin(tag: str, name: str, data: Any) -> Any:
    content = SummaryMetadata.PluginData(plugin_name=name, content=data.SerializeToString())
    return Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=content))


def _record(event: Any) -> bytes:
    record = io.BytesIO()
    RecordWriter(record).write(event.SerializeToString())
    return record.getvalue()


def _new_file(folder: Path) -> Path:
    """An empty file whose name sorts behind all others: TensorBoard reads them in that order.

    Two writers may begin within a second, and the number of the later process need not be greater.
    """
    found = [match for path in folder.iterdir() if (match := _NAMED.match(path.name))]
    second = max([int(time.time()), *(int(match[1]) + 1 for match in found)])
    for number in count():
        name = f"events.out.tfevents.{min(second, _LAST_SECOND):010d}.{socket.gethostname()}"
        path = folder / f"{name}.{os.getpid()}.{number}"
        try:
            path.open("xb").close()
        except FileExistsError:
            continue
        return path
    raise AssertionError
