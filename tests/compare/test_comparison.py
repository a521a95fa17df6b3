from __future__ import annotations

import io
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from acktr.compare import engines
from acktr.compare.comparison import Comparison, RunsFailed, compare
from acktr.compare.entries import Entry
from acktr.compare.grid import RunPlan, make_plans
from acktr.compare.status import State, Status
from acktr.config import to_dict
from acktr.interrupts import Interrupts, Stopped
from acktr.runs.folder import RunError, RunFolder
from acktr.runs.progress import Display
from tests.compare.test_pool import FakeChild
from tests.runs.test_progress import Clock

SMALL = {"total_timesteps": 100, "num_envs": 2, "device": "cpu"}
NEW = Status(State.NEW)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def plans(tmp_path: Path) -> list[RunPlan]:
    return make_plans(["CartPole-v1"], [Entry("acktr", "acktr")], range(4), tmp_path, None, SMALL)


def finish(plan: RunPlan, steps: int = 100) -> None:
    """What a finished run leaves, as far as it is read."""
    folder = RunFolder(plan.path)
    shutil.rmtree(plan.path, ignore_errors=True)
    RunFolder.create(plan.path).write_config(to_dict(plan.config))
    folder.progress.write_text(f"timesteps,rollout/ep_rew_mean\n{steps},7.25\n")
    folder.evaluations.write_text(f"timesteps,mean_reward\n{steps},8.5\n")


class Script:
    """Children that end at given times of a clock which ``sleep`` moves on."""

    def __init__(self, plans: list[RunPlan], **seeds: Callable[[FakeChild, RunPlan], None]) -> None:
        self.clock = Clock()
        self.stream = io.StringIO()
        self.children: dict[int, FakeChild] = {}
        self.started: list[tuple[int, bool]] = []
        self._plans = {plan.config.seed: plan for plan in plans}
        self._do = {int(name.lstrip("s")): action for name, action in seeds.items()}
        self.on_sleep: Callable[[], None] = lambda: None
        self.interval = 0.0

    def launch(self, plan: RunPlan, resume: bool) -> FakeChild:
        self.started.append((plan.config.seed, resume))
        child = self.children[plan.config.seed] = FakeChild()
        return child

    def sleep(self, seconds: float) -> None:
        self.clock.now += seconds
        self.on_sleep()
        for seed, child in self.children.items():
            if child.code is None:
                self._do.get(seed, succeed)(child, self._plans[seed])

    def comparison(
        self, plans: list[RunPlan], statuses: list[Status], workers: int = 2
    ) -> Comparison:
        display = Display("acktr compare", self.interval, self.stream, self.clock)
        return Comparison(
            plans, statuses, workers, self.launch, display, clock=self.clock, sleep=self.sleep
        )

    @property
    def notes(self) -> list[str]:
        lines = self.stream.getvalue().splitlines()
        return [line for line in lines if not line.startswith("runs ")]


def succeed(child: FakeChild, plan: RunPlan) -> None:
    finish(plan)
    child.code = 0


def ends(code: int) -> Callable[[FakeChild, RunPlan], None]:
    def action(child: FakeChild, plan: RunPlan) -> None:
        child.code = code

    return action


def waits_for_a_signal(child: FakeChild, plan: RunPlan) -> None:
    if "terminate" in child.calls:
        child.code = 75


def never(child: FakeChild, plan: RunPlan) -> None:
    pass


