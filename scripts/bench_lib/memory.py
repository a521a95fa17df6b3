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
    children = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
    peaks = [_peak_kib(process) for process in (os.getpid(), *children)]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) / 1024 if len(known) == len(peaks) else None


def _peak_kib(process: int) -> int | None:
    try:
        lines = (_PROCESSES / str(process) / "status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(found[0]) if found else None
