"""The checkpoints that a run keeps, and what a resume makes of damaged ones."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from acktr.compare.grid import RunPlan
from acktr.compare.status import State, status
from acktr.config import Config, merge, preset
from acktr.interrupts import Interrupts
from acktr.runs.checkpoint import CheckpointError, load_checkpoint
from acktr.runs.folder import RunError, RunFolder, run_path
from acktr.runs.saved import find_agent, find_checkpoint
from acktr.runs.session import TrainingFault
from acktr.runs.start import resume, start
from acktr.runs.tables import read_table
from acktr.train import Trainer


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw(folder: RunFolder, config: Config) -> str | None:
    return None


def config(**changes: Any) -> Config:
    small = {"num_envs": 2, "num_steps": 16, "total_timesteps": 128, "device": "cpu"}
    small |= {"eval_episodes": 1, "checkpoint_freq": 32, "algo": "a2c"}
    return merge(preset("CartPole-v1", "a2c")[0], {**small, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("kept") / "runs"
    start(config(), runs, "test", Interrupts(), ["acktr"], draw)
    return runs


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run with checkpoints of the steps 128, 96 and 64."""
    shutil.copytree(trained, tmp_path / "runs")
    return run_path(tmp_path / "runs", config())


def steps(run: Path) -> dict[str, int]:
    found = {}
    for path in sorted((run / "checkpoints").iterdir()):
        if path.name.startswith("last") and not path.name.endswith(".damaged"):
            found[path.name] = load_checkpoint(path)[0]["timesteps"]
    return found


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_the_last_three_are_kept(run: Path) -> None:
    assert steps(run) == {"last": 128, "last-1": 96, "last-2": 64}
    resume(run, 192, Interrupts(), ["acktr"], draw)
    assert steps(run) == {"last": 192, "last-1": 160, "last-2": 128}
    assert (run / "checkpoints" / "best").is_dir()


def test_a_writer_killed_before_it_moved_the_older_ones_on_loses_none(run: Path) -> None:
    kept = run / "checkpoints"
    (kept / "last-1").rename(kept / "last.old")
    (kept / "last-2").rename(kept / "last-1")
    resume(run, 160, Interrupts(), ["acktr"], draw)
    assert steps(run) == {"last": 160, "last-1": 128, "last-2": 96}


