"""``acktr train --curvature-ranks 1``: the bits of training without it, and how all end.

They take a minute each on a busy machine and are for ``-m slow``; those of a killed process stand
beside the ones without ``--curvature-ranks``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from tests.cli.test_processes import (
    LONG,
    RUN,
    TRAIN,
    ended,
    evaluating,
    finished,
    network,
    under_way,
)
from tests.tools.command_line import wait_until
from tests.tools.ranks import HELPED, OFTEN, same

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not distributed.is_gloo_available(), reason="needs Linux and gloo"
)

SHORT = (*TRAIN, *OFTEN, "--num-steps", "16", "--total-timesteps", "1000", "--eval-freq", "600")


def trained(folder: Path, *words: str) -> Any:
    """The state of a run that ended well."""
    folder.mkdir(exist_ok=True)
    done = finished(folder, *words)
    assert done.returncode == 0, done.stderr
    return network(folder)


def under_way_in(state: Any) -> int:
    """How many refreshes of a run's networks are under way."""
    learner = state["learner"]
    return sum(learner[part]["curvature"]["pending"] is not None for part in ("actor", "critic"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_checkpoint_is_that_of_one_process(tmp_path: Path) -> None:
    wanted = trained(tmp_path / "one", *SHORT)
    found = trained(tmp_path / "helped", "--nproc", "2", *HELPED, *SHORT)
    assert same(found, wanted, {"seconds"}) and wanted["updates"] > 5
    how = json.loads((tmp_path / "helped" / RUN / "protocol.json").read_text())
    assert how["curvature_ranks"] == 1 and "processes" not in how
    left = {path.name.split("_")[0] for path in (tmp_path / "helped" / "tmp").iterdir()}
    assert left <= {"torchinductor"}  # torch's own


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_that_train_are_two_processes(tmp_path: Path) -> None:
    """Also under torchrun, and with refreshes that are waited for."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    module = [*torchrun, "3", "--module", "acktr", "train"]
    wanted = trained(tmp_path / "two", "--nproc", "2", *SHORT)
    assert same(trained(tmp_path / "helped", "--nproc", "3", *HELPED, *SHORT), wanted, {"seconds"})
    (tmp_path / "torchrun").mkdir()
    done = finished(tmp_path / "torchrun", *HELPED, *SHORT, module=module)
    assert done.returncode == 0, done.stderr
    assert same(network(tmp_path / "torchrun"), wanted, {"seconds"})
    pairs = [("", SHORT[0]), *pairwise(SHORT)]
    at_once = ["0" if name.endswith("-delay") else word for name, word in pairs]
    wanted = trained(tmp_path / "two at once", "--nproc", "2", *at_once)
    words = ("--nproc", "3", *HELPED, *at_once)
    assert same(trained(tmp_path / "helped at once", *words), wanted, {"seconds"})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stopped_with_a_refresh_under_way_goes_on_with_and_without(tmp_path: Path) -> None:
    wanted = trained(tmp_path / "whole", *SHORT)
    first = trained(tmp_path / "first", "--nproc", "2", *HELPED, *SHORT, "--stop-at", "700")
    assert under_way_in(first) == 2
    for way in ((), ("--nproc", "2", *HELPED)):
        folder = tmp_path / "-".join(("again", *way))
        shutil.copytree(tmp_path / "first", folder)
        found = trained(folder, "--resume", str(RUN), *way)
        assert same(found["learner"], wanted["learner"], set())
        assert same(found["network"], wanted["network"], set())
    done = finished(folder, "--resume", str(RUN), "--nproc", "2", *HELPED)  # there is nothing left
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_hung(tmp_path: Path) -> None:
    with under_way(tmp_path, *HELPED, *LONG, *OFTEN, "--rank-timeout", "5") as (process, pids):
        os.kill(pids[1], signal.SIGSTOP)
        begun = time.monotonic()
        said = ended(process, pids)
        assert time.monotonic() - begun < 45
    assert process.returncode == 77, said
    assert "process 1 of 2 did not answer within 5 s" in said[-1]
    assert "last good checkpoint" in said[-1]


@pytest.mark.slow
def test_it_waits_longer_than_the_limit_but_not_for_one_that_hangs(tmp_path: Path) -> None:
    words = (*TRAIN[:2], *OFTEN, "--total-timesteps", "100000", "--eval-freq", "2000")
    endless = ("--eval-episodes", "1000000", "--rank-timeout", "5")
    with under_way(tmp_path, *HELPED, *words, *endless) as (process, pids):
        wait_until(lambda: evaluating(tmp_path / RUN / "progress.csv"))
        time.sleep(8)  # longer than the limit
        assert process.poll() is None
        os.kill(pids[0], signal.SIGSTOP)
        begun = time.monotonic()
        said = ended(process, pids)
        assert time.monotonic() - begun < 45
    assert process.returncode == 77, said
    assert "process 0 of 2 gave no sign of life for 5 s" in said[-1]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("whom", ["launcher", 0, 1])
def test_signals(tmp_path: Path, signum: signal.Signals, whom: Any) -> None:
    with under_way(tmp_path, *HELPED, *LONG, *OFTEN) as (process, pids):
        os.kill(process.pid if whom == "launcher" else pids[whom], signum)
        begun = time.monotonic()
        said = ended(process, pids)
        assert time.monotonic() - begun < 10
    assert process.returncode == {signal.SIGTERM: 75, signal.SIGINT: 130}[signum]
    (line,) = [line for line in said if f"stopped by {signum.name}, checkpoint at step" in line]
    steps = int(re.search(r"step ([\d,]+)", line)[1].replace(",", ""))  # type: ignore[index]
    assert network(tmp_path)["timesteps"] == steps > 0


@pytest.mark.slow
def test_what_has_nothing_for_it_is_refused(tmp_path: Path) -> None:
    chain = ("--acktr.actor.structure", "tridiagonal")
    done = finished(tmp_path, "--nproc", "2", *HELPED, *SHORT, *chain)
    assert done.returncode == 2, done.stderr
    assert "structure=tridiagonal refreshes at once" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "runs").exists()
