"""``acktr train`` in several processes: what they write, how they end, and who is told what.

CI has one run. The others, which take a minute each on a busy machine, are for ``-m slow``.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from acktr.runs.checkpoint import load_checkpoint
from acktr.runs.meeting import MEETING_FILE
from acktr.runs.saved import read_agent
from acktr.runs.tables import read_table
from tests.tools.command_line import wait_until
from tests.tools.ranks import HELPED, OFTEN, same

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 120
"""Seconds for what takes ten on an idle machine."""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not distributed.is_gloo_available(), reason="needs Linux and gloo"
)

TRAIN = ("--env", "CartPole-v1", "--eval-episodes", "2", "--checkpoint-freq", "500")
SHORT = (*TRAIN, "--total-timesteps", "1000", "--eval-freq", "600")
LONG = (*TRAIN, "--total-timesteps", "10_000_000", "--eval-freq", "0")


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "acktr", "train", *words]


def variables(folder: Path, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder),
        **more,
    }


def finished(folder: Path, *words: str, module: list[str] | None = None) -> Any:
    """A command that has ended."""
    (folder / "tmp").mkdir(exist_ok=True)
    return subprocess.run(
        [*module, *words] if module else command(*words),
        cwd=folder,
        env=variables(folder / "tmp"),
        capture_output=True,
        text=True,
        timeout=2 * LIMIT,
        check=False,
    )


@contextmanager
def under_way(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], dict[int, int]]]:
    """Two processes that have begun to train: their launcher, and their numbers by rank."""
    (folder / "tmp").mkdir(exist_ok=True)
    process = subprocess.Popen(
        command("--nproc", "2", *words),
        cwd=folder,
        env=variables(folder / "tmp"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        progress = folder / "runs" / "CartPole-v1" / "acktr" / "seed0" / "progress.csv"
        wait_until(lambda: rows(progress) > 2 or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        yield process, ranks_of(process.pid)
    finally:
        for pid in [*ranks_of(process.pid).values(), process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.communicate()


def rows(path: Path) -> int:
    try:
        with path.open() as file:
            return sum(1 for _ in csv.reader(file))
    except OSError:
        return 0


def ranks_of(launcher: int) -> dict[int, int]:
    """Process numbers of the children of a launcher, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            parent = int(re.split(r"\) \S ", (entry / "stat").read_text())[1].split()[0])
            environment = (entry / "environ").read_bytes().decode(errors="replace")
        except (OSError, IndexError, ValueError):
            continue
        rank = re.search(r"(?:^|\0)RANK=(\d+)", environment)
        if parent == launcher and rank:
            found[int(rank[1])] = int(entry.name)
    return found


def ended(process: subprocess.Popen[str], pids: dict[int, int], limit: float = LIMIT) -> list[str]:
    """The lines of standard error of a launcher that ends, with all its processes."""
    _, said = process.communicate(timeout=limit)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids.values()), 10)
    return said.strip().splitlines()


RUN = Path("runs") / "CartPole-v1" / "acktr" / "seed0"


