"""A learning rate given to an agent in Python: a number, or a function of what remains."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

from acktr.config.schema import ConfigError
from acktr.config.settings import Config

LearningRate = Callable[[float], float]
"""Step size by the part of the training that remains, from 1 to 0, as in Stable-Baselines3."""


def with_learning_rate(
    config: Config, rate: float | LearningRate | None
) -> tuple[Config, LearningRate | None]:
    """The configuration with a constant step size of the policy, or the function beside it.

    Raises:
        ConfigError: The algorithm has no such setting, or another one that excludes it; the number
            is not positive.
    """
    if rate is None:
        return config, None
    if config.algo == "trpo":
        raise ConfigError("trpo has no learning rate: trpo.max_kl bounds its steps")
    if config.algo == "acktr" and config.acktr.target_kl is not None:
        raise ConfigError("acktr.target_kl adapts the learning rate: give one of the two")
    if callable(rate):
        return config, rate
    given: Any = rate
    number = isinstance(given, numbers.Real) and not isinstance(given, bool)
    if not number or not 0 < given < math.inf:
        raise ConfigError(
            f"learning_rate must be a finite number > 0 or a function of one, got {given!r:.40}"
        )
    lr = float(given)
    if config.algo == "a2c":
        a2c = dataclasses.replace(config.a2c, lr=lr, lr_schedule="constant")
        return dataclasses.replace(config, a2c=a2c), None
    actor = dataclasses.replace(config.acktr.actor, lr=lr)
    acktr = dataclasses.replace(config.acktr, actor=actor, lr_schedule="constant")
    return dataclasses.replace(config, acktr=acktr), None


def rate_at(rate: LearningRate, progress: float) -> float:
    """What the function gives after a part of the training.

    Raises:
        ConfigError: It is no finite number of at least 0.
    """
    remaining = 1 - progress
    lr = float(rate(remaining))
    if not 0 <= lr < math.inf:
        raise ConfigError(f"learning_rate({remaining:.3g}) must be a number >= 0, got {lr}")
    return lr
