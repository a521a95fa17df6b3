"""What an agent is given: anything that makes environments in; them and a Config out."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gymnasium import Env
from gymnasium.vector import VectorEnv

from acktr.config import Algo, Config, ConfigError, preset, with_settings
from acktr.environments import made
from acktr.envs import (
    TIMEOUT,
    AnyVectorEnv,
    EnvError,
    EnvLike,
    EnvSource,
    GuardedVectorEnv,
    Wrapper,
    autoreset_mode,
    check_spaces,
    env_name,
    is_among,
    layers,
    space_difference,
    space_facts,
    tell_statistics,
    wrapper_name,
)


@dataclass(frozen=True)
class Given:
    """Environments and the configuration that goes with them."""

    envs: AnyVectorEnv
    config: Config
    origin: str | None
    """What no file can bring back of them, in words; None if the configuration says it all."""
    owned: bool
    """Whether they were made here."""
    source: EnvSource | None = None
    """What makes more of them; None for a vector environment."""


def take_envs(
    env: EnvLike | AnyVectorEnv,
    config: Config | None,
    algo: Algo,
    changes: Mapping[str, Any],
    *,
    num_envs: int | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    wrappers: Sequence[Wrapper] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Given:
    """Make the environments of an agent, or take those that are made.

    As in Stable-Baselines3, one ``gymnasium.Env`` is the only one of its agent. As a preset's
    updates are tuned to the steps of several, it makes as many as those together.

    Args:
        env: What they are made from, or a vector environment.
        config: Settings; None: the environment's preset.
        algo: The agent's algorithm.
        changes: Settings in place of the configuration's.
        num_envs: Number of environments; None: the configuration's.
        env_kwargs: Arguments of each environment; None: the configuration's.
        wrappers: Wrappers of each, or their names; None: the configuration's.
        settings: Further settings in place of the configuration's, as
            :class:`acktr.config.Settings` has them.

    Raises:
        EnvError: They cannot be made or have unsupported spaces.
        ConfigError: A setting cannot be used, or the configuration is another algorithm's.
    """
    if config is not None and not isinstance(config, Config):
        raise ConfigError(_misplaced(env, config))
    if isinstance(env, VectorEnv):
        given = _take_vector(env, config, algo, changes, num_envs, env_kwargs or wrappers)
        return dataclasses.replace(given, config=with_settings(given.config, settings or {}))
    if config is not None and not isinstance(env, Env):
        env_kwargs = config.env_kwargs if env_kwargs is None else env_kwargs
        wrappers = config.wrappers if wrappers is None else wrappers
    timeout = TIMEOUT if config is None else config.env_timeout
    source = EnvSource(env, env_kwargs, wrappers or (), timeout)
    chosen = _configured(env, source, config, algo)
    if num_envs is not None:
        changes = {**changes, "num_envs": num_envs}
    chosen = with_settings(dataclasses.replace(chosen, **changes), settings or {})
    count, workers = chosen.num_envs, chosen.env_workers
    envs = made(chosen, count, chosen.seed, source=source, env_workers=workers)
    return Given(envs, chosen, source.origin, not isinstance(env, Env), source)


def require_same(
    config: Config, env_kwargs: Mapping[str, Any] | None, wrappers: Sequence[Wrapper] | None
) -> None:
    """Refuse arguments and wrappers that are not those of a saved agent.

    Raises:
        ConfigError: They are given and differ.
    """
    names = None if wrappers is None else tuple(map(wrapper_name, wrappers))
    for name, asked in (("env_kwargs", env_kwargs), ("wrappers", names)):
        trained = getattr(config, name)
        if asked is not None and asked != trained:
            raise ConfigError(
                f"{name} is {asked!r} but the agent was trained with {trained!r}: leave it out, or"
                " give env= too for another environment"
            )


@contextmanager
def closed_on_failure(given: Given) -> Iterator[None]:
    """Close environments that were made here if what follows fails."""
    try:
        yield
    except BaseException:
        if given.owned:
            given.envs.close()
        raise


def moved(
    given: Given,
    env: EnvLike | AnyVectorEnv,
    num_envs: int | None,
    env_kwargs: Mapping[str, Any] | None,
    wrappers: Sequence[Wrapper] | None,
) -> Given:
    """Other environments for an agent, with arguments and wrappers of their own.

    Updates keep their number of samples whatever the number of environments, as where one
    environment is given to :func:`take_envs`.

    Raises:
        EnvError, ConfigError: As :func:`take_envs`.
    """
    name = env if isinstance(env, str) else given.config.env
    config = dataclasses.replace(given.config, env=name, env_kwargs={}, wrappers=())
    found = take_envs(
        env,
        config,
        config.algo,
        {},
        num_envs=num_envs,
        env_kwargs=env_kwargs,
        wrappers=wrappers,
    )
    steps = _steps_of(config, found.config.num_envs)
    return dataclasses.replace(found, config=dataclasses.replace(found.config, num_steps=steps))


def same_samples(
    env: EnvLike | AnyVectorEnv, config: Config, num_envs: int | None
) -> tuple[EnvLike | AnyVectorEnv, Config]:
    """Where a saved agent goes on, and its configuration with as many samples in an update.

    Args:
        env: Where.
        config: The saved configuration.
        num_envs: What is asked for in place of its number of environments.
    """
    count: object = env.num_envs if isinstance(env, VectorEnv) else num_envs
    if isinstance(env, list | tuple):
        count = len(env)
    if not isinstance(count, int) or count < 1:  # the same, or refused where they are made
        return env, config
    return env, dataclasses.replace(config, num_steps=_steps_of(config, count))


def _steps_of(config: Config, count: int) -> int:
    """Steps of so many environments that keep the samples of an update; told if none do."""
    samples = config.num_envs * config.num_steps
    steps = max(1, round(samples / count))
    if steps * count != samples:
        warnings.warn(
            f"updates have {steps * count} samples from now on, num_steps={steps} in each of"
            f" {count} environments: {samples}, as before, is no multiple of {count}",
            UserWarning,
            stacklevel=4,
        )
    return steps


@contextmanager
def evaluation_place(
    given: Given, env: EnvLike | AnyVectorEnv | None, num_envs: int, seed: int, key: str | None
) -> Iterator[AnyVectorEnv]:
    """Environments with whole games and rewards, which are closed again if they were made here.

    Args:
        given: Those that the agent learns in.
        env: Where to play; None: in more of those.
        num_envs: How many, unless they are made already.
        seed: Of the environments.
        key: A key of infos to record besides the configuration's.

    Raises:
        EnvError: They cannot be made, or have other spaces.
    """
    config = given.config
    if key is not None:
        record = tuple(dict.fromkeys((*config.record, key)))
        config = dataclasses.replace(config, record=record)
    if isinstance(env, VectorEnv):
        autoreset_mode(env)
        envs = _guarded(env, env_name(env), config)
    else:
        source = given.source
        if env is not None:
            source = EnvSource(env, timeout=config.env_timeout)
        if source is None or (env is None and source.count is not None):
            raise EnvError(f"the agent learns in {given.origin}: evaluate(env=...) needs others")
        envs = made(config, source.count or num_envs, seed, source=source, training=False)
        if not isinstance(env, Env) and is_among(envs, given.envs):  # which stays open
            raise EnvError(
                f"{source.name}: the function gave an environment that the agent learns in: it must"
                " make a new one each time"
            )
    try:
        require_same_spaces(given.envs, envs)
        yield envs
    finally:
        if not isinstance(env, Env | VectorEnv):
            envs.close()


def require_same_spaces(ours: AnyVectorEnv, theirs: AnyVectorEnv) -> None:
    """Refuse environments of other spaces than those that an agent was made for.

    Raises:
        EnvError: A space differs.
    """
    facts = (
        space_facts(envs.single_observation_space, envs.single_action_space)
        for envs in (ours, theirs)
    )
    if (other := space_difference(*facts)) is not None:
        raise EnvError(other)


def _take_vector(
    envs: AnyVectorEnv,
    config: Config | None,
    algo: Algo,
    changes: Mapping[str, Any],
    num_envs: int | None,
    settings: object,
) -> Given:
    """Take a vector environment as it is, apart from checks around it."""
    if settings or num_envs not in (None, envs.num_envs):
        raise EnvError(
            "num_envs, env_kwargs and wrappers cannot be given to a VectorEnv, whose environments"
            " are made already: give their id, or a class or function that makes one"
        )
    check_spaces(envs.single_observation_space, envs.single_action_space)
    name = env_name(envs)
    tell_statistics(envs, name)
    chosen = dataclasses.replace(
        _configuration(name, config, algo),
        env=name,
        num_envs=envs.num_envs,
        env_kwargs={},
        wrappers=(),
        **changes,
    )
    guarded = _guarded(envs, name, chosen)
    return Given(guarded, chosen, "a vector environment that was made already", owned=False)


def _configured(env: EnvLike, source: EnvSource, config: Config | None, algo: Algo) -> Config:
    """The configuration, or the environment's preset, with what the source says of itself."""
    name = env if isinstance(env, str) else source.name
    chosen = _configuration(name, config, algo)
    if isinstance(env, str) and chosen.env != env:
        raise ConfigError(f"env is {env!r} but the configuration is for {chosen.env!r}")
    if isinstance(env, Env) and config is None:
        chosen = dataclasses.replace(chosen, num_steps=chosen.num_envs * chosen.num_steps)
    return dataclasses.replace(
        chosen,
        env=name,
        num_envs=chosen.num_envs if source.count is None else source.count,
        env_kwargs=source.json_kwargs,
        wrappers=source.wrapper_names,
    )


