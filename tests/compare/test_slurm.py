"""Runs as jobs of a Slurm cluster."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from acktr.compare import on_slurm
from acktr.compare.comparison import RunsFailed, compare
from acktr.compare.engines import launching
from acktr.compare.entries import Entry, Overlay
from acktr.compare.grid import make_plans
from acktr.compare.orders import LOST, Order
from acktr.config import ConfigError
from acktr.interrupts import Interrupts
from acktr.runs.tables import read_table
from tests.compare.test_engines import SMALL


class Job:
    """In place of submitit's."""

    def __init__(self, folder: Path) -> None:
        self.job_id, self.cancelled = "7", 0
        self.paths = SimpleNamespace(result_pickle=folder / "result")
        self.found: tuple[int, str] | Exception = (0, "done")

    def result(self) -> tuple[int, str]:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    def cancel(self, check: bool) -> None:
        self.cancelled += 1


def ordered(folder: Path, gpus: int = 0) -> Order:
    return Order(("train",), folder / "some.log", folder, folder / "some.stop", gpus)


class TestSlurmTask:
    @pytest.fixture(autouse=True)
    def prepared(self, tmp_path: Path) -> None:
        self.job, self.now, self.state, self.asked = Job(tmp_path), 0.0, "RUNNING", 0
        order = ordered(tmp_path)
        self.task = on_slurm.SlurmTask(order, self.hand_in, self.said, lambda: self.now)

    def hand_in(self) -> None:
        self.task.job = self.job

    def said(self, job: Job) -> str:
        assert job is self.job
        self.asked += 1
        return self.state

    def test_has_the_result_of_its_file(self) -> None:
        assert self.task.ended() is None
        self.job.paths.result_pickle.touch()
        assert self.task.ended() == (0, "done")
        self.job.found = ValueError("Traceback:\n  no room\n")
        assert self.task.ended() == (LOST, "job 7 failed: no room")

    def test_is_lost_when_two_looks_do_not_find_it(self) -> None:
        """A question every twenty seconds; where nobody answers that is no end."""
        for self.now, self.state in ((19, ""), (21, ""), (30, ""), (42, "UNKNOWN"), (63, "")):
            assert self.task.ended() is None
        self.now = 84
        assert self.task.ended() == (LOST, "job 7 is gone and has left no result")
        assert self.asked == 4

    def test_is_cancelled_before_it_begins(self) -> None:
        assert self.task.ended() is None
        self.task.cancel()
        assert self.job.cancelled == 0 and self.task.ended() is None  # the file is for that
        self.state = "PENDING"
        self.task.cancel()
        assert self.job.cancelled == 1
        assert self.task.ended() == (-signal.SIGTERM, "stopped before it began")