def listening() -> set[str]:
    """Addresses off the loopback interface on which somebody listens."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            loopback = local.startswith(("0100007F", "00000000000000000000000001000000"))
            loopback |= local.startswith("0000000000000000FFFF00000100007F")
            if state == "0A" and not loopback:
                found.add(local)
    return found


def test_a_run_of_two_processes(tmp_path: Path) -> None:
    """One log, one checkpoint, one line; nothing left elsewhere, nothing heard outside."""
    before = listening()
    with under_way(tmp_path, *SHORT, "--label", "acktr") as (process, pids):
        assert sorted(pids) == [0, 1]
        assert listening() <= before
        out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    assert out.strip().startswith("done: CartPole-v1") and "processes 2" in err
    left = {path.name.split("_")[0] for path in (tmp_path / "tmp").iterdir()}
    assert left <= {"torchinductor"}  # torch's own
    run = tmp_path / RUN
    steps = [int(row["timesteps"]) for row in csv.DictReader((run / "progress.csv").open())]
    assert steps == sorted(set(steps)) and steps[-1] >= 1000
    episodes = read_table(run / "monitor.csv").rows
    assert sum(int(row["l"]) for row in episodes) > 0.8 * steps[-1]
    assert json.loads((run / "protocol.json").read_text())["processes"] == 2
    state = read_agent(run / "checkpoints" / "last").state
    assert state["timesteps"] == steps[-1] and len(state["collector"]["parts"]) == 2


def network(folder: Path) -> Any:
    return read_agent(folder / RUN / "checkpoints" / "last").state


@pytest.mark.slow
def test_the_same_again_and_in_other_numbers(tmp_path: Path) -> None:
    """Two processes twice are the same bits; one under torchrun is plain training."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    module = ["--module", "acktr", "train"]
    kinds: dict[str, Callable[[Path], Any]] = {
        "two": lambda folder: finished(folder, "--nproc", "2", *SHORT),
        "again": lambda folder: finished(folder, "--nproc", "2", *SHORT),
        "torchrun two": lambda folder: finished(folder, *SHORT, module=[*torchrun, "2", *module]),
        "torchrun one": lambda folder: finished(folder, *SHORT, module=[*torchrun, "1", *module]),
        "one": lambda folder: finished(folder, *SHORT),
    }
    states = {}
    for name, run in kinds.items():
        folder = tmp_path / name
        folder.mkdir()
        done = run(folder)
        assert done.returncode == 0, done.stderr
        states[name] = network(folder)
    for one, other in (("two", "again"), ("two", "torchrun two"), ("one", "torchrun one")):
        assert same(states[one], states[other], {"seconds"}), (one, other)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stopped_in_two_goes_on_in_any_number(tmp_path: Path) -> None:
    """In two as if it had not stopped; in others with new episodes."""
    first, whole = tmp_path / "first", tmp_path / "whole"
    first.mkdir()
    whole.mkdir()
    done = finished(first, "--nproc", "2", *SHORT, "--stop-at", "500")
    assert done.returncode == 0, done.stderr
    before = network(first)["timesteps"]
    for way in ((), ("--nproc", "4"), ("--nproc", "2")):
        folder = tmp_path / "-".join(("again", *way))
        shutil.copytree(first, folder)
        done = finished(folder, "--resume", str(RUN), *way)
        assert done.returncode == 0, done.stderr
        anew = "environments start new episodes: processes that trained it were 2, and now"
        assert (anew in done.stderr) == (way != ("--nproc", "2"))
        assert network(folder)["timesteps"] >= 1000 > before >= 500
    assert finished(whole, "--nproc", "2", *SHORT).returncode == 0
    wanted, found = network(whole)["network"], network(folder)["network"]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    done = finished(folder, "--resume", str(RUN), "--nproc", "2")  # there is nothing left
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), (*HELPED, *OFTEN)], ids=["training", "decomposing"])
@pytest.mark.parametrize("rank", [0, 1])
def test_killed(tmp_path: Path, rank: int, words: tuple[str, ...]) -> None:
    with under_way(tmp_path, *LONG, *words) as (process, pids):
        os.kill(pids[rank], signal.SIGKILL)
        begun = time.monotonic()
        said = ended(process, pids)
        assert time.monotonic() - begun < 10
    assert process.returncode == 77
    assert f"process {rank} of 2 was killed by SIGKILL; last good checkpoint:" in said[-1]
    assert network(tmp_path)["timesteps"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), (*HELPED, *OFTEN)], ids=["training", "decomposing"])
def test_killed_and_started_again(tmp_path: Path, more: tuple[str, ...]) -> None:
    words = (*TRAIN, "--total-timesteps", "3000", "--eval-freq", "0", "--max-restarts", "1")
    with under_way(tmp_path, *words, *more) as (process, pids):
        os.kill(pids[1], signal.SIGKILL)
        _, err = process.communicate(timeout=2 * LIMIT)
    assert process.returncode == 0, err
    assert network(tmp_path)["timesteps"] >= 3000


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_hung(tmp_path: Path, rank: int) -> None:
    with under_way(tmp_path, *LONG, "--rank-timeout", "5") as (process, pids):
        os.kill(pids[rank], signal.SIGSTOP)
        begun = time.monotonic()
        said = ended(process, pids)
        assert time.monotonic() - begun < 45
    assert process.returncode == 77, said
    assert f"process {rank} of 2 did not answer within 5 s" in said[-1]
    assert "last good checkpoint" in said[-1] or rank == 0


def evaluating(progress: Path) -> bool:
    """Whether no update is made for some seconds."""
    before = rows(progress)
    time.sleep(3)
    return before == rows(progress) > 1


@pytest.mark.slow
def test_hung_in_an_evaluation(tmp_path: Path) -> None:
    """The others wait for that without a limit, but not without a sign of life."""
    words = (*TRAIN[:2], "--total-timesteps", "100000", "--eval-freq", "2000")
    endless = ("--eval-episodes", "1000000", "--rank-timeout", "5")
    with under_way(tmp_path, *words, *endless) as (process, pids):
        wait_until(lambda: evaluating(tmp_path / RUN / "progress.csv"))
        time.sleep(8)  # longer than the limit
        assert process.poll() is None
        os.kill(pids[0], signal.SIGSTOP)
        said = ended(process, pids)
    assert process.returncode == 77, said
    assert "process 0 of 2 gave no sign of life for 5 s" in said[-1]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("whom", ["launcher", 0, 1])
