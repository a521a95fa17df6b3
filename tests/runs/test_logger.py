from __future__ import annotations

import csv
import dataclasses
import errno
import json
import logging
import math
import os
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from acktr.runs import events
from acktr.runs.folder import RunError, RunFolder
from acktr.runs.logger import RunLogger
from acktr.runs.tables import read_table
from acktr.train import Episode, TrainStats


def update(k: int, episodes: int = 1, metrics: dict[str, float] | None = None) -> TrainStats:
    """Update k of 10 steps; its episodes have returns k + 0.1 i and lengths k + i."""
    ended = tuple(Episode(k + 0.1 * i, k + i, 0.5 * k) for i in range(episodes))
    return TrainStats(10 * k, k, {"train/approx_kl": 0.001 * k, **(metrics or {})}, ended)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        if not path.name.startswith("monitor"):
            return list(csv.DictReader(file))
        assert file.readline().startswith("#{")
        return list(csv.DictReader(file))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            found[tag].append((event.step, event.value))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


def full(*_: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


class TestRunLogger:
    def test_monitor_is_what_other_tools_read(self, folder: RunFolder) -> None:
        with RunLogger(folder, "CartPole-v1") as logger:
            logger.write(update(1, episodes=2))
            logger.write(update(2, episodes=0))
            logger.write(TrainStats(30, 3, {}, (Episode(1 / 3, 7, 2.00000049),)))
        lines = folder.monitor.read_text().splitlines()
        header = json.loads(lines[0][1:])
        assert header["env_id"] == "CartPole-v1" and header["t_start"] > 1.7e9
        assert lines[1:] == [
            "r,l,t,step",
            "1.0,1,0.5,10",
            "1.1,2,0.5,10",
            "0.333333,7,2.0,30",
        ]

    def test_progress(self, folder: RunFolder) -> None:
        with RunLogger(folder, "X") as logger:
            logger.write(update(1, episodes=0))
            logger.write(update(2, episodes=2, metrics={"kfac/min_eig": 0.5}))
            logger.write(update(3, episodes=1, metrics={"a,b": float("nan")}))
        columns = "timesteps,updates,a,b,kfac/min_eig,rollout/ep_len_mean,rollout/ep_rew_mean"
        lines = folder.progress.read_text().splitlines()
        assert lines[0] == columns.replace("a,b", '"a,b"') + ",train/approx_kl"
        assert lines[1:] == [
            "10,1,,,,,0.001",
            "20,2,,0.5,2.5,2.05,0.002",
            f"30,3,nan,,{8 / 3:.9g},{7.1 / 3:.9g},0.003",
        ]

    def test_window_of_100_episodes(self, folder: RunFolder) -> None:
        rng = np.random.default_rng(0)
        returns, lengths = rng.normal(size=250).round(6), rng.integers(1, 99, 250)
        with RunLogger(folder, "X") as logger:
            assert set(logger.window.means.values()) == {None}
            for k in range(250):
                episode = Episode(float(returns[k]), int(lengths[k]), 0.0)
                logger.write(TrainStats(k, k, {}, (episode,)))
                window = slice(max(0, k - 99), k + 1)
                assert logger.ep_rew_mean == pytest.approx(returns[window].mean(), abs=1e-12)
                assert logger.window.means["rollout/ep_len_mean"] == pytest.approx(
                    lengths[window].mean(), abs=1e-12
                )
        assert float(rows(folder.progress)[-1]["rollout/ep_rew_mean"]) == pytest.approx(
            returns[150:].mean(), rel=1e-8
        )

    def test_tensorboard(self, folder: RunFolder) -> None:
        with RunLogger(folder, "X") as logger:
            for k in range(1, 4):
                logger.write(update(k))
            logger.write_evaluation(30, [1.0, 3.0], [10, 30])
        found = scalars(folder.path)
        assert [step for step, _ in found["train/approx_kl"]] == [10, 20, 30]
        assert found["rollout/ep_rew_mean"] == [(10, 1.0), (20, 1.5), (30, 2.0)]
        assert found["rollout/ep_len_mean"] == [(10, 1.0), (20, 1.5), (30, 2.0)]
        assert found["eval/mean_reward"] == [(30, 2.0)]
        assert found["eval/mean_ep_length"] == [(30, 20.0)]

    def test_tensorboard_gets_fewer_points_as_a_run_grows(self, folder: RunFolder) -> None:
        rare = {300: {"late": 1.0}, 301: {"late": 1.0}, 613: {"late": 2.0}}
        with RunLogger(folder, "X") as logger:
            for k in range(1, 700):
                logger.write(update(k, episodes=0, metrics=rare.get(k, {})))
        found = scalars(folder.path)
        every = [*range(1, 257), *range(258, 513, 2), *range(516, 700, 4)]
        assert [step for step, _ in found["train/approx_kl"]] == [10 * k for k in every]
        assert found["late"] == [(3000, 1.0), (6130, 2.0)]

    def test_evaluation(self, folder: RunFolder) -> None:
        with RunLogger(folder, "X") as logger:
            logger.write_evaluation(100, [1.0, 2.0, 6.0], [3, 4, 5])
        std = np.std([1.0, 2.0, 6.0])
        assert folder.evaluations.read_text().splitlines() == [
            "timesteps,mean_reward,std_reward,mean_length,episodes,returns",
            f"100,3,{std:.9g},4,3,1.0;2.0;6.0",
        ]

    def test_resume_equals_an_uninterrupted_run(self, tmp_path: Path) -> None:
        straight, split = (RunFolder.create(tmp_path / name) for name in ("straight", "split"))
        with RunLogger(straight, "X") as logger:
            for k in range(1, 161):
                logger.write(update(k))
                if k % 40 == 0:
                    logger.write_evaluation(10 * k, [k], [k])
        with RunLogger(split, "X") as logger:
            for k in range(1, 131):
                logger.write(update(k, metrics={"late": 1.0} if k > 105 else {}))
                if k % 40 == 0:
                    logger.write_evaluation(10 * k, [k], [k])
        for path in (split.monitor, split.progress):  # killed while writing a row
            with path.open("a") as file:
                file.write("13")
        first = split.monitor.read_text().splitlines()[0]
        with RunLogger(split, "X", resume_timesteps=1100) as logger:
            assert logger.ep_rew_mean == pytest.approx(np.mean(range(11, 111)))
            for k in range(111, 161):
                logger.write(update(k))
                if k % 40 == 0:
                    logger.write_evaluation(10 * k, [k], [k])
        assert split.monitor.read_text().splitlines()[0] == first
        assert rows(split.monitor) == rows(straight.monitor)
        assert split.evaluations.read_text() == straight.evaluations.read_text()
        resumed = rows(split.progress)
        assert [row.pop("late") for row in resumed] == [""] * 105 + ["1"] * 5 + [""] * 50
        assert resumed == rows(straight.progress)
        assert scalars(split.path)["train/approx_kl"] == scalars(straight.path)["train/approx_kl"]

    def test_resume_before_the_first_row(self, folder: RunFolder) -> None:
        with RunLogger(folder, "X", resume_timesteps=0) as logger:
            logger.write(update(1))
        with RunLogger(folder, "X", resume_timesteps=0) as logger:
            assert logger.ep_rew_mean is None
            logger.write(update(2))
        assert [row["step"] for row in rows(folder.monitor)] == ["20"]

    def test_never_mixes_two_runs(self, folder: RunFolder) -> None:
        with RunLogger(folder, "X") as logger:
            logger.write(update(1))
        before = folder.monitor.read_bytes()
        with pytest.raises(RunError, match=r"monitor\.csv: exists already"):
            RunLogger(folder, "X")
        assert folder.monitor.read_bytes() == before

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            (b"\xff\n", "not a CSV file"),
            (b"#{}\n", "no header line"),
            (b"#{}\na,b\n1,2\n", "columns must start with r,l,t,step"),
            (b"#{}\nr,l,t,step\n1,2,3,x\n", "column step"),
            (b"#{}\nr,l,t,step\nx,2,1,3\n", "could not convert"),
            (b"#{}\nr,l,t,step\n1,2,3\n", "row '1,2,3' has 3 fields, not 4"),
        ],
    )
    def test_foreign_monitor(self, folder: RunFolder, content: bytes, why: str) -> None:
        folder.monitor.write_bytes(content)
        with pytest.raises(RunError, match=why) as caught:
            RunLogger(folder, "X", resume_timesteps=100)
        assert "\n" not in str(caught.value) and "monitor.csv" in str(caught.value)

    def test_a_full_disk_delays_rows_and_events(
        self, folder: RunFolder, caplog: pytest.LogCaptureFixture
    ) -> None:
        real = os.write

        def some(handle: int, data: bytes) -> int:
            """Room for three more bytes."""
            if len(data) > 3:
                return real(handle, data[:3])
            return full()

        with RunLogger(folder, "X") as logger, pytest.MonkeyPatch.context() as patch:
            logger.write(update(1))
            logger.flush()
            patch.setattr(os, "write", some)
            with caplog.at_level(logging.WARNING):
                for k in (2, 3):
                    logger.write(update(k))
                    logger.flush()
            partial = [row["step"] for row in rows(folder.monitor)]
            assert partial == ["10"] and folder.monitor.read_bytes().endswith(b"\n")
            assert [step for step, _ in scalars(folder.path)["train/approx_kl"]] == [10]
            patch.undo()
            logger.write(update(4, metrics={"late": 1.0}))
            assert logger.ep_rew_mean == 2.5
        told = [r.getMessage() for r in caplog.records]
        assert len(told) == 3 and all("later: No space left on device" in line for line in told)
        assert [row["step"] for row in rows(folder.monitor)] == ["10", "20", "30", "40"]
        assert [row["timesteps"] for row in rows(folder.progress)] == ["10", "20", "30", "40"]
        assert [row["late"] for row in rows(folder.progress)] == ["", "", "", "1"]
        assert [step for step, _ in scalars(folder.path)["train/approx_kl"]] == [10, 20, 30, 40]
        assert len(list(folder.path.glob("events.*"))) == 1

    def test_a_disk_that_stays_full_loses_the_oldest_rows_and_says_so(
        self, folder: RunFolder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tables = import_module("acktr.runs.tables")
        monkeypatch.setattr(tables, "MOST_WAITING", 10)
        monkeypatch.setattr(import_module("acktr.runs.events"), "_MOST_BYTES", 1000)
        with RunLogger(folder, "X") as logger, pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "write", full)
            for k in range(1, 40):
                logger.write(update(k))
            assert len(logger._progress._waiting) <= 10
            assert sum(map(len, logger._events._waiting)) <= 1000
            patch.undo()
        steps = [int(row["timesteps"]) for row in rows(folder.progress)]
        assert steps == list(range(steps[0], 400, 10)) and 1 < len(steps) <= 10
        lost = [r.getMessage() for r in caplog.records if "rows are lost" in r.getMessage()]
        counted = [int(line.split(", ")[1].split()[0]) for line in lost if "progress" in line]
        assert sum(counted) == 39 - len(steps)
        shown = [step for step, _ in scalars(folder.path)["train/approx_kl"]]
        assert shown == list(range(shown[0], 400, 10)) and 1 < len(shown) < 39

    def test_a_file_that_is_deleted_begins_again(self, folder: RunFolder) -> None:
        with RunLogger(folder, "X") as logger:
            logger.write(update(1))
            logger.flush()
            for path in (folder.progress, *folder.path.glob("events.*")):
                path.unlink()
            logger.write(update(2))
            logger.write(update(3))
        assert [row["timesteps"] for row in rows(folder.progress)] == ["20", "30"]
        assert [step for step, _ in scalars(folder.path)["train/approx_kl"]] == [20, 30]

    def test_close_twice(self, folder: RunFolder) -> None:
        logger = RunLogger(folder, "X")
        logger.write(update(1))
        logger.close()
        logger.close()


