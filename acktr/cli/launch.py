"""Several processes of one run on this machine, under torch's elastic agent."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acktr.cli.parsing import environment
from acktr.envs import usable_cores
from acktr.interrupts import STOPPED, Stopped
from acktr.runs.meeting import MEETING_FILE

RANK_LOST = 77
"""Exit code of a process that another one left alone, and of a run with one that was killed."""
_PATIENCE = 60
"""Seconds that processes have to save after a signal."""


class ProcessesFailed(RuntimeError):  # noqa: N818 - as TrainingFault
    """A process of a run failed.

    Args:
        message: One line.
        code: Exit code.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def launch(args: Sequence[str], count: int, restarts: int, good: Path) -> None:
    """Run ``acktr train`` with these words in several processes, of which the first one is seen.

    They listen on the loopback interface only. What they tell one another by files lies in a folder
    of its own, which is removed.

    Args:
        args: The words after ``train``.
        count: Number of processes.
        restarts: How often all of them are started again after a failure.
        good: Where the last good checkpoint is, for messages.

    Raises:
        SystemExit: The first process failed and has said why.
        ProcessesFailed: Another one failed.
        Stopped: A signal came, and all have been told.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in [*logging.root.manager.loggerDict]:  # what it says of failures is said here
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    folder = Path(tempfile.mkdtemp(prefix="acktr-"))
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, usable_cores() // count)))
    variables = {
        "OMP_NUM_THREADS": threads,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        MEETING_FILE: str(folder / "meeting"),
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
    }
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="acktr",
        rdzv_backend="c10d",
        rdzv_endpoint=str(folder / "agent"),
        rdzv_configs={"store_type": "file"},
        max_restarts=restarts,
        local_addr="127.0.0.1",
        logs_specs=DefaultLogsSpecs(
            str(folder / "logs"), redirects={rank: Std.ALL for rank in range(1, count)}
        ),
        shutdown_timeout=_PATIENCE,
    )
    try:
        with environment(variables):
            elastic_launch(config, sys.executable)("-m", "acktr", "train", *args)
    except SignalException as stop:
        signum = signal.Signals(stop.sigval)
        raise Stopped(signum if signum in STOPPED else signal.SIGTERM, "stopped") from None
    except ChildFailedError as error:
        raise _explained(error.failures, count, folder / "logs", good) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _explained(
    failures: dict[int, Any], count: int, logs: Path, good: Path
) -> SystemExit | ProcessesFailed:
    """The failure that came first, or is the reason of others."""
    rank, failure = min(failures.items(), key=lambda one: (_order(one[1]), one[0]))
    code = failure.exitcode
    if code < 0:
        name = signal.Signals(-code).name
        kept = f"last good checkpoint: {good}" if good.exists() else "there is no checkpoint yet"
        return ProcessesFailed(f"process {rank} of {count} was killed by {name}; {kept}", RANK_LOST)
    if rank == 0:
        return SystemExit(code)
    return ProcessesFailed(f"process {rank} of {count}: {_last_line(logs, rank)}", code)


def _order(failure: Any) -> tuple[bool, int, int]:
    """A failure of its own comes first, then the earliest.

    The agent ends the others by SIGTERM, and after 30 s by SIGKILL, also one that hangs.
    """
    code = failure.exitcode
    own = code > 0 and code != RANK_LOST and code not in STOPPED.values()
    kinds = (own, code < 0 and code != -signal.SIGTERM, code == RANK_LOST, code > 0, True)
    return not own, failure.timestamp, kinds.index(True)


def _last_line(logs: Path, rank: int) -> str:
    """The last line that a process wrote to its standard error."""
    for path in sorted(logs.glob(f"**/{rank}/stderr.log"), reverse=True):
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        if lines:
            return lines[-1].removeprefix("acktr: ").removeprefix("error: ")
    return "it said nothing"
