"""Settings of the environment layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from acktr.envs.errors import EnvError, check_integer

Workers = int | Literal["auto"]
"""Processes that step environments, the main one included; "auto": see `worker_count`."""


@dataclass(frozen=True, kw_only=True)
class AtariSettings:
    """The Atari protocol; the defaults are the published one (Machado et al. 2018, NoFrameskip-v4).

    Raises:
        EnvError: a value has the wrong type or lies outside its range.
    """

    frame_skip: int = 4
    """Emulator frames per agent step; the observation is the maximum of the last two."""
    screen_size: int = 84
    """Side of the square grey image in pixels."""
    frame_stack: int = 4
    """Images per observation."""
    noop_max: int = 30
    """Most no-op actions at the start of a game."""
    fire_reset: bool = True
    """Press FIRE at the start of a game that needs it."""
    fire_after_life_loss: bool = True
    """Press FIRE after a lost life too; that step is masked out of learning."""
    life_loss_ends_return: bool = True
    """In training a lost life ends the return, but not the game."""
    clip_reward: bool = True
    """In training learn from the sign of the reward; logged returns are never clipped."""
    sticky: float | None = None
    """Chance of repeating the last action; None: 0 for NoFrameskip-v4 ids, 0.25 for ALE/ ids."""
    full_action_space: bool = False
    """All 18 actions instead of the game's own."""
    max_frames: int = 108_000
    """Emulator frames after which a game is truncated (30 minutes of play)."""
    num_threads: int = 0
    """Threads stepping the emulators of a group; 0: as many as there are cores."""
    num_groups: int = 2
    """Most groups of equal size: while one is stepped, the actions of another can be chosen."""
    reseed_steps: int = 10_000
    """In training a game that ends so many agent steps after it was seeded goes on with a new seed:
    a resumed run plays the games again from there. 0: never, and games start anew at a resume."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            default = getattr(type(self), name)
            if name in _RANGES:
                check_integer(f"atari.{name}", value, *_RANGES[name])
            elif isinstance(default, bool) and not isinstance(value, bool):
                raise EnvError(f"atari.{name} must be true or false, got {value!r}")
        number = isinstance(self.sticky, int | float) and not isinstance(self.sticky, bool)
        if self.sticky is not None and not (number and 0 <= self.sticky < 1):
            raise EnvError(
                f"atari.sticky must be a probability p with 0 <= p < 1, got {self.sticky!r}"
            )


@dataclass(frozen=True, kw_only=True)
class PixelSettings:
    """What an agent sees of `Pixels/` environments.

    Raises:
        EnvError: a value has the wrong type or lies outside its range.
    """

    size: int = 64
    """Sides of the square pictures in pixels."""
    frame_stack: int = 3
    """Pictures per observation, three channels each."""
    frame_skip: int = 1
    """Steps of the environment per agent step, with the same action and one picture at the end."""
    camera: str = "auto"
    """Camera of MuJoCo's model; auto: the one that follows the robot, or free where none does."""
    shadows: bool = False
    """Draw shadows (MuJoCo), which takes several times as long."""
    multisample: int = 0
    """Samples a pixel (MuJoCo)."""
    blank_start: bool = False
    """Zeros stand for the pictures before the first, and not the first itself."""

    def __post_init__(self) -> None:
        for name, limits in _PIXEL_RANGES.items():
            check_integer(f"pixels.{name}", getattr(self, name), *limits)
        for name in ("shadows", "blank_start"):
            if not isinstance(getattr(self, name), bool):
                raise EnvError(f"pixels.{name} must be true or false, got {getattr(self, name)!r}")
        if not isinstance(self.camera, str) or not 0 < len(self.camera) <= 100:
            raise EnvError(f"pixels.camera must be the name of a camera, got {self.camera!r:.120}")


_PIXEL_RANGES = {
    "size": (16, 512),
    "frame_stack": (1, 64),
    "frame_skip": (1, 100),
    "multisample": (0, 16),
}
_RANGES = {
    "frame_skip": (1, 100),
    "screen_size": (8, 512),
    "frame_stack": (1, 64),
    "noop_max": (0, 10_000),
    "max_frames": (1, 100_000_000),
    "num_threads": (0, 1024),
    "num_groups": (1, 1024),
    "reseed_steps": (0, 100_000_000),
}
"""Least and largest values of the integer settings."""