def test_recorded_infos_are_columns_and_means(folder: RunFolder) -> None:
    def stats(k: int, ratio: float) -> TrainStats:
        return TrainStats(10 * k, k, {}, (Episode(1.0, 2, 0.5, {"ratio": ratio}),))

    with RunLogger(folder, "X-v0") as logger:
        logger.write(stats(1, 0.5))
        logger.write(stats(2, math.nan))
        logger.write_evaluation(20, [1.0], [2], {"ratio": 0.25, "other": math.nan})
    with RunLogger(folder, "X-v0", 20) as logger:
        logger.write(stats(3, 0.7))
        assert logger.window.means["rollout/ratio_mean"] == pytest.approx(0.6)
    assert [row["ratio"] for row in rows(folder.monitor)] == ["0.5", "", "0.7"]
    means = [row["rollout/ratio_mean"] for row in rows(folder.progress)]
    assert means == ["0.5", "0.5", "0.6"]
    assert rows(folder.evaluations)[0]["mean_ratio"] == "0.25"
    assert scalars(folder.path)["rollout/ratio_mean"][-1] == (30, pytest.approx(0.6))
    assert scalars(folder.path)["eval/mean_ratio"] == [(20, 0.25)]


def test_a_folder_that_is_moved_is_noticed(folder: RunFolder) -> None:
    with RunLogger(folder, "X-v0") as logger:
        logger.require_folder()
        moved = folder.path.rename(folder.path.with_name("moved"))
        with pytest.raises(RunError, match=r"the run folder was moved or deleted during training"):
            logger.require_folder()
        folder.path.mkdir()  # another one of the same name
        with pytest.raises(RunError, match="moved or deleted"):
            logger.require_folder()
        folder.path.rmdir()
        moved.rename(folder.path)
        logger.require_folder()


