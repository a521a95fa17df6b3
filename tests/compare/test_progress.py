from __future__ import annotations

import io
import math
from pathlib import Path

import pytest

from acktr.compare.entries import Entry
from acktr.compare.grid import RunPlan, make_plans
from acktr.compare.progress import Run, result, show
from acktr.compare.status import State
from acktr.runs.folder import RunFolder
from acktr.runs.logger import RunLogger
from acktr.runs.progress import Display, Meter
from acktr.train import Episode, TrainStats
from tests.runs.test_progress import Clock, Terminal


def plan(
    run_dir: Path, seed: int = 0, env: str = "Hopper-v5", total_timesteps: int = 1000
) -> RunPlan:
    changes = {"total_timesteps": total_timesteps}
    return make_plans([env], [Entry("acktr", "acktr")], (seed,), run_dir, None, changes)[0]


def write(logger: RunLogger, timesteps: int, *rewards: float) -> None:
    episodes = tuple(Episode(reward, 10, 1.0) for reward in rewards)
    logger.write(TrainStats(timesteps, timesteps // 100, {"train/approx_kl": 0.5}, episodes))


def training(run_dir: Path, timesteps: int = 0, now: float = 0.0) -> Run:
    return Run(plan(run_dir), State.UNFINISHED, timesteps, meter=Meter(now, timesteps))


def read(run: Run, now: float) -> tuple[int, float | None, str]:
    run.read(now)
    return run.timesteps, run.mean_return, run.pace[0]


class TestRun:
    def test_follows_the_file(self, tmp_path: Path) -> None:
        run = training(tmp_path)
        assert read(run, 1.0) == (0, None, "-")
        with RunLogger(RunFolder.create(run.plan.path), "Hopper-v5") as logger:
            write(logger, 100)
            assert read(run, 2.0) == (100, None, "50")
            write(logger, 300, 1.0, 4.0)
            assert read(run, 4.0) == (300, 2.5, "75")
        progress = run.plan.path / "progress.csv"
        with progress.open("a") as file:
            file.write("400,4,")  # as the writer is killed
        assert read(run, 6.0) == (300, 2.5, "50")
        progress.write_text("garbage")
        assert read(run, 10.0) == (300, 2.5, "30")

    def test_after_a_resume_only_new_steps_count_for_the_speed(self, tmp_path: Path) -> None:
        run = training(tmp_path, 500, now=100.0)
        with RunLogger(RunFolder.create(run.plan.path), "Hopper-v5") as logger:
            write(logger, 500, 7.0)
            assert read(run, 101.0) == (500, 7.0, "-")
            write(logger, 600)
            assert read(run, 102.0) == (600, 7.0, "50")

    def test_the_last_update_may_overshoot(self, tmp_path: Path) -> None:
        run = training(tmp_path)
        with RunLogger(RunFolder.create(run.plan.path), "Hopper-v5") as logger:
            write(logger, 1024, 7.0)
        assert read(run, 1.0)[0] == 1000

    @pytest.mark.parametrize("steps", ["nan", "inf", "-5", "x"])
    def test_numbers_that_are_none(self, steps: str, tmp_path: Path) -> None:
        run = training(tmp_path, 20)
        RunFolder.create(run.plan.path).progress.write_text(f"timesteps\n{steps}\n")
        assert read(run, 1.0)[0] == 20


def grid(run_dir: Path, failed: int = 0) -> list[Run]:
    """Two runs in training, two finished, one that waits half-way, some that failed."""
    first = Run(plan(run_dir), State.NEW, 500, 12.34, Meter(0.0, 450))
    first.meter.add(1.0, 500, {})
    second = Run(plan(run_dir, 3, "Ant-v5"), State.NEW, 0, None, Meter(0.0, 0))
    others = [Run(plan(run_dir, 4 + k), State.FINISHED, 1000) for k in range(2)]
    waits = Run(plan(run_dir, 6), State.UNFINISHED, 400)
    return [first, second, *others, waits, *[Run(plan(run_dir, 7), State.STUCK, 70)] * failed]


class TestLine:
    def line(self, runs: list[Run], training: list[Run], speed: float) -> str:
        stream = io.StringIO()
        show(Display("", 0.0, stream), runs, training, 1, speed)
        return stream.getvalue()

    def test_everything_is_in_it(self, tmp_path: Path) -> None:
        runs = grid(tmp_path)
        assert self.line(runs, runs[:2], 100.0) == (
            "runs 2/5 done  waiting 1  steps 2,900/5,000 (58.0%)  steps/s 100  ETA 0:00:21  "
            "running Hopper-v5 acktr seed 0 50% return 12.3, Ant-v5 acktr seed 3 0% return -\n"
        )

    def test_failed_runs_have_no_steps_left(self, tmp_path: Path) -> None:
        assert self.line(grid(tmp_path, 3), [], 100.0) == (
            "runs 2/8 done  waiting 1  failed 3  steps 2,900/5,000 (58.0%)  steps/s 100"
            "  ETA 0:00:21  running -\n"
        )

    @pytest.mark.parametrize("speed", [0.0, -3.0, math.nan])
    def test_no_steps_were_made(self, speed: float, tmp_path: Path) -> None:
        assert "steps/s -  ETA -" in self.line(grid(tmp_path), [], speed)


def test_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream, runs = Terminal(), grid(tmp_path, 1)
    display = Display("acktr compare", 60.0, stream, Clock())
    show(display, runs, runs[:2], 1, 100.0)
    display.note("1/8 done: [x]")
    for run in runs[:2]:
        run.state = State.FINISHED
    show(display, runs, [], 0, 100.0)
    display.close()
    output = stream.getvalue()
    assert "1/8 done: [x]" in output
    frames = [frame.split("╯")[0].splitlines() for frame in output.split("╭")[1:]]
    cells = [line.replace("│", "").split() for line in frames[0]]
    assert ["Hopper-v5", "acktr", "0", "500", "50%", "12.3", "50", "0:00:10"] in cells
    assert ["Ant-v5", "acktr", "3", "0", "0%", "-", "-", "-"] in cells
    assert "failed 1" in "".join(frames[0])
    last = "".join(frames[-1])
    assert "runs 4/6 done" in last and "Hopper" not in last


def test_a_panel_of_a_million_steps_fits_into_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    meter = Meter(0.0, 0)
    meter.add(80.0, 10**6, {})
    million = plan(tmp_path, 0, "HalfCheetah-v5", 10**6)
    run = Run(million, State.NEW, 10**6, -1234.5, meter)
    display = Display("acktr compare", 60.0, stream, Clock())
    show(display, [run] * 40, [run], 38, 1234.0)
    display.close()
    frame = stream.getvalue().split("╭")[1].split("╯")[0]
    assert len([line for line in frame.splitlines() if "│" in line]) == 5  # no line is broken


def test_result(tmp_path: Path) -> None:
    run = plan(tmp_path)
    assert result(run) == "Hopper-v5 acktr seed 0, return -, evaluation -"
    with RunLogger(RunFolder.create(run.path), "Hopper-v5") as logger:
        write(logger, 100, 1234.56, 1235.56)
        logger.write_evaluation(100, [1.0, 2.0], [3, 3])
    assert result(run) == "Hopper-v5 acktr seed 0, return 1,235.1, evaluation 1.5"
