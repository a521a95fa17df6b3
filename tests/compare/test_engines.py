"""Runs on other machines: what is handed out, what comes back, and what begins again."""

from __future__ import annotations

import importlib
import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from acktr.compare import engines, orders
from acktr.compare.engines import RemoteChild, ordered
from acktr.compare.entries import Entry
from acktr.compare.grid import RunPlan, make_plans
from acktr.compare.orders import LOST, Order, attend, attend_job
from acktr.compare.status import State, Status
from acktr.runs.checkpoint import load_checkpoint
from acktr.runs.folder import RunError, RunFolder, locked
from acktr.runs.tables import read_table
from tests.tools.command_line import call, tree

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"total_timesteps": 256, "num_envs": 2, "device": "cpu", "eval_episodes": 2}


@pytest.fixture
def plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RunPlan]:
    monkeypatch.chdir(tmp_path)
    grid = {**SMALL, "eval_freq": 256}
    return make_plans(
        ["CartPole-v1"], [Entry("acktr", "acktr")], range(2), Path("runs"), None, grid
    )


class FakeTask:
    def __init__(self, order: Order) -> None:
        self.order = order
        self.found: tuple[int, str] | None = None
        self.cancelled = False

    def ended(self) -> tuple[int, str] | None:
        return self.found

    def cancel(self) -> None:
        self.cancelled = True


