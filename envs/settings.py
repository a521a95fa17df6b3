"""Settings of the environment layer."""

from __future__ import annotations

import math
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

    def __post_init__(self) -> None:
        check_integer("atari.frame_skip", self.frame_skip, 1, 100)
        check_integer("atari.screen_size", self.screen_size, 8, 512)
        check_integer("atari.frame_stack", self.frame_stack, 1, 64)
        check_integer("atari.noop_max", self.noop_max, 0, 10_000)
        check_integer("atari.max_frames", self.max_frames, 1, 100_000_000)
        check_integer("atari.num_threads", self.num_threads, 0, 1024)
        check_integer("atari.num_groups", self.num_groups, 1, 1024)
        for name in (
            "fire_reset",
            "fire_after_life_loss",
            "life_loss_ends_return",
            "clip_reward",
            "full_action_space",
        ):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise EnvError(f"atari.{name} must be true or false, got {value!r}")
        if self.sticky is not None:
            _check_probability("sticky", self.sticky)


def _check_probability(name: str, value: object) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    if not (ok and isinstance(value, int | float) and math.isfinite(value) and 0 <= value < 1):
        raise EnvError(f"atari.{name} must be a probability p with 0 <= p < 1, got {value!r}")