def _configuration(name: str, config: Config | None, algo: Algo) -> Config:
    chosen = config or preset(name, algo)[0]
    if chosen.algo != algo:
        raise ConfigError(
            f"algo is {chosen.algo!r} in the configuration: use {chosen.algo.upper()}"
        )
    return chosen


def _misplaced(env: object, config: object) -> str:
    if isinstance(env, str) and env.endswith("Policy"):
        return (
            f"({env!r}, env) is the order of Stable-Baselines3: write ACKTR(env) here; the network"
            " follows the spaces, and network= takes one of your own"
        )
    if isinstance(config, str | Env | VectorEnv):
        return "the environment comes first: ACKTR(env), with a network of one's own as network="
    return f"config must be an acktr.Config, got a {type(config).__name__}"


def _guarded(envs: AnyVectorEnv, name: str, config: Config) -> AnyVectorEnv:
    """Add finite checks and episode statistics unless the environment has them from make_vec."""
    for layer in layers(envs):
        if getattr(type(layer), "reports_episodes", False):
            if config.record != getattr(layer, "record", ()):
                raise EnvError(f"{name} was made by make_vec: give record= to that as well")
            return envs
    return GuardedVectorEnv(
        envs,
        name,
        config.seed,
        foreign=True,
        record=config.record,
        masks=config.masks,
        timeout=config.env_timeout,
    )