class TestComparison:
    def test_all_succeed(self, plans: list[RunPlan]) -> None:
        script = Script(plans)
        statuses = [Status(State.FINISHED, 100), Status(State.UNFINISHED, 40), NEW, NEW]
        comparison = script.comparison(plans, statuses)
        comparison.run(Interrupts())
        assert script.started == [(1, True), (2, False), (3, False)]
        assert (comparison.finished, comparison.failures) == (4, [])
        assert script.notes == [
            f"{n}/4 done: CartPole-v1 acktr seed {n - 1}, return 7.25, evaluation 8.5"
            for n in (2, 3, 4)
        ]

    def test_failures_do_not_stop_the_others(self, plans: list[RunPlan]) -> None:
        script = Script(plans, s0=ends(70), s1=ends(-9), s2=ends(0))
        stuck = Status(State.STUCK, reason="PATH has no checkpoint; delete it")
        more = make_plans(
            ["CartPole-v1"], [Entry("x", "acktr")], (4,), plans[0].run_dir, None, SMALL
        )
        comparison = script.comparison([*plans, *more], [NEW, NEW, NEW, NEW, stuck])
        comparison.run(Interrupts())
        assert comparison.finished == 1
        assert comparison.failures == [
            "CartPole-v1 x seed 4: PATH has no checkpoint; delete it",
            "CartPole-v1 acktr seed 0: exit code 70: code 70",
            "CartPole-v1 acktr seed 1: killed by SIGKILL: code -9",
            "CartPole-v1 acktr seed 2: ended without its final evaluation: code 0",
        ]
        assert [line for line in script.notes if line.startswith("failed")] == [
            f"failed: {line}" for line in comparison.failures
        ]

    def test_tally(self, plans: list[RunPlan]) -> None:
        def half(child: FakeChild, plan: RunPlan) -> None:
            if plan.path.exists():
                succeed(child, plan)
            else:
                finish(plan, 50)

        script = Script(plans, s2=ends(2), s3=half)
        statuses = [Status(State.FINISHED, 100), Status(State.UNFINISHED, 40), NEW, NEW]
        script.comparison(plans, statuses, workers=1).run(Interrupts())
        lines = [line for line in script.stream.getvalue().splitlines() if line[:5] == "runs "]
        parts = [line.split("  ") for line in lines]
        assert [part[:-3] for part in parts] == [
            ["runs 1/4 done", "waiting 2", "steps 140/400 (35.0%)"],
            ["runs 2/4 done", "waiting 1", "steps 200/400 (50.0%)"],
            ["runs 2/4 done", "waiting 0", "failed 1", "steps 200/300 (66.7%)"],
            ["runs 2/4 done", "waiting 0", "failed 1", "steps 250/300 (83.3%)"],
            ["runs 3/4 done", "waiting 0", "failed 1", "steps 300/300 (100.0%)"],
        ]
        assert parts[3][-3:-1] == ["steps/s 147", "ETA 0:00:00"]  # 60 + 50 steps in three polls

    def test_one_line_per_interval_and_none_at_once(self, plans: list[RunPlan]) -> None:
        script = Script(plans, s0=never)

        def on_sleep() -> None:
            if script.clock.now >= 101.9:
                script.children[0].code = 0

        script.on_sleep = on_sleep
        script.interval = 0.75
        script.comparison(plans[:1], [NEW]).run(Interrupts())
        lines = [line for line in script.stream.getvalue().splitlines() if line[:5] == "runs "]
        assert len(lines) == 2  # within two seconds

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_first_signal_waits_for_the_runs(
        self, number: signal.Signals, plans: list[RunPlan]
    ) -> None:
        script = Script(plans, s0=waits_for_a_signal, s1=never)
        finish(plans[0], 30)

        def on_sleep() -> None:
            if script.clock.now == 101.0:
                signal.raise_signal(number)
            if script.clock.now == 103.0:
                script.children[1].code = 70

        script.on_sleep = on_sleep
        comparison = script.comparison(plans, [NEW] * 4)
        with Interrupts() as interrupts, pytest.raises(Stopped) as stop:
            comparison.run(interrupts)
        assert stop.value.signum == number
        assert script.clock.now == 103.0
        assert [seed for seed, _ in script.started] == [0, 1]
        assert all(child.calls == ["terminate"] for child in script.children.values())
        assert script.notes == [
            "stopping what runs (2); a second signal kills it",
            "failed: CartPole-v1 acktr seed 1: exit code 70: code 70",
        ]
        assert "waiting 2  failed 1  steps 30/300" in script.stream.getvalue().splitlines()[-1]

    def test_second_signal_kills(self, plans: list[RunPlan]) -> None:
        script = Script(plans, s0=never, s1=never)

        def on_sleep() -> None:
            if script.clock.now in (101.0, 102.0):
                signal.raise_signal(signal.SIGINT)

        script.on_sleep = on_sleep
        with Interrupts(script.clock) as interrupts, pytest.raises(Stopped):
            script.comparison(plans, [NEW] * 4).run(interrupts)
        assert script.clock.now == 102.0
        calls = ["terminate", "kill"]
        assert [child.calls for child in script.children.values()] == [calls, calls]


