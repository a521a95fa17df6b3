"""Peak memory of processes."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

_PROCESSES = Path("/proc")


def peak_mib() -> float | None:
    """Largest resident memory so far of this process and of those it has started, in MiB.

    Pages that they share are counted once for each of them. What the kernel keeps for a process is
    read, because ``getrusage`` starts at the peak of the process that has started this one.

    Returns:
        None where the system does not tell.
    """
    peaks = [_value(process, "VmHWM") for process in (os.getpid(), *_children())]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) / 1024 if len(known) == len(peaks) else None


def _children() -> set[int]:
    """Processes of this one, by fork or by way of multiprocessing's server."""
    started = {child.pid for child in multiprocessing.active_children() if child.pid is not None}
    numbers = [int(path.name) for path in _PROCESSES.glob("[0-9]*")]
    return started | {number for number in numbers if _value(number, "PPid") == os.getpid()}


def _value(process: int, name: str) -> int | None:
    """A number in the status that the system keeps of a process."""
    try:
        lines = (_PROCESSES / str(process) / "status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) if found else None
