from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import imageio
import numpy as np
import pytest
import torch

from acktr.cli.main import main
from acktr.runs import progress
from acktr.runs import video as recording
from tests.tools import toys

COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]], np.uint8)


class PaintedEnv(toys.CountingEnv):
    """Counts to five; step k is a plane of colour k modulo 3."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def render(self) -> Any:
        return np.broadcast_to(COLOURS[self._count % 3], (31, 41, 3))


class BlackBoxEnv(toys.CountingEnv):
    """Renders something that is no picture."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def render(self) -> Any:
        return "a text"


class GrowingEnv(toys.CountingEnv):
    """Its pictures grow, from nothing if it begins with a step number of 0."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012
    begin = 0

    def render(self) -> Any:
        return np.zeros((30 * (self._count + self.begin), 40, 3), np.uint8)


class SteadyEnv(toys.CountingEnv):
    """Does not say how fast its pictures follow one another."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": None}  # noqa: RUF012

    def render(self) -> Any:
        return np.zeros((30, 40, 3), np.uint8)


def register(name: str, kind: Any) -> str:
    if f"toys/{name}-v0" not in gymnasium.registry:
        gymnasium.register(f"toys/{name}-v0", entry_point=kind, kwargs={"terminate_at": 5})
    return f"toys/{name}-v0"


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def trained(env: str, *argv: str) -> str:
    small = ("--num-envs", "2", "--num-steps", "16", "--eval-episodes", "1", "--device", "cpu")
    assert main(["train", "--env", env, *small, "--total-timesteps", "32", *argv]) == 0
    return str(next(Path("runs").glob("*/acktr/seed0")))


def nearest(picture: Any) -> int:
    middle = np.asarray(picture)[20, 20, :3].astype(int)
    return int(np.abs(COLOURS.astype(int) - middle).sum(axis=1).argmin())