class Elsewhere:
    """A machine far away, and what is found of the run."""

    def __init__(self, plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tasks: list[FakeTask] = []
        self.there: Status | RunError = Status(State.NEW)
        self.now = 0.0
        monkeypatch.setattr(engines, "status", self.status)
        self.child = RemoteChild(plan, False, self.begin, clock=lambda: self.now)

    def begin(self, order: Order) -> FakeTask:
        assert not order.stop.exists()
        self.tasks.append(FakeTask(order))
        return self.tasks[-1]

    def status(self, plan: RunPlan) -> Status:
        if isinstance(self.there, RunError):
            raise self.there
        return self.there

    def ends(self, code: int, there: Status | RunError, line: str = "") -> int | None:
        self.there, self.tasks[-1].found = there, (code, line)
        return self.child.poll()


@pytest.fixture
def elsewhere(plans: list[RunPlan], monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    return Elsewhere(plans[0], monkeypatch)


def on_its_way(steps: int) -> Status:
    return Status(State.UNFINISHED if steps else State.NEW, steps)


class TestRemoteChild:
    @pytest.mark.parametrize("code", [0, 70, -9])
    def test_ends_as_its_process_does(self, elsewhere: Elsewhere, code: int) -> None:
        assert elsewhere.child.poll() is None
        assert elsewhere.ends(code, on_its_way(100), "so it was") == code
        assert elsewhere.child.last_line() == "so it was" and len(elsewhere.tasks) == 1

    @pytest.mark.parametrize("code", [LOST, 75])
    def test_begins_again_as_long_as_it_moves_on(self, elsewhere: Elsewhere, code: int) -> None:
        """From its checkpoint; without a newer one three starts are enough."""
        assert "--seed" in elsewhere.tasks[0].order.args
        for steps in (100, 200, 300, 400):
            assert elsewhere.ends(code, on_its_way(steps)) is None
        assert len(elsewhere.tasks) == 5
        assert all("--resume" in task.order.args for task in elsewhere.tasks[1:])
        assert elsewhere.ends(code, on_its_way(400)) is None
        assert elsewhere.ends(code, on_its_way(400)) is None
        assert elsewhere.ends(code, on_its_way(400), "gone") == code
        assert elsewhere.child.last_line() == "gone"

    def test_waits_for_a_process_that_is_left(self, elsewhere: Elsewhere) -> None:
        trained = RunError("another process trains it")
        assert elsewhere.ends(LOST, trained) is None and len(elsewhere.tasks) == 1
        elsewhere.there = on_its_way(0)
        assert elsewhere.child.poll() is None and len(elsewhere.tasks) == 2
        assert elsewhere.ends(LOST, trained) is None
        elsewhere.now += 301
        assert elsewhere.child.poll() == LOST and "trains it" in elsewhere.child.last_line()

    def test_what_was_finished_is_done(self, elsewhere: Elsewhere) -> None:
        assert elsewhere.ends(LOST, Status(State.FINISHED, 256)) == 0

    def test_what_cannot_go_on_says_why(self, elsewhere: Elsewhere) -> None:
        assert elsewhere.ends(LOST, Status(State.STUCK, reason="no checkpoint")) == LOST
        assert elsewhere.child.last_line() == "no checkpoint"

    @pytest.mark.parametrize("end", ["terminate", "kill"])
    def test_stops(self, elsewhere: Elsewhere, end: str) -> None:
        getattr(elsewhere.child, end)()
        (task,) = elsewhere.tasks
        assert task.cancelled and task.order.stop.exists()
        assert elsewhere.ends(75, on_its_way(100)) == 75 and not task.order.stop.exists()

    def test_stops_between_two_machines(self, elsewhere: Elsewhere) -> None:
        assert elsewhere.ends(75, RunError("another process trains it")) is None
        elsewhere.child.terminate()
        assert elsewhere.child.poll() == 75


# --- the other machine ----------------------------------------------------------------------------


class Process:
    """In place of a process: it runs until it is told to end."""

    made: list[Process]

    def __init__(self, args: Any, log: Path, **more: Any) -> None:
        self.told = 0
        self.made.append(self)

    def poll(self) -> int | None:
        return 75 if self.told else None

    def terminate(self) -> None:
        self.told += 1

    def last_line(self) -> str:
        return f"told {self.told} times"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Process]:
    Process.made = []
    monkeypatch.setattr(orders, "ChildProcess", Process)
    return Process.made


@pytest.fixture
def order(tmp_path: Path) -> Order:
    return Order(("train",), tmp_path / "some.log", tmp_path, tmp_path / "some.stop", 0)


def after(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    monkeypatch.setattr(orders.time, "sleep", lambda seconds: action())


def test_an_order_is_stopped_by_its_file(
    order: Order, made: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    after(monkeypatch, order.stop.touch)
    assert attend(order) == (75, "told 1 times")
    assert attend(order) == (-signal.SIGTERM, "stopped before it began") and len(made) == 1


def test_an_order_is_stopped_by_an_interrupt(
    order: Order, made: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    after(monkeypatch, interrupt)
    assert attend(order) == (75, "told 1 times")


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.usefixtures("made", "handlers")
def test_a_job_is_stopped_by_its_scheduler(
    order: Order, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    after(monkeypatch, lambda: signal.raise_signal(number))
    assert attend_job(order) == (75, "told 1 times")


def test_orders_are_the_same_from_everywhere(plans: list[RunPlan]) -> None:
    there = ordered(plans[1], False, None)
    assert str(Path.cwd() / "runs") in there.args and there.folder == Path.cwd()
    assert there.log.is_absolute() and there.stop.parent == there.log.parent and there.gpus == 0


# --- what is missing ------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_without_its_package(
    engine: Any,
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = call(capsys, "compare", "--envs", "CartPole-v1", "--engine", engine)
    assert (code, out, tree(tmp_path)) == (2, "", {})
    assert err.count("\n") == 1 and f'pip install "acktr[{engine}]"' in err


# --- the engines themselves, where they are -------------------------------------------------------


def found(name: str) -> Any:
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"needs {name}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two machines of one processor, both of them here."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        patch.setenv("RAY_ADDRESS", made.address)
        try:
            yield made
        finally:
            made.shutdown()


GRID = (
    *("compare", "--envs", "CartPole-v1", "--algos", "a2c", "--config", "small.json"),
    "--seeds",
)


def comparing(folder: Path, *words: str) -> subprocess.Popen[str]:
    (folder / "small.json").write_text(json.dumps({**SMALL, "checkpoint_freq": 1000}))
    return subprocess.Popen(
        [sys.executable, "-m", "acktr", *GRID, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_checkpoints(process: subprocess.Popen[str], runs: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(list(runs.glob("*/checkpoints/last"))) < count and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@found("ray")
@pytest.mark.timeout(900)
def test_a_cluster_is_told_to_stop(cluster: Any, tmp_path: Path) -> None:
    """The run that trains is saved, the one that waits for a machine never begins."""
    words = ("0-1", "--workers", "2", "--total-timesteps", "1000000", "--engine", "ray")
    process = comparing(tmp_path, *words)
    runs = tmp_path / "runs/CartPole-v1/a2c"
    wait_for_checkpoints(process, runs, 1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "") and "0 of 2 runs finished; continue" in err
    assert [path.name for path in runs.iterdir()] == ["seed0"]
    with locked(RunFolder(runs / "seed0")):  # nobody trains it any more
        assert load_checkpoint(runs / "seed0/checkpoints/last")[0]["timesteps"] > 0


@pytest.mark.slow
@found("ray")
@pytest.mark.timeout(900)
def test_a_cluster_of_which_a_machine_goes(cluster: Any, tmp_path: Path) -> None:
    """Four runs on two machines, one of which is lost midway, are those of this machine."""
    words = ("0-3", "--workers", "4", "--total-timesteps", "8000")
    other = cluster.add_node(num_cpus=1)
    process = comparing(tmp_path, *words, "--engine", "ray")
    runs = tmp_path / "runs/CartPole-v1/a2c"
    wait_for_checkpoints(process, runs, 2)
    cluster.remove_node(other, allow_graceful=False)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0 and out.endswith("done: 4 of 4 runs finished in runs\n"), err
    commands = [(runs / f"seed{seed}/command.txt").read_text() for seed in range(4)]
    assert sum("--resume" in text for text in commands) == 1
    (tmp_path / "runs").rename(tmp_path / "by ray")
    assert comparing(tmp_path, *words).wait(600) == 0
    for seed in range(4):
        place = Path("CartPole-v1/a2c") / f"seed{seed}/monitor.csv"
        mine, theirs = (read_table(tmp_path / name / place).rows for name in ("runs", "by ray"))
        assert [(row["r"], row["l"]) for row in mine] == [(row["r"], row["l"]) for row in theirs]