class TestArrays:
    @pytest.fixture(autouse=True)
    def prepared(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.handed: list[list[int]] = []
        """The GPUs of the orders of each array."""
        self.arrays = on_slurm.Arrays(self.submit, lambda job: "PENDING")

    def submit(self, orders: Sequence[Order]) -> list[Job]:
        self.handed.append([order.gpus for order in orders])
        return [Job(self.folder) for _ in orders]

    def begin(self, gpus: int = 0) -> on_slurm.SlurmTask:
        return self.arrays.begin(ordered(self.folder, gpus))

    def test_what_was_begun_is_one_array_at_the_first_question(self) -> None:
        tasks = [self.begin() for _ in range(3)]
        assert not self.handed
        assert [task.ended() for task in tasks] == [None] * 3 and self.handed == [[0, 0, 0]]
        assert len({id(task.job) for task in tasks}) == 3
        self.begin().ended()
        assert self.handed == [[0, 0, 0], [0]]

    def test_an_array_needs_the_same_for_all(self) -> None:
        tasks = [self.begin(gpus) for gpus in (1, 0, 1)]
        assert tasks[0].ended() is None and self.handed == [[0], [1, 1]]
        assert all(task.job is not None for task in tasks)

    def test_what_is_cancelled_before_is_not_handed_in(self) -> None:
        first, second = self.begin(), self.begin()
        first.cancel()
        assert first.ended() == (-signal.SIGTERM, "stopped before it began") and not self.handed
        assert second.ended() is None and self.handed == [[0]]

    def test_a_refusal_ends_all_of_it(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        def refused(orders: Sequence[Order]) -> list[Job]:
            said = "sbatch: error: nosuch\nsbatch: error: Invalid partition\n"
            sys.stderr.write(said)
            raise RuntimeError(said)

        self.arrays = on_slurm.Arrays(refused, lambda job: "")
        why = LOST, "not handed in: sbatch: error: Invalid partition"
        assert [task.ended() for task in (self.begin(), self.begin())] == [why, why]
        assert capfd.readouterr().err == ""


SBATCH = """#!/bin/sh
number=$(($(cat count 2>/dev/null || echo 6) + 1))
echo $number > count
cp "$1" array$number
echo Submitted batch job $number
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs sh")
@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs submitit")
def test_what_sbatch_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By submitit: two arrays, as some need a GPU, without a limit of time, size or restarts."""
    monkeypatch.chdir(tmp_path)
    for command, words in {"sbatch": SBATCH, "srun": "#!/bin/sh\n"}.items():
        Path(command).write_text(words)
        Path(command).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with on_slurm.tasks(Path("runs")) as begin:
        tasks = [begin(ordered(tmp_path, gpus)) for gpus in (0, 1, *[0] * 299, 1)]
        assert tasks[0].ended() is None
    jobs = [task.job.job_id for task in tasks if isinstance(task, on_slurm.SlurmTask)]
    assert jobs == ["7_0", "8_0", *[f"7_{place}" for place in range(1, 300)], "8_1"]
    cpu, gpu = (set(Path(f"array{number}").read_text().splitlines()) for number in (7, 8))
    assert "#SBATCH --array=0-299%300" in cpu and "#SBATCH --array=0-1%2" in gpu
    for words in ("--no-requeue", "--signal=USR1@120", "--cpus-per-task=1"):
        assert f"#SBATCH {words}" in cpu & gpu
    assert "#SBATCH --gpus-per-node=1" in gpu - cpu
    assert not any("--time" in line for line in cpu | gpu)
    assert len(list(Path("runs/logs/slurm").glob("*_submitted.pkl"))) == 302


SQUEUE = {
    "echo RUNNING": "RUNNING",
    "true": "",
    "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1": "",
    "echo Unable to contact slurm controller >&2; exit 1": "UNKNOWN",
}


@pytest.mark.skipif(sys.platform == "win32", reason="needs sh")
@pytest.mark.parametrize("words", SQUEUE)
def test_what_squeue_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{words}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert on_slurm.state_of("7") == SQUEUE[words]


def test_without_its_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "submitit", sys)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch"), launching("slurm", Path("runs"), None):
        raise AssertionError
    assert not Path("runs").exists()


WHEELS = """
import gymnasium

class Fails(gymnasium.Wrapper):
    count = 0

    def step(self, action):
        self.count += 1
        if self.count == 100:
            raise RuntimeError("a wheel came off")
        return self.env.step(action)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs submitit")
def test_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By submitit's executor for this machine: one run finishes, one fails, as without it."""
    monkeypatch.setattr(on_slurm, "tasks", functools.partial(on_slurm.tasks, cluster="local"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("wheels.py").write_text(WHEELS)
    fails = Overlay(Path("fails.json"), {"wrappers": ["wheels:Fails"]})
    entries = [Entry("fails", "acktr", overlay=fails), Entry("acktr", "acktr")]
    importlib.import_module("wheels")
    said = []
    for engine in ("local", "slurm"):
        plans = make_plans(["CartPole-v1"], entries, (0,), Path(engine), None, SMALL)
        with Interrupts() as interrupts, pytest.raises(RunsFailed) as caught:
            compare(plans, 2, interrupts, "again", "wheels", engine)  # type: ignore[arg-type]
        said.append(str(caught.value).replace(f"{tmp_path}/", "").replace(engine, "RUNS"))
        assert read_table(plans[1].path / "eval.csv").rows
        assert not list(Path(engine).rglob("*.stop"))
    assert said[0] == said[1] and said[0].startswith("1 of 2 runs failed, see RUNS/logs")
    assert "exit code 76" in said[0] and "a wheel came off" in said[0]