def test_progress_thins_out_after_many_updates(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of the first 8 updates, every 2nd up to 16, every 4th up to 32, and rare ones."""
    monkeypatch.setattr(import_module("acktr.runs.logger"), "DENSE", 8)
    with RunLogger(folder, "X") as logger:
        for k in range(1, 41):
            logger.write(update(k, episodes=0, metrics={"rare": 1.0} if k == 27 else {}))
        assert [logger.missing_updates(n) for n in (0, 1, 9, 31, 40)] == [0, 1, 8, 28, 40]
    kept = [int(row["updates"]) for row in rows(folder.progress)]
    assert kept == [*range(1, 9), 10, 12, 14, 16, 20, 24, 27, 28, 32, 40]
    with RunLogger(folder, "X", resume_timesteps=310) as logger:
        assert logger.missing_updates(31) == 0
        logger.write(update(32, episodes=0))
    assert [int(row["updates"]) for row in rows(folder.progress)][-2:] == [28, 32]
    with RunLogger(folder, "X", resume_timesteps=390) as logger:
        assert logger.missing_updates(39) == 0 and logger.missing_updates(40) == 8


def test_names_are_no_formulas(folder: RunFolder) -> None:
    names = ["=cmd|' /C calc'!A0", "+x", "-x", "@x", "'=x"]
    infos = dict.fromkeys(names, 0.5)
    stats = TrainStats(10, 1, {"=metric": 1.0}, (Episode(-1.0, 2, 0.5, infos),))
    with RunLogger(folder, "X-v0") as logger:
        logger.write(stats)
    for path in (folder.monitor, folder.progress):
        header = path.read_text().splitlines()[path == folder.monitor]
        assert not any(
            cell.strip('"').startswith(("=", "+", "-", "@")) for cell in header.split(",")
        )
    assert set(names) < set(read_table(folder.monitor).columns)
    with RunLogger(folder, "X-v0", 10) as logger:
        assert all(logger.window.means[f"rollout/{name}_mean"] == 0.5 for name in names)
        logger.write(dataclasses.replace(stats, timesteps=20, updates=2))
    assert [row["=cmd|' /C calc'!A0"] for row in read_table(folder.monitor).rows] == ["0.5", "0.5"]
    assert [row["r"] for row in read_table(folder.monitor).rows] == ["-1.0", "-1.0"]


def test_event_files_of_one_second_are_read_in_the_order_in_which_they_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers of processes begin anew at some time, and 1000 sorts before 999."""
    monkeypatch.setattr(events.time, "time", lambda: 1_700_000_000.25)
    (tmp_path / "events.out.tfevents.99999999999.of.another.program").touch()
    for step, process in enumerate((32_753, 303, 9_999, 10_000)):
        monkeypatch.setattr(events.os, "getpid", lambda process=process: process)
        file = events.EventFile(tmp_path, step)
        file.add(step, {"a": float(step)})
        file.flush()
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("a")
    assert [point.step for point in found] == [0, 1, 2, 3]


def test_tensorboard_has_the_settings(folder: RunFolder) -> None:
    """As a text, and in the table of hyper-parameters, by TensorBoard's own reading."""
    settings = {"gamma": 0.9, "compile": False, "network": {"hidden": [8, 4], "custom": None}}
    with RunLogger(folder, "X-v0") as logger:
        logger.describe(settings)
        logger.write(update(1))
    accumulator = EventAccumulator(str(folder.path)).Reload()
    begun = accumulator.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    found = HParamsPluginData.FromString(begun).session_start_info.hparams
    assert found["gamma"].number_value == 0.9 and found["compile"].bool_value is False
    assert found["network.hidden"].string_value == "[8, 4]" and "network.custom" not in found
    known = accumulator.PluginTagToContent("hparams")["_hparams_/experiment"]
    experiment = HParamsPluginData.FromString(known).experiment
    assert [info.name.tag for info in experiment.metric_infos] == [
        *("eval/mean_reward", "rollout/ep_rew_mean"),
    ]
    assert {info.name for info in experiment.hparam_infos} == {*found}
    (text,) = accumulator.Tensors("config/text_summary")
    assert b"| gamma | 0.9 |" in text.tensor_proto.string_val[0]
    assert "rollout/ep_rew_mean" in accumulator.Tags()["scalars"]