@pytest.mark.parametrize("damage", ["flip", "no manifest", "cut", "forged", "gone"])
def test_resume_falls_back_with_a_warning(
    run: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    last = run / "checkpoints" / "last"
    if damage == "flip":
        flip(last / "state.safetensors")
    elif damage == "no manifest":
        (last / "manifest.json").unlink()
    elif damage == "cut":
        (last / "state.json").write_bytes((last / "state.json").read_bytes()[:-9])
    elif damage == "forged":
        shutil.rmtree(last)
        shutil.copytree(run / "checkpoints" / "last-1", last)
        (last / "manifest.json").write_text((last / "manifest.json").read_text() + " ")
    else:
        shutil.rmtree(last)
    capsys.readouterr()
    resume(run, 160, Interrupts(), ["acktr"], draw)
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {last}") and "; going on from last-1, step 96\n" in said
    assert steps(run) == {"last": 160, "last-1": 128, "last-2": 96}
    assert (run / "checkpoints" / "last.damaged").is_dir() == (damage != "gone")
    rows = [int(row["timesteps"]) for row in read_table(run / "progress.csv").rows]
    assert rows == [32, 64, 96, 128, 160]


def test_resume_falls_back_twice_and_then_says_what_is_wrong(run: Path) -> None:
    for name in ("last", "last-1"):
        flip(run / "checkpoints" / name / "state.safetensors")
    resume(run, 96, Interrupts(), ["acktr"], draw)
    assert steps(run) == {"last": 96, "last-1": 64, "last-2": 64}
    for name in ("last", "last-1", "last-2"):
        (run / "checkpoints" / name / "manifest.json").write_text("{}")
    before = sorted(run.rglob("*"))
    with pytest.raises(CheckpointError, match=r"last/manifest\.json: not a checkpoint manifest"):
        resume(run, 160, Interrupts(), ["acktr"], draw)
    assert sorted(run.rglob("*")) == before


def test_a_checkpoint_that_is_named_is_that_one_or_an_error(run: Path) -> None:
    last = run / "checkpoints" / "last"
    flip(last / "state.safetensors")
    for named in (run, last):
        with pytest.raises(CheckpointError, match="differs from its size or SHA-256"):
            find_agent(named, "last")
    assert find_checkpoint(run) == last
    assert find_agent(run / "checkpoints" / "last-1", "last").timesteps == 96


def test_a_comparison_goes_on_with_an_older_one(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "last")
    assert status(RunPlan(config(), config(), "a2c", run.parents[2])).state == State.UNFINISHED


def test_a_learner_that_is_nan_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in the optimizer alone, with sound weights."""
    original = Trainer.run

    def breaking(self: Trainer, total_timesteps: int, start: int = 0) -> Iterator[Any]:
        for stats in original(self, total_timesteps):
            if stats.timesteps == 96:
                squares: Any = self.learner
                next(iter(squares.optimizer._squares.values())).fill_(float("nan"))
            yield stats

    monkeypatch.setattr(Trainer, "run", breaking)
    chosen = config()
    with pytest.raises(TrainingFault, match=r"learner/rmsprop/\S+ is NaN or Inf at step 96.*64$"):
        start(chosen, tmp_path / "runs", "test", Interrupts(), ["acktr"], draw)
    assert steps(run_path(tmp_path / "runs", chosen))["last"] == 64


@pytest.mark.parametrize("what", ["moved", "deleted", "replaced"])
def test_a_folder_that_goes_away_during_training_ends_it_with_a_line(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written to where it was, and where it went it can be resumed."""
    path = run_path(tmp_path / "runs", config())
    moved = tmp_path / "moved"
    original = Trainer.run

    def run(self: Trainer, total_timesteps: int, start: int = 0) -> Iterator[Any]:
        for stats in original(self, total_timesteps):
            if stats.timesteps == 96:
                path.rename(moved)
                if what == "replaced":
                    path.mkdir()
            yield stats

    monkeypatch.setattr(Trainer, "run", run)
    with pytest.raises(RunError, match=rf"^{path}: the run folder was moved or deleted"):
        start(config(), tmp_path / "runs", "test", Interrupts(), ["acktr"], draw)
    assert path.exists() == (what == "replaced") and not list(path.glob("*"))
    monkeypatch.undo()
    if what == "moved":
        resume(moved, None, Interrupts(), ["acktr"], draw)
        assert steps(moved) == {"last": 128, "last-1": 96, "last-2": 64}


def test_logs_that_end_before_the_checkpoint_are_noticed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (run / "progress.csv").read_text().splitlines(keepends=True)
    (run / "progress.csv").write_text("".join(lines[:-2]) + lines[-1][:-5])
    capsys.readouterr()
    resume(run, 160, Interrupts(), ["acktr"], draw)
    said = capsys.readouterr().err
    assert "warning: progress.csv lacks the last 2 updates before step 128" in said
    rows = [int(row["timesteps"]) for row in read_table(run / "progress.csv").rows]
    assert rows == [32, 64, 160]


@pytest.mark.parametrize("total", [None, 192], ids=["complete", "unfinished"])
def test_a_run_killed_after_an_evaluation_was_logged_has_its_best_checkpoint(
    tmp_path: Path, total: int | None
) -> None:
    """It was killed before the checkpoint was there, and in the middle of a CSV file."""
    settings = config(eval_freq=128)
    start(settings, tmp_path, "test", Interrupts(), ["acktr"], draw)
    folder = RunFolder(run_path(tmp_path, settings))
    before, meta = load_checkpoint(folder.best)
    assert meta["timesteps"] == 128
    shutil.rmtree(folder.best)
    left = folder.path / ".progress.csv.tmp-0123abcd"
    left.touch()
    drawn: list[RunFolder] = []
    resume(folder.path, total, Interrupts(), ["acktr"], lambda run, _: str(drawn.append(run)))
    assert len(drawn) == 1 and not left.exists()
    state, found = load_checkpoint(folder.best)
    if found["timesteps"] == 128:
        assert found == meta and state["network"].keys() == before["network"].keys()
        assert all(torch.equal(v, before["network"][k]) for k, v in state["network"].items())
    assert found["score"] >= meta["score"] and (total is not None) >= (found["timesteps"] > 128)
