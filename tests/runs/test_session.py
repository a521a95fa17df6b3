from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from acktr.compute import restore_generator
from acktr.config import Config, merge, preset
from acktr.interrupts import Interrupts, Stopped
from acktr.runs import checkpoint, session
from acktr.runs.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from acktr.runs.folder import RunError, RunFolder, locked, run_path, stored_config
from acktr.runs.logger import RunLogger
from acktr.runs.session import TrainingFault
from acktr.runs.start import resume, start
from acktr.runs.tables import read_table
from acktr.train import Trainer


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def config(**changes: Any) -> Config:
    small = {"num_envs": 2, "num_steps": 32, "total_timesteps": 256, "device": "cpu"}
    return merge(preset("CartPole-v1")[0], {**small, "eval_episodes": 1, **changes})


def draw(folder: RunFolder, config: Config) -> str | None:
    folder.curve.write_bytes(b"a curve")
    return None


def train(tmp_path: Path, chosen: Config, interrupts: Interrupts | None = None) -> str:
    return start(chosen, tmp_path / "runs", "test", interrupts or Interrupts(), ["acktr"], draw)


class TestCheckpoints:
    def test_failed_one_does_not_end_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        calls = []

        def flaky(folder: Path, state: Any, meta: dict[str, Any], older: int = 0) -> None:
            if folder.name == "last":
                calls.append(meta["timesteps"])
            if meta["timesteps"] == 128:
                raise CheckpointError("no space left")
            save_checkpoint(folder, state, meta)

        monkeypatch.setattr(session, "save_checkpoint", flaky)
        chosen = config(checkpoint_freq=128)
        train(tmp_path, chosen)
        assert "warning: no space left; training goes on" in capsys.readouterr().err
        assert calls[:3] == [0, 128, 256]
        last = run_path(tmp_path / "runs", chosen) / "checkpoints/last"
        assert load_checkpoint(last)[0]["timesteps"] == 256

    def test_broken_network_is_not_saved(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A policy that turned into NaN while the values did not."""
        original = Trainer.run

        def breaking(self: Trainer, total_timesteps: int, start: int = 0) -> Iterator[Any]:
            for stats in original(self, total_timesteps):
                if stats.timesteps == 192:
                    with torch.no_grad():
                        next(self.network.parameters()).fill_(float("nan"))
                yield stats
                if stats.timesteps == 192:
                    return

        monkeypatch.setattr(Trainer, "run", breaking)
        chosen = config(checkpoint_freq=64)
        with pytest.raises(TrainingFault, match=r"NaN or Inf at step 192.*step 128$") as fault:
            train(tmp_path, chosen)
        assert not fault.value.environment
        last = run_path(tmp_path / "runs", chosen) / "checkpoints/last"
        assert load_checkpoint(last)[0]["timesteps"] == 128

    def test_signal_during_evaluation_loses_no_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*args: Any, **kwargs: Any) -> None:
            signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(session, "evaluate", interrupted)
        chosen = config(eval_freq=128)
        with Interrupts() as interrupts, pytest.raises(Stopped) as stop:
            train(tmp_path, chosen, interrupts)
        assert stop.value.signum == signal.SIGTERM
        path = run_path(tmp_path / "runs", chosen)
        assert stop.value.note.endswith(f"continue with: acktr train --resume {path}")
        assert load_checkpoint(path / "checkpoints/last")[0]["timesteps"] == 128

    def test_the_command_that_goes_on_imports_what_the_run_needs(self, tmp_path: Path) -> None:
        chosen = config(env="gymnasium:CartPole-v1", wrappers=("tests.envs.test_source:Doubled",))
        draw, none = (lambda *_: None), None
        said = start(chosen, tmp_path, "test", Interrupts(), [], draw, none, none, 64)
        path = run_path(tmp_path, chosen)
        assert said.endswith(
            f"acktr train --resume {path} --import gymnasium,tests.envs.test_source"
        )

    def test_interrupted_evaluation_is_made_up_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original, calls = session.evaluate, []

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                signal.raise_signal(signal.SIGINT)
            return original(*args, **kwargs)

        monkeypatch.setattr(session, "evaluate", interrupted)
        chosen = config(eval_freq=64)
        with Interrupts() as interrupts, pytest.raises(Stopped):
            train(tmp_path, chosen, interrupts)
        path = run_path(tmp_path / "runs", chosen)
        assert [row["timesteps"] for row in read_table(path / "eval.csv").rows] == ["64"]
        resume(path, None, Interrupts(), ["acktr"], draw)
        whole = run_path(tmp_path / "runs" / "runs", chosen)
        train(tmp_path / "runs", chosen)
        rows = [read_table(run / "eval.csv").rows for run in (path, whole)]
        assert rows[0][:2] == rows[1][:2]  # environments start anew after it
        assert [row["timesteps"] for row in rows[0]] == ["64", "128", "192", "256"]

    def test_signal_after_the_last_evaluation_loses_neither_curve_nor_best(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = RunLogger.write_evaluation

        def signalled(self: RunLogger, timesteps: int, *args: Any) -> None:
            original(self, timesteps, *args)
            if timesteps == 256:
                interrupts._waits = True  # as it is a moment later
                signal.raise_signal(signal.SIGINT)
                interrupts._waits = False

        monkeypatch.setattr(RunLogger, "write_evaluation", signalled)
        chosen = config(eval_freq=1000)
        with Interrupts() as interrupts:
            assert train(tmp_path, chosen, interrupts).startswith("done")
        path = run_path(tmp_path / "runs", chosen)
        assert (path / "curve.png").is_file()
        assert load_checkpoint(path / "checkpoints/best")[0]["timesteps"] == 256

    def test_signal_in_the_last_update_leaves_a_best_checkpoint_to_the_resume(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = RunLogger.write

        def signalled(self: RunLogger, stats: Any) -> None:
            original(self, stats)
            if stats.timesteps == 256:
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(RunLogger, "write", signalled)
        chosen = config()
        with Interrupts() as interrupts, pytest.raises(Stopped):
            train(tmp_path, chosen, interrupts)
        path = run_path(tmp_path / "runs", chosen)
        assert load_checkpoint(path / "checkpoints/last")[0]["timesteps"] == 256
        resume(path, None, Interrupts(), ["acktr"], draw)
        assert load_checkpoint(path / "checkpoints/best")[0]["timesteps"] == 256

    @pytest.mark.parametrize("unwritten", ["last", "best"])
    def test_death_between_last_and_best_leaves_the_best(
        self, unwritten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without evaluations, where no row of a file says what the best was."""

        class Killed(BaseException):
            """In place of SIGKILL."""

        def deadly(folder: Path, state: Any, meta: dict[str, Any], older: int = 0) -> None:
            if folder.name == unwritten and meta["timesteps"] == 128:
                raise Killed
            save_checkpoint(folder, state, meta, older)

        def score(self: session.Session) -> float:
            return -abs(self.trainer.timesteps - 128.0)

        monkeypatch.setattr(session.Session, "_training_score", score)
        chosen = config(eval_freq=0, checkpoint_freq=64)
        with monkeypatch.context() as patch:
            patch.setattr(session, "save_checkpoint", deadly)
            with pytest.raises(Killed):
                train(tmp_path, chosen)
        path = run_path(tmp_path / "runs", chosen)
        assert load_checkpoint(path / "checkpoints/last")[0]["timesteps"] == 64
        resume(path, None, Interrupts(), ["acktr"], draw)
        assert load_checkpoint(path / "checkpoints/best")[0]["timesteps"] == 128

    def test_a_best_checkpoint_that_cannot_be_written_does_not_cost_the_last(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def full(folder: Path, state: Any, meta: dict[str, Any], older: int = 0) -> None:
            if folder.name == "best" and meta["timesteps"] < 256:
                raise CheckpointError("no space left")
            if meta["timesteps"] < 256:
                saved.append(meta["timesteps"])
            save_checkpoint(folder, state, meta, older)

        saved: list[int] = []
        monkeypatch.setattr(session, "save_checkpoint", full)
        monkeypatch.setattr(session.Session, "_training_score", lambda self: self.trainer.updates)
        train(tmp_path, config(eval_freq=0, checkpoint_freq=64))
        assert saved == [0, 64, 128, 192]
        assert capsys.readouterr().err.count("warning: no space left; training goes on") == 3

    @pytest.mark.parametrize("broken", ["last", "best"])
    def test_resume_finds_out_at_once_what_cannot_be_written(
        self, broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chosen = config()
        train(tmp_path, chosen)
        path = run_path(tmp_path / "runs", chosen)
        shutil.rmtree(path / "checkpoints" / "best")
        if broken == "best":
            (path / "checkpoints" / "best").mkdir()
            (path / "checkpoints" / "best" / "thesis.txt").write_text("x")
        else:

            def full(folder: Path, *_: Any) -> None:
                raise CheckpointError(f"{folder}: cannot write the checkpoint: no space left")

            monkeypatch.setattr(session, "save_checkpoint", full)
        rows = (path / "progress.csv").read_bytes()
        with pytest.raises(CheckpointError, match=f"{broken}: cannot write the checkpoint"):
            resume(path, 512, Interrupts(), ["acktr"], draw)
        assert (path / "progress.csv").read_bytes() == rows
        assert stored_config(path).total_timesteps == 256

    def test_resume_reads_nothing_before_it_has_the_lock(self, tmp_path: Path) -> None:
        chosen = config()
        train(tmp_path, chosen)
        path = run_path(tmp_path / "runs", chosen)
        with locked(RunFolder(path)), pytest.raises(RunError, match="another process is training"):
            resume(path, None, Interrupts(), ["acktr"], draw)  # not "is complete": that may change

    def test_best_score_survives_a_resume(self, tmp_path: Path) -> None:
        chosen = config(eval_freq=64)
        train(tmp_path, chosen)
        path = run_path(tmp_path / "runs", chosen)
        state, meta = load_checkpoint(path / "checkpoints/best")
        save_checkpoint(path / "checkpoints/best", state, {**meta, "score": 1e6})
        resume(path, 512, Interrupts(), ["acktr"], draw)
        assert load_checkpoint(path / "checkpoints/best")[1]["score"] == 1e6
        assert stored_config(path).total_timesteps == 512


class TestFolder:
    def test_nothing_is_left_when_the_start_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(folder: Path, *_: Any) -> None:
            raise CheckpointError("no space left")

        monkeypatch.setattr(session, "save_checkpoint", full)
        with pytest.raises(CheckpointError, match="no space left"):
            train(tmp_path, config())
        assert list(tmp_path.iterdir()) == []

    def test_run_killed_at_its_start_is_started_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Wherever that was: the folder is copied before each thing that a start writes."""
        chosen = config(total_timesteps=64)
        path, killed = run_path(tmp_path / "runs", chosen), tmp_path / "killed"

        def watched(write: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any) -> Any:
                if not (path / "checkpoints/last").exists():
                    number = len(list(killed.iterdir())) if killed.exists() else 0
                    shutil.copytree(path, killed / str(number))
                return write(*args)

            return wrapped

        with monkeypatch.context() as patched:
            for owner, name in ((RunFolder, "write_json"), (RunFolder, "write_command")):
                patched.setattr(owner, name, watched(getattr(owner, name)))
            patched.setattr(checkpoint, "write_synced", watched(checkpoint.write_synced))
            train(tmp_path, chosen)
        states = sorted(killed.iterdir(), key=lambda path: int(path.name))
        assert len(states) == 8  # configuration, versions, command, protocol, four of a checkpoint
        assert all(RunFolder(state).unborn for state in states)
        with pytest.raises(RunError, match=r"no checkpoint .* run the command again"):
            resume(states[-1], None, Interrupts(), ["acktr"], draw)
        shutil.rmtree(path)
        states[-1].rename(path)
        train(tmp_path, chosen)
        assert load_checkpoint(path / "checkpoints/last")[0]["timesteps"] == 64
        with pytest.raises(RunError, match="already holds a run; continue a run with --resume"):
            train(tmp_path, chosen)

    def test_run_without_checkpoint_says_what_to_do(self, tmp_path: Path) -> None:
        chosen = config()
        train(tmp_path, chosen)
        path = run_path(tmp_path / "runs", chosen)
        shutil.rmtree(path / "checkpoints")
        with pytest.raises(RunError, match="delete it and start again"):
            resume(path, None, Interrupts(), ["acktr"], draw)


def test_generator_of_another_device_starts_anew() -> None:
    """A CUDA generator's state has 16 bytes, a CPU generator's 5056."""
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    restore_generator(generator, torch.zeros(16, dtype=torch.uint8))
    assert torch.equal(generator.get_state(), before)
    other = torch.Generator().manual_seed(4).get_state()
    restore_generator(generator, other)
    assert torch.equal(generator.get_state(), other)
    with pytest.raises(ValueError, match="damaged"):
        restore_generator(generator, torch.zeros_like(other))
