"""Videos of trained agents, made without a display."""

from __future__ import annotations

import io
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import gymnasium
import imageio
import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from acktr.compute import resolve_device
from acktr.environments import drawn
from acktr.envs import EnvError, MaskReader, batched, env_seeds
from acktr.evaluate import usually_deterministic
from acktr.files import reason, write_atomic
from acktr.policies import Policy
from acktr.runs.progress import Display
from acktr.runs.saved import SavedAgent

SUFFIXES = (".mp4", ".gif")
"""Kinds of video."""

_GIF_FPS = 50
_SMALLEST_SIDE = 480
_LIKELY = "the disk may be full, or this ffmpeg has no x264"

Frame = NDArray[np.uint8]


class RecordError(RuntimeError):
    """A video that cannot be made; the message is one line."""


def record(
    agent: SavedAgent, out: Path, *, episodes: int, max_steps: int, seed: int, device: str
) -> tuple[float, ...]:
    """Play episodes and write them to a video, which appears whole or not at all.

    Args:
        agent: The agent that plays.
        out: .mp4 or .gif; an older one is replaced.
        episodes: Number of episodes.
        max_steps: Most steps of each.
        seed: Seed of the environment and of sampled actions.
        device: Where to compute.

    Returns:
        The returns of the episodes.

    Raises:
        RecordError: The suffix is unknown or the file cannot be written.
        EnvError: The environment cannot be made or rendered.
        ConfigError: There is no such device.
        CheckpointError: The checkpoint cannot be read.
    """
    if out.suffix not in SUFFIXES:
        raise RecordError(f"{out}: the name of a video must end in {' or '.join(SUFFIXES)}")
    place = resolve_device(device)
    agent.require_env()
    config, env = agent.config, drawn(agent.config)
    reader = MaskReader(env, config.masks, config.env)
    display = Display("acktr record", 5.0)
    returns: list[float] = []
    try:
        policy = agent.policy(env.observation_space, env.action_space, place, seed)
        likeliest = usually_deterministic(agent.config.env)
        limit = env.spec.max_episode_steps if env.spec is not None else None
        longest = min(max_steps, limit or max_steps)

        def pictures() -> Iterator[Frame]:
            display.due()  # the first line comes after the first interval
            for number, episode_seed in enumerate(env_seeds(seed, episodes)):
                returns.append(0.0)
                played = islice(_play(env, reader, policy, likeliest, episode_seed), max_steps + 1)
                for step, (picture, reward) in enumerate(played):
                    returns[-1] += reward
                    if display.due():
                        line = f"episode {number + 1} of {episodes}, step {step:,} of {longest:,}"
                        done = number * longest + step
                        display.show(line, done, episodes * longest, Text(line))
                    yield picture

        _write(out, pictures(), _fps(env.metadata.get("render_fps")))
    finally:
        display.close()
        env.close()
    return tuple(returns)


def _play(
    env: gymnasium.Env[Any, Any],
    reader: MaskReader,
    policy: Policy,
    deterministic: bool,
    seed: int,
) -> Iterator[tuple[Frame, float]]:
    """Pictures of an episode with the rewards of the steps before them."""
    observation, info = env.reset(seed=seed)
    first = _picture(env)
    yield first, 0.0
    over, step, state = False, 0, None
    while not over:
        mask = reader.read(observation, info, f"step {step}")
        masks = None if mask is None else mask[None]
        batch, _ = batched(env.observation_space, observation)
        start = np.array([step == 0])
        actions, state = policy.advance(batch, state, start, deterministic, masks)
        action = actions[0]
        observation, reward, terminated, truncated, info = env.step(action)
        step += 1
        picture = _picture(env)
        if picture.shape != first.shape:
            raise EnvError("the environment renders pictures of different sizes")
        yield picture, float(reward)
        over = terminated or truncated


def _picture(env: gymnasium.Env[Any, Any]) -> Frame:
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


def _write(out: Path, pictures: Iterator[Frame], fps: float) -> None:
    """Write a video; an older one stays as it is unless all of it could be written.

    Raises:
        RecordError: It cannot be written.
    """
    try:
        if out.is_dir():
            raise IsADirectoryError(None, "is a folder")
        if out.suffix == ".gif":
            write_atomic(out, _gif(pictures, fps))
        else:
            _write_mp4(out, pictures, fps)
    except OSError as error:
        raise RecordError(f"{out}: cannot write the video: {reason(error)}") from error


def _gif(pictures: Iterator[Frame], fps: float) -> bytes:
    """A GIF, made in memory: Pillow keeps its pictures there anyway, until the end."""
    stride = max(1, math.ceil(fps / _GIF_FPS))  # a GIF shows at most 50 pictures a second
    made = io.BytesIO()
    options: dict[str, Any] = {"mode": "I", "duration": 1000 * stride / fps, "loop": 0}
    writer: Any = imageio.get_writer(made, format=".gif", **options)
    with closing(writer):
        for picture in islice(pictures, 0, None, stride):
            writer.append_data(picture)
    return made.getvalue()


def _write_mp4(out: Path, pictures: Iterator[Frame], fps: float) -> None:
    """Write an MP4 under a temporary name beside its own, and rename it at the end.

    Raises:
        OSError: It cannot be written.
    """
    options: dict[str, Any] = {"fps": fps, "macro_block_size": 2, "codec": "libx264"}
    options["ffmpeg_log_level"] = "quiet"  # what went wrong is said in one line
    temporary = out.with_name(f".{out.stem}.tmp-{secrets.token_hex(4)}{out.suffix}")
    count = 0
    try:
        temporary.touch(exist_ok=False)
        writer: Any = imageio.get_writer(temporary, **options)
        with closing(writer):
            for picture in pictures:
                count += 1
                try:
                    writer.append_data(picture)
                except OSError as error:  # imageio's text is the whole command
                    raise OSError(None, f"ffmpeg ended early; {_LIKELY}") from error
        _require_whole(temporary, count)
        os.replace(temporary, out)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _require_whole(video: Path, count: int) -> None:
    """Read a video again, as imageio does not tell whether ffmpeg wrote all of it.

    Raises:
        OSError: Pictures are missing.
    """
    found = 0
    with suppress(Exception):  # of whatever reads a broken file
        reader: Any = imageio.get_reader(video)
        with closing(reader):
            found = reader.count_frames()
    if found < count:
        raise OSError(None, f"only {found} of {count} pictures are in it; {_LIKELY}")


def _fps(given: object) -> float:
    """Pictures per second, 30 for an environment that does not say."""
    known = isinstance(given, int | float) and 0 < given < math.inf
    return float(given) if known else 30.0  # type: ignore[arg-type]