class TestRecord:
    @pytest.mark.parametrize("suffix", [".mp4", ".gif"])
    def test_frames(self, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
        run = trained(register("Painted", PaintedEnv))
        capsys.readouterr()
        out = Path(f"clip{suffix}")
        out.write_text("an older one")
        assert main(["record", run, "--out", str(out), "--episodes", "2"]) == 0
        captured = capsys.readouterr()
        assert captured.out == f"clip{suffix}: returns 15.0, 15.0\n"
        assert captured.err == ""
        reader: Any = imageio.get_reader(out)
        frames = [np.asarray(frame) for frame in reader]
        facts = reader.get_meta_data()
        assert frames[0].shape[:2] == (31 * 15 + 1, 41 * 15 + 1)
        seen = [nearest(frame) for frame in frames]
        episode = [0, 1, 2, 0, 1, 2]  # the reset and five steps
        assert seen == episode * 2
        if suffix == ".mp4":
            assert facts["fps"] == pytest.approx(20)
        else:
            assert facts["duration"] == 50
        assert [path.name for path in Path().iterdir() if "tmp" in path.name] == []

    def test_progress(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One line per interval, here of no length."""
        monkeypatch.setattr(recording, "Display", lambda title, _: progress.Display(title, 0.0))
        run = trained(register("Painted", PaintedEnv))
        capsys.readouterr()
        assert main(["record", run, "--episodes", "2", "--max-steps", "3"]) == 0
        lines = capsys.readouterr().err.splitlines()
        assert lines == [f"episode {e} of 2, step {s} of 3" for e in (1, 2) for s in range(4)]

    def test_step_limit_and_default_name(self) -> None:
        run = trained(register("Painted", PaintedEnv))
        assert main(["record", run, "--max-steps", "2"]) == 0
        reader: Any = imageio.get_reader(Path(run) / "clip.mp4")
        assert reader.count_frames() == 3

    def test_no_picture(self, capsys: pytest.CaptureFixture[str]) -> None:
        run = trained(register("BlackBox", BlackBoxEnv))
        capsys.readouterr()
        Path("clip.mp4").write_text("an older one")
        assert main(["record", run, "--out", "clip.mp4"]) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and "renders no pictures" in err
        assert Path("clip.mp4").read_text() == "an older one"
        assert sorted(path.name for path in Path().iterdir()) == ["clip.mp4", "runs"]

    @pytest.mark.parametrize("suffix", [".mp4", ".gif"])
    @pytest.mark.parametrize(
        ("begin", "message"), [(0, "renders no pictures"), (1, "pictures of different sizes")]
    )
    def test_bad_pictures(
        self,
        begin: int,
        message: str,
        suffix: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(GrowingEnv, "begin", begin)
        run = trained(register("Growing", GrowingEnv))
        capsys.readouterr()
        assert main(["record", run, "--out", f"clip{suffix}"]) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and message in err
        assert [path.name for path in Path().iterdir()] == ["runs"]

    @pytest.mark.parametrize("suffix", [".mp4", ".gif"])
    def test_unknown_speed(self, suffix: str) -> None:
        run = trained(register("Steady", SteadyEnv))
        assert main(["record", run, "--out", f"clip{suffix}"]) == 0
        assert Path(f"clip{suffix}").stat().st_size > 0

    def test_no_render_mode(self, capsys: pytest.CaptureFixture[str]) -> None:
        run = trained("toys/Counting-v0")
        capsys.readouterr()
        assert main(["record", run]) == 2
        assert "cannot render 'rgb_array'" in capsys.readouterr().err
        assert not (Path(run) / "clip.mp4").exists()

    def test_unwritable(self, capsys: pytest.CaptureFixture[str]) -> None:
        run = trained(register("Painted", PaintedEnv))
        capsys.readouterr()
        assert main(["record", run, "--out", "no/folder/clip.mp4"]) == 2
        assert "cannot write the video: No such file" in capsys.readouterr().err

    def test_atari_is_enlarged_by_a_whole_factor(self) -> None:
        run = trained("PongNoFrameskip-v4", "--atari.max-frames", "200")
        assert main(["record", run, "--max-steps", "8", "--out", "pong.gif"]) == 0
        frames = imageio.mimread("pong.gif", memtest=False)
        first = np.asarray(frames[-1])[..., :3]
        assert first.shape == (630, 480, 3)
        small = first[::3, ::3]
        np.testing.assert_array_equal(first, small.repeat(3, axis=0).repeat(3, axis=1))
        assert len(np.unique(small.reshape(-1, 3), axis=0)) >= 3

    def test_mujoco_without_display(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Draws where EGL or OSMesa is installed, and else names both in one line."""
        monkeypatch.setenv("MUJOCO_GL", "")
        monkeypatch.delenv("DISPLAY", raising=False)
        run = trained("InvertedPendulum-v5")
        capsys.readouterr()
        code = main(["record", run, "--max-steps", "5", "--out", "pole.gif"])
        if code == 2:
            assert "EGL" in capsys.readouterr().err
            pytest.skip("no EGL and no OSMesa here")
        frames = [np.asarray(frame) for frame in imageio.mimread("pole.gif")]
        assert len(frames) >= 2
        assert all(frame.std() > 10 for frame in frames)
        assert (frames[0] != frames[-1]).any()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((210, 160), (630, 480)), ((480, 480), (480, 480)), ((401, 601), (402, 602))],
)
def test_prepare(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    large = recording.prepare(picture)
    assert large.shape == (*expected, 3)
    factor = expected[0] // shape[0]
    np.testing.assert_array_equal(
        large[: shape[0] * factor : factor, ::factor][:, : shape[1]], picture
    )


_RNG = np.random.default_rng(0)
PICTURES = [_RNG.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(8)]
ENDS = {
    "at once": "exit 1",
    "without a file": "cat > /dev/null; exit 1",
    "with a part": 'cat > /dev/null; for last; do :; done; echo part > "$last"; exit 1',
}


@pytest.mark.skipif(sys.platform == "win32", reason="of sh")
@pytest.mark.parametrize("end", ENDS)
def test_a_video_that_ffmpeg_did_not_finish_replaces_none(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text(f"#!/bin/sh\ncase $* in *'-i - '*) {ENDS[end]};; esac; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    out = tmp_path / "clip.mp4"
    out.write_text("an older one")
    with pytest.raises(recording.RecordError, match="mp4: cannot write the video: ") as error:
        recording._write(out, iter(PICTURES * 100), 20)
    assert "\n" not in str(error.value) and "the disk may be full" in str(error.value)
    assert capfd.readouterr().err == ""
    assert out.read_text() == "an older one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "ffmpeg"]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_disk_that_is_full_leaves_the_older_video(
    suffix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A limit to the size of files stands for it."""
    import resource

    out = tmp_path / f"clip{suffix}"
    out.write_text("an older one")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(recording.RecordError, match="cannot write the video: ") as error:
            recording._write(out, iter(PICTURES), 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an older one"]
