"""Videos of trained agents, made without a display."""

from __future__ import annotations

import math
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import imageio
import numpy as np
from numpy.typing import NDArray

from acktr.compute import resolve_device
from acktr.envs import EnvError, describe, env_seeds, make_single
from acktr.evaluate import usually_deterministic
from acktr.files import reason
from acktr.policies import Policy
from acktr.runs.saved import SavedAgent, limit_threads

SUFFIXES = (".mp4", ".gif")
"""Kinds of video."""

_BACKENDS = ("egl", "osmesa")
_GIF_FPS = 50
_SMALLEST_SIDE = 480
_PROBE = """
import mujoco
context = mujoco.GLContext(16, 16)
context.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_100)
"""

Frame = NDArray[np.uint8]


class RecordError(RuntimeError):
    """A video that cannot be made; the message is one line."""


class _Writer(Protocol):
    def append_data(self, im: Frame) -> None: ...
    def close(self) -> None: ...


def record(
    agent: SavedAgent, out: Path, *, episodes: int, max_steps: int, seed: int, device: str
) -> tuple[float, ...]:
    """Play episodes and write them to a video, which appears whole or not at all.

    Args:
        agent: Who plays.
        out: .mp4 or .gif; an older one is replaced.
        episodes: How many.
        max_steps: Most steps of each.
        seed: Of the environment and of sampled actions.
        device: Where to compute.

    Returns:
        The returns of the episodes.

    Raises:
        RecordError: The suffix is unknown, rendering is impossible or the file cannot be written.
        EnvError: The environment cannot be made or rendered.
        ConfigError: There is no such device.
        CheckpointError: The checkpoint cannot be read.
    """
    if out.suffix not in SUFFIXES:
        raise RecordError(f"{out}: the name of a video must end in {' or '.join(SUFFIXES)}")
    chosen = resolve_device(device)
    if "mujoco" in describe(agent.config.env):
        choose_mujoco_backend()
    env = make_single(agent.config.env, atari=agent.config.atari)
    try:
        limit_threads(env.observation_space)
        policy = agent.policy(env.observation_space, env.action_space, chosen, seed)
        likeliest = usually_deterministic(agent.config.env)
        returns = []
        with _video(out, _fps(env.metadata.get("render_fps"))) as video:
            for episode_seed in env_seeds(seed, episodes):
                returns.append(_episode(env, policy, video, likeliest, max_steps, episode_seed))
    finally:
        env.close()
    return tuple(returns)


def choose_mujoco_backend() -> str:
    """Set MUJOCO_GL to the first backend that can draw without a display, unless it is set.

    Raises:
        RecordError: None of them works.
    """
    given = os.environ.get("MUJOCO_GL")
    for backend in (given,) if given else _BACKENDS:
        if _works(backend):
            os.environ["MUJOCO_GL"] = backend
            return backend
    if given:
        raise RecordError(f"MuJoCo cannot draw with MUJOCO_GL={given}; unset it or try egl")
    raise RecordError(
        "MuJoCo can draw neither with EGL nor with OSMesa here: "
        "install one, for example apt install libegl1 libopengl0 or libosmesa6"
    )


def _works(backend: str) -> bool:
    """Try it in another process, because a failed attempt spoils this one for the next."""
    environment = {**os.environ, "MUJOCO_GL": backend}
    environment.pop("PYOPENGL_PLATFORM", None)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0


def _episode(
    env: gymnasium.Env[Any, Any],
    policy: Policy,
    video: _Writer,
    deterministic: bool,
    max_steps: int,
    seed: int,
) -> float:
    observation, _ = env.reset(seed=seed)
    video.append_data(_frame(env))
    total = 0.0
    for _ in range(max_steps):
        action = policy.act(np.asarray(observation)[None], deterministic)[0]
        observation, reward, terminated, truncated, _ = env.step(action)
        total += float(reward)
        video.append_data(_frame(env))
        if terminated or truncated:
            break
    return total


def _frame(env: gymnasium.Env[Any, Any]) -> Frame:
    """The picture, small ones enlarged by a whole factor, with even sides as H.264 wants them."""
    picture = env.render()
    if (
        not isinstance(picture, np.ndarray)
        or picture.ndim != 3
        or picture.shape[2] != 3
        or not picture.size
    ):
        raise EnvError("the environment renders no pictures of shape (height, width, 3)")
    return prepare(picture.astype(np.uint8, copy=False))


def prepare(picture: Frame) -> Frame:
    """Enlarge a picture to about 480 pixels by a whole factor and pad it to even sides."""
    factor = max(1, round(_SMALLEST_SIDE / min(picture.shape[:2])))
    large = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    pad = [(0, side % 2) for side in large.shape[:2]]
    return np.pad(large, [*pad, (0, 0)], mode="edge")


@contextmanager
def _video(out: Path, fps: float) -> Iterator[_Writer]:
    """A writer to a temporary name beside the video, renamed at the end."""
    temporary = out.with_name(f".{out.stem}.tmp-{secrets.token_hex(4)}{out.suffix}")
    try:
        if out.is_dir():
            raise IsADirectoryError(None, "is a folder")
        temporary.touch(exist_ok=False)
        writer = _gif(temporary, fps) if out.suffix == ".gif" else _mp4(temporary, fps)
        try:
            yield _SameSize(writer)
        finally:
            writer.close()
        os.replace(temporary, out)
    except OSError as error:
        raise RecordError(f"{out}: cannot write the video: {reason(error)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _fps(given: object) -> float:
    """Pictures per second, 30 for an environment that does not say."""
    known = isinstance(given, int | float) and 0 < given < math.inf
    return float(given) if known else 30.0  # type: ignore[arg-type]


class _SameSize:
    """Refuses pictures of another size than the first."""

    def __init__(self, writer: _Writer) -> None:
        self._writer = writer
        self._shape: tuple[int, ...] | None = None

    def append_data(self, im: Frame) -> None:
        self._shape = self._shape or im.shape
        if im.shape != self._shape:
            raise EnvError("the environment renders pictures of different sizes")
        self._writer.append_data(im)

    def close(self) -> None:
        self._writer.close()


def _mp4(path: Path, fps: float) -> _Writer:
    writer: _Writer = imageio.get_writer(
        path, fps=fps, macro_block_size=2, ffmpeg_log_level="error", codec="libx264"
    )
    return writer


def _gif(path: Path, fps: float) -> _Writer:
    stride = max(1, math.ceil(fps / _GIF_FPS))
    writer: _Writer = imageio.get_writer(path, mode="I", duration=1000 * stride / fps, loop=0)
    return _EveryNth(writer, stride)


class _EveryNth:
    """Drops frames, because a GIF shows at most 50 a second."""

    def __init__(self, writer: _Writer, stride: int) -> None:
        self._writer, self._stride, self._count = writer, stride, 0

    def append_data(self, im: Frame) -> None:
        if self._count % self._stride == 0:
            self._writer.append_data(im)
        self._count += 1

    def close(self) -> None:
        self._writer.close()
