"""From a configuration to environments: those it trains on, is evaluated in, and that are drawn.

A setting of environments is handed to those that make and describe them here alone.
"""

from __future__ import annotations

from typing import Any

import gymnasium

from acktr.config import Config
from acktr.envs import AnyVectorEnv, EnvSource, Workers, describe, make_single, make_vec


def training_envs(config: Config, part: tuple[int, int] | None = None) -> AnyVectorEnv:
    """The environments that a configuration trains on; the caller closes them.

    ``part`` is the number of those that are wanted, and the number of the first; None for all.

    Raises:
        EnvError: They cannot be made; one line.
    """
    count, first = part or (config.num_envs, 0)
    apart = config.env_workers != 1
    return made(
        config, count, config.seed, env_workers=config.env_workers, apart=apart, first=first
    )


def evaluation_envs(config: Config, num_envs: int, seed: int) -> AnyVectorEnv:
    """Environments of the same kind with whole games and rewards; the caller closes them.

    Raises:
        EnvError: They cannot be made; one line.
    """
    return made(config, num_envs, seed, apart=config.env_workers != 1, training=False)


def made(
    config: Config,
    count: int,
    seed: int,
    *,
    source: EnvSource | None = None,
    env_workers: Workers = 1,
    apart: bool = False,
    first: int = 0,
    training: bool = True,
) -> AnyVectorEnv:
    """Environments by a configuration's settings, or those of a ``source`` of its own.

    The other arguments are those of :func:`acktr.envs.make_vec`.

    Raises:
        EnvError: They cannot be made; one line.
    """
    return make_vec(
        source or config.env,
        count,
        seed,
        first=first,
        training=training,
        atari=config.atari,
        pixels=config.pixels,
        env_workers=env_workers,
        env_timeout=config.env_timeout,
        apart=apart,
        env_kwargs=config.env_kwargs,
        wrappers=config.wrappers,
        record=config.record,
        masks=config.masks,
    )


def drawn(config: Config) -> gymnasium.Env[Any, Any]:
    """One environment that can be drawn.

    Raises:
        EnvError: It cannot be made; one line.
    """
    return make_single(
        config.env,
        atari=config.atari,
        pixels=config.pixels,
        env_kwargs=config.env_kwargs,
        wrappers=config.wrappers,
        env_timeout=config.env_timeout,
    )


def described(config: Config) -> dict[str, Any]:
    """What protocol.json says about the environments that a configuration trains on.

    Raises:
        EnvError: The id is unknown.
    """
    return describe(
        config.env, config.atari, True, config.env_kwargs, config.wrappers, config.pixels
    )
