"""The environments that a configuration trains on, and those that it is evaluated in."""

from __future__ import annotations

from acktr.config import Config
from acktr.envs import AnyVectorEnv, Workers, make_vec


def training_envs(config: Config, part: tuple[int, int] | None = None) -> AnyVectorEnv:
    """The environments that a configuration trains on; the caller closes them.

    ``part`` is the number of those that are wanted, and the number of the first; None for all.

    Raises:
        EnvError: They cannot be made; one line.
    """
    count, first = part or (config.num_envs, 0)
    return _made(config, count, config.seed, config.env_workers, first=first)


def evaluation_envs(config: Config, num_envs: int, seed: int) -> AnyVectorEnv:
    """Environments of the same kind with whole games and rewards; the caller closes them.

    Raises:
        EnvError: They cannot be made; one line.
    """
    return _made(config, num_envs, seed, training=False)


def _made(
    config: Config,
    count: int,
    seed: int,
    env_workers: Workers = 1,
    *,
    first: int = 0,
    training: bool = True,
) -> AnyVectorEnv:
    return make_vec(
        config.env,
        count,
        seed,
        first=first,
        training=training,
        atari=config.atari,
        pixels=config.pixels,
        env_workers=env_workers,
        env_timeout=config.env_timeout,
        apart=config.env_workers != 1,
        env_kwargs=config.env_kwargs,
        wrappers=config.wrappers,
        record=config.record,
        masks=config.masks,
    )
