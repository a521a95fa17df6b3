from __future__ import annotations

import io
import math
from pathlib import Path

import pytest

from acktr.compare.grid import Entry, RunPlan, make_plans
from acktr.compare.progress import CompareProgress, Row, RunView, Tally, plain, result
from acktr.runs.folder import RunFolder
from acktr.runs.logger import RunLogger
from acktr.train import Episode, TrainStats
from tests.runs.test_progress import Clock, Terminal


def plan(run_dir: Path, seed: int = 0, env: str = "Hopper-v5") -> RunPlan:
    changes = {"total_timesteps": 1000}
    return make_plans([env], [Entry("acktr", "acktr")], (seed,), run_dir, None, changes)[0]


def write(logger: RunLogger, timesteps: int, *rewards: float) -> None:
    episodes = tuple(Episode(reward, 10, 1.0) for reward in rewards)
    logger.write(TrainStats(timesteps, timesteps // 100, {"train/approx_kl": 0.5}, episodes))


def tally(**changes: float) -> Tally:
    values = {"finished": 2, "failed": 0, "waiting": 5, "total": 8}
    values |= {"timesteps": 2_500, "total_timesteps": 8_000}
    return Tally(**{"speed": 100.0, **values, **changes})  # type: ignore[arg-type]


class TestRunView:
    def test_follows_the_file(self, tmp_path: Path) -> None:
        run = plan(tmp_path)
        view = RunView(run, 0, now=0.0)
        first = view.read(1.0)
        assert (first.timesteps, first.mean_return, first.speed) == (0, None, 0.0)
        with RunLogger(RunFolder.create(run.path), "Hopper-v5") as logger:
            write(logger, 100)
            assert view.read(2.0) == Row(run, 100, None, 50.0)
            write(logger, 300, 1.0, 4.0)
            assert view.read(4.0) == Row(run, 300, 2.5, 75.0)
        progress = run.path / "progress.csv"
        with progress.open("a") as file:
            file.write("400,4,")  # as the writer is killed
        assert view.read(6.0) == Row(run, 300, 2.5, 50.0)
        progress.write_text("garbage")
        assert view.read(10.0) == Row(run, 300, 2.5, 30.0)

    def test_after_a_resume_only_new_steps_count_for_the_speed(self, tmp_path: Path) -> None:
        run = plan(tmp_path)
        with RunLogger(RunFolder.create(run.path), "Hopper-v5") as logger:
            write(logger, 500, 7.0)
            view = RunView(run, 500, now=100.0)
            assert view.read(101.0) == Row(run, 500, 7.0, 0.0)
            write(logger, 600)
            assert view.read(102.0) == Row(run, 600, 7.0, 50.0)

    def test_the_last_update_may_overshoot(self, tmp_path: Path) -> None:
        run = plan(tmp_path)
        with RunLogger(RunFolder.create(run.path), "Hopper-v5") as logger:
            write(logger, 1024, 7.0)
        assert RunView(run, 0, 0.0).read(1.0).timesteps == 1000

    @pytest.mark.parametrize("steps", ["nan", "inf", "-5", "x"])
    def test_numbers_that_are_none(self, steps: str, tmp_path: Path) -> None:
        run = plan(tmp_path)
        RunFolder.create(run.path).progress.write_text(f"timesteps\n{steps}\n")
        assert RunView(run, 20, 0.0).read(1.0).timesteps == 20


class TestPlain:
    def test_line(self, tmp_path: Path) -> None:
        rows = [Row(plan(tmp_path), 500, 12.34, 50.0), Row(plan(tmp_path, 1), 0, None, math.nan)]
        assert plain(rows, tally()) == (
            "runs 2/8 done  waiting 5  steps 2,500/8,000 (31.2%)  steps/s 100  ETA 0:00:55  "
            "running Hopper-v5 acktr seed 0 50% return 12.3, Hopper-v5 acktr seed 1 0% return -"
        )

    def test_nothing_is_known(self) -> None:
        found = plain([], tally(speed=math.nan, failed=3, timesteps=0, total_timesteps=0))
        assert found == (
            "runs 2/8 done  waiting 5  failed 3  steps 0/0 (0.0%)  steps/s -  ETA -  running -"
        )

    @pytest.mark.parametrize("speed", [0.0, -3.0])
    def test_no_steps_were_made(self, speed: float) -> None:
        assert "steps/s -  ETA -" in plain([], tally(speed=speed))

    def test_one_line_per_interval(self) -> None:
        clock, stream = Clock(), io.StringIO()
        with CompareProgress(interval=60.0, stream=stream, clock=clock) as progress:
            progress.note("8 runs")
            for _ in range(481):
                clock.now += 0.25
                progress.update([], tally())
            progress.update([], tally(), last=True)
        lines = stream.getvalue().splitlines()
        assert lines[0] == "8 runs"
        assert lines[1:] == [plain([], tally())] * 2


class TestPanel:
    def test_table(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "100")
        clock, stream = Clock(), Terminal()
        rows = [
            Row(plan(tmp_path), 500, 12.34, 50.0),
            Row(plan(tmp_path, 3, "Ant-v5"), 0, None, math.nan),
        ]
        with CompareProgress(stream=stream, clock=clock) as progress:
            clock.now += 1.0
            progress.update(rows, tally(failed=1))
            progress.note("1/8 done: [x]")
            progress.update([], tally(finished=7), last=True)
        output = stream.getvalue()
        assert "1/8 done: [x]" in output
        frames = [frame.split("╯")[0].splitlines() for frame in output.split("╭")[1:]]
        cells = [line.replace("│", "").split() for line in frames[0]]
        steps = ["500/1,000", "(50.0%)"]
        assert ["Hopper-v5", "acktr", "0", *steps, "12.3", "50", "0:00:10"] in cells
        assert ["Ant-v5", "acktr", "3", "0/1,000", "(0.0%)", "-", "-", "-"] in cells
        assert "failed 1" in "".join(frames[0])
        last = "".join(frames[-1])
        assert "runs 7/8 done" in last and "Hopper" not in last

    def test_broken_stream_stops_nothing(self) -> None:
        stream = io.StringIO()
        progress = CompareProgress(interval=0.0, stream=stream)
        stream.close()
        progress.note("x")
        progress.update([], tally())


def test_result(tmp_path: Path) -> None:
    run = plan(tmp_path)
    assert result(run) == "Hopper-v5 acktr seed 0, return -, evaluation -"
    with RunLogger(RunFolder.create(run.path), "Hopper-v5") as logger:
        write(logger, 100, 1234.56, 1235.56)
        logger.write_evaluation(100, [1.0, 2.0], [3, 3])
    assert result(run) == "Hopper-v5 acktr seed 0, return 1,235.1, evaluation 1.5"