class TestCompare:
    @pytest.fixture
    def script(self, plans: list[RunPlan], monkeypatch: pytest.MonkeyPatch) -> Script:
        script = Script(plans)
        arguments: list[list[str]] = []

        def launch(args: list[str], log: Path) -> FakeChild:
            arguments.append(args)
            plan = next(plan for plan in plans if plan.log == log)
            return script.launch(plan, "--resume" in args)

        monkeypatch.setattr(engines, "ChildProcess", launch)
        defaults = Comparison.__init__.__kwdefaults__
        monkeypatch.setitem(defaults, "sleep", script.sleep)
        return script

    def test_finished_runs_are_left_alone(
        self, script: Script, plans: list[RunPlan], capsys: pytest.CaptureFixture[str]
    ) -> None:
        for plan in plans:
            finish(plan)
        found = compare(plans, 2, Interrupts(), "acktr compare ...")
        assert found == f"done: 4 of 4 runs finished in {plans[0].run_dir}"
        assert script.started == []
        assert not (plans[0].run_dir / "logs").exists()
        assert capsys.readouterr().err.splitlines() == ["runs: 4 finished; 2 at a time"]

    def test_half_made_folders_do_not_block_the_others(
        self, script: Script, plans: list[RunPlan]
    ) -> None:
        RunFolder.create(plans[1].path).curve.touch()
        RunFolder.create(plans[2].path)  # whose start was killed
        with pytest.raises(RunsFailed) as failed:
            compare(plans, 2, Interrupts(), "")
        assert str(failed.value) == (
            f"1 of 4 runs failed, see {plans[0].run_dir / 'logs'}; the last: CartPole-v1 acktr"
            f" seed 1: {plans[1].path} holds no run; delete it and start again"
        )
        assert [seed for seed, _ in script.started] == [0, 2, 3]

    def test_failures_are_listed_at_the_end(
        self, script: Script, plans: list[RunPlan], capsys: pytest.CaptureFixture[str]
    ) -> None:
        script._do.update({0: ends(70), 3: ends(2)})
        with pytest.raises(RunsFailed, match=r"2 of 4 runs failed.*seed 3: exit code 2: code 2"):
            compare(plans, 1, Interrupts(), "")
        assert capsys.readouterr().err.splitlines()[-2:] == [
            "failed: CartPole-v1 acktr seed 0: exit code 70: code 70",
            "failed: CartPole-v1 acktr seed 3: exit code 2: code 2",
        ]

    def test_stop_says_how_to_go_on(self, script: Script, plans: list[RunPlan]) -> None:
        script._do.update({1: waits_for_a_signal})
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
        script.on_sleep = lambda: (
            signal.raise_signal(signal.SIGHUP) if 1 in script.children else None
        )
        try:
            with Interrupts() as interrupts, pytest.raises(Stopped) as stop:
                compare(plans, 1, interrupts, "acktr compare --envs X")
        finally:
            signal.signal(signal.SIGHUP, before)
        assert stop.value.signum == signal.SIGHUP
        assert stop.value.note == (
            "stopped by SIGHUP, 1 of 4 runs finished; continue with: acktr compare --envs X"
        )

    def test_folder_that_cannot_be_made(
        self, script: Script, plans: list[RunPlan], tmp_path: Path
    ) -> None:
        (tmp_path / "logs").touch()
        with pytest.raises(RunError, match="cannot create the folder: File exists"):
            compare(plans, 1, Interrupts(), "")
        assert script.started == []