def test_signals(tmp_path: Path, signum: signal.Signals, whom: Any) -> None:
    with under_way(tmp_path, *LONG) as (process, pids):
        os.kill(process.pid if whom == "launcher" else pids[whom], signum)
        begun = time.monotonic()
        said = ended(process, pids)
        assert time.monotonic() - begun < 10
    assert process.returncode == {signal.SIGTERM: 75, signal.SIGINT: 130}[signum]
    (line,) = [line for line in said if f"stopped by {signum.name}, checkpoint at step" in line]
    steps = int(re.search(r"step ([\d,]+)", line)[1].replace(",", ""))  # type: ignore[index]
    assert network(tmp_path)["timesteps"] == steps > 0


@pytest.mark.slow
def test_what_cannot_begin(tmp_path: Path) -> None:
    """One line, exit code 2, and no folder."""
    refused = {
        ("--num-envs", "7"): "num_envs must be a multiple of the 2 processes",
        ("--network.memory", "lstm"): "a memory trains in one process only, not in 2",
        ("--rank-timeout", "0"): "--rank-timeout must be in [1, 86,400] seconds",
    }
    for words, message in refused.items():
        done = finished(tmp_path, "--nproc", "2", *SHORT, *words)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert not (tmp_path / "runs").exists()
    finished(tmp_path, *TRAIN, "--total-timesteps", "300")
    done = finished(tmp_path, "--nproc", "2", *SHORT)
    assert done.returncode == 2 and "already holds a run" in done.stderr.splitlines()[-1]


NETWORK = """
import os
from torch import nn

WIDTH = int(os.environ.get("WIDTH", "8"))

class Policy(nn.Sequential):
    def __init__(self, *_):
        super().__init__(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2))

class Value(Policy):
    def forward(self, observations):
        return super().forward(observations)[:, 0]
"""


@pytest.mark.slow
def test_processes_that_differ(tmp_path: Path) -> None:
    """Started by hand with other settings, another number of threads, or another network."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "nets.py").write_text(NETWORK)
    of_own = ("--network", "nets:Policy,nets:Value")
    cases: tuple[tuple[tuple[str, ...], tuple[str, ...], dict[str, str], str], ...] = (
        ((), ("--gamma", "0.9"), {}, "process 1 of 2 has another gamma"),
        (
            (),
            (),
            {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
            "process 1 of 2 has another torch_threads",
        ),
        ((), ("--stop-at", "500"), {}, "process 1 of 2 has another --stop-at"),
        ((), ("--curvature-ranks", "1"), {}, "process 1 of 2 has another --curvature-ranks"),
        (of_own, of_own, {"WIDTH": "9"}, "rank 1 has other names, shapes or types of parameters"),
    )
    for number, (common, words, more, said) in enumerate(cases):
        processes = []
        for rank in range(2):
            place = {
                **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
                "WORLD_SIZE": "2",
                "TORCHELASTIC_RUN_ID": "none",
                MEETING_FILE: str(tmp_path / f"meeting{number}"),
                "GLOO_SOCKET_IFNAME": "lo",
                **(more if rank else {}),
            }
            processes.append(
                subprocess.Popen(
                    command(*SHORT, *(words if rank else common)),
                    cwd=tmp_path,
                    env=variables(tmp_path / "tmp", **place),
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        for process in processes:
            _, err = process.communicate(timeout=LIMIT)
            assert process.returncode == 2, err
            assert f"{said} " in err and "than process 0" in err.replace("rank 0", "process 0")
        assert not (tmp_path / "runs").exists()


ENVIRONMENT = """
import gymnasium

class Fails(gymnasium.Wrapper):
    count = 0

    def step(self, action):
        Fails.count += 1
        if Fails.count == 300 and __import__("os").environ.get("RANK") == "1":
            raise RuntimeError("a wheel came off")
        return self.env.step(action)
"""


@pytest.mark.slow
def test_an_environment_fails(tmp_path: Path) -> None:
    """The line is that of the process whose environment it was; what was learned is kept."""
    (tmp_path / "wheels.py").write_text(ENVIRONMENT)
    done = finished(tmp_path, "--nproc", "2", *LONG, "--wrapper", "wheels:Fails")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 76 and "process 1 of 2" in last and "a wheel came off" in last
    state, _ = load_checkpoint(tmp_path / RUN / "checkpoints" / "last")
    assert state["timesteps"] > 0
