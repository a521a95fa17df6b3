"""Construction of vector and single environments by id."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers import NormalizeObservation, NormalizeReward, vector

from acktr.envs.errors import EnvError, EnvWarning, check_integer, one_line
from acktr.envs.groups import GroupedEnvs
from acktr.envs.guard import GuardedVectorEnv
from acktr.envs.masks import FoundMasks, MaskSetting
from acktr.envs.parallel import ParallelEnvs, can_fork, thread_ids, worker_count
from acktr.envs.pixels import configured, protocol
from acktr.envs.registry import PIXELS, atari_game, is_atari_spec, lookup, pictured, uses_mujoco
from acktr.envs.rendering import choose_backend, drawn_by
from acktr.envs.settings import AtariSettings, PixelSettings, Workers
from acktr.envs.single import LimitedEnv, make_one
from acktr.envs.source import EnvLike, EnvSource, Wrapper
from acktr.envs.vector import AnyEnv, AnyVectorEnv, check_seed, inner_envs, layers, require_new
from acktr.envs.view import drawn_here
from acktr.envs.watch import TIMEOUT

MAX_ENVS = 16_384


_STATISTICS: tuple[tuple[type[Any], str | None, str], ...] = (
    (NormalizeObservation, "obs_rms", "observation"),
    (NormalizeReward, "return_rms", "reward"),
    (vector.NormalizeObservation, None, "observation"),
    (vector.NormalizeReward, None, "reward"),
)
"""Gymnasium's wrappers with running statistics, where new ones show it, and what they normalise."""


def make_vec(
    env: EnvLike | EnvSource,
    num_envs: int,
    seed: int = 0,
    *,
    training: bool = True,
    atari: AtariSettings | None = None,
    render_mode: str | None = None,
    env_workers: Workers = 1,
    env_kwargs: Mapping[str, Any] | None = None,
    wrappers: Sequence[Wrapper] = (),
    record: tuple[str, ...] = (),
    masks: MaskSetting = "auto",
    env_timeout: float = TIMEOUT,
    apart: bool = False,
    first: int = 0,
    pixels: PixelSettings | None = None,
) -> AnyVectorEnv:
    """Make parallel environments that keep the promises listed in the package's docstring.

    Args:
        env: Gymnasium id, `module:Id-v0`, `<Game>NoFrameskip-v4` or `ALE/<Game>-v5`; or what else
            `EnvSource` takes: a class, a function, a list of functions, one environment.
        num_envs: number of environments.
        seed: used by the first `reset()` that is given no seed.
        training: for Atari: clip rewards and let lost lives end returns, as the settings say.
        atari: the Atari protocol; ignored by other environments.
        render_mode: Gymnasium's render mode; Atari games are rendered by `make_single` only.
        env_workers: processes that step the environments, this one included, or "auto", which is
            `worker_count`. Steps do not depend on it. Atari games and rendering ones ignore it.
        env_kwargs: arguments of each environment, as `gymnasium.make` takes them.
        wrappers: around each environment, or their names as `module:Name`, the innermost first.
        record: keys of the infos of last steps, whose numbers are kept (promise 2).
        masks: where action masks come from, see `acktr.envs.masks`. What cannot be followed is an
            EnvError at the first reset; Atari games have none.
        env_timeout: seconds for making, resetting, stepping or closing one of them (promise 8).
        apart: whether environments that are not Gymnasium's own are stepped in other processes
            only, on Linux, so that this one survives what they do; but not those that no fork has:
            that render, have threads or use CUDA when made, or draw MuJoCo after this process did.
        first: number of the first among all that share a seed; other processes have the others.
        pixels: what is seen of `Pixels/` environments; ignored by others.

    Raises:
        EnvError: unknown id, bad argument, missing dependency or unsupported space; one line.
    """
    check_seed(seed)
    num_envs = check_integer("num_envs", num_envs, 1, MAX_ENVS)
    source = _source(env, env_kwargs, wrappers, env_timeout, pixels)
    workers = worker_count(env_workers, source.spec, num_envs)
    spec = _atari_spec(source)
    if spec is None:
        workers = 1 if render_mode else workers
        making = (record, masks, env_timeout, apart, first)
        envs = _make_parallel(source, num_envs, seed, render_mode, workers, *making)
        if not training:
            tell_statistics(next(iter(inner_envs(envs)), None), source.name)
        return envs
    _require_plain(spec, masks, record, render_mode)
    return _make_games(spec, num_envs, seed, atari or AtariSettings(), training, first)


def _require_plain(
    spec: EnvSpec, masks: MaskSetting, record: tuple[str, ...], render_mode: str | None
) -> None:
    """Raise EnvError for what parallel Atari games do not have."""
    if masks not in (None, "auto"):
        raise EnvError(f"masks={masks!r}: {spec.id} is an Atari game, which has no action masks")
    if record:
        raise EnvError("Atari games have nothing to record besides return and length")
    if render_mode is not None:
        raise EnvError("parallel Atari games cannot be rendered; render a single one")


def _make_games(
    spec: EnvSpec, num_envs: int, seed: int, settings: AtariSettings, training: bool, first: int
) -> AnyVectorEnv:
    """Atari games; ale-py is loaded for their ids only."""
    from acktr.envs.atari import make_atari

    return make_atari(atari_game(spec), num_envs, seed, settings, training=training, first=first)


def make_single(
    env_id: str,
    *,
    atari: AtariSettings | None = None,
    render_mode: str | None = "rgb_array",
    env_kwargs: Mapping[str, Any] | None = None,
    wrappers: Sequence[Wrapper] = (),
    env_timeout: float = TIMEOUT,
    pixels: PixelSettings | None = None,
) -> AnyEnv:
    """Make one environment with the protocol of evaluation, for videos.

    It does not reset by itself. Rewards are raw and only the end of the game terminates; Atari
    observations and FIRE are those of `make_vec(..., training=False)`.

    Raises:
        EnvError: unknown id, bad render mode, missing dependency or unsupported space.
    """
    source = _source(env_id, env_kwargs, wrappers, env_timeout, pixels)
    spec = _atari_spec(source)
    if spec is None:
        env = make_one(source, 0, render_mode, env_timeout)
        return LimitedEnv(env, f"environment 0 of {source.name}", env_timeout)
    if render_mode not in (None, "rgb_array"):
        raise EnvError(f"render_mode of Atari games must be 'rgb_array', got {render_mode!r}")
    from acktr.envs.atari_single import AtariSingle

    return AtariSingle(atari_game(spec), atari or AtariSettings(), render_mode=render_mode)


def _source(
    env: EnvLike | EnvSource,
    env_kwargs: Mapping[str, Any] | None,
    wrappers: Sequence[Wrapper],
    timeout: float,
    pixels: PixelSettings | None,
) -> EnvSource:
    """What makes environments, with the settings of pixels."""
    source = env
    if not isinstance(source, EnvSource):
        source = EnvSource(source, env_kwargs, wrappers, timeout)
    _prepare_pixels(source, pixels)
    return source


def _prepare_pixels(source: EnvSource, settings: PixelSettings | None) -> None:
    """Let a `Pixels/` id be made with settings, and see that MuJoCo can draw here.

    Raises:
        EnvError: It cannot.
    """
    if source.spec is not None and source.spec.namespace == PIXELS:
        source.spec = configured(source.spec, settings)
        if uses_mujoco(source.spec):
            choose_backend()


def _atari_spec(source: EnvSource) -> EnvSpec | None:
    """The specification of a game that the Atari protocol is for; None for anything else."""
    if source.spec is None or not source.registered or not is_atari_spec(source.spec):
        return None
    if source.kwargs or source.wrapped:
        raise EnvError(
            f"{source.name} has its own settings (atari.*) instead of env_kwargs and wrappers; a"
            " function that makes the environment may use both"
        )
    return source.spec


def workers(envs: AnyVectorEnv) -> int:
    """How many processes step these environments; 1 if `make_vec` did not make them."""
    inner = envs.unwrapped
    return inner.workers if isinstance(inner, ParallelEnvs) else 1


def is_among(env: object, envs: AnyVectorEnv) -> bool:
    """Whether something is those vector environments, or has one of them."""
    if not isinstance(env, gymnasium.Env | VectorEnv):
        return False
    theirs, ours = ({id(each.unwrapped) for each in (one, *inner_envs(one))} for one in (env, envs))
    return bool(theirs & ours)


def tell_statistics(outermost: Any, name: str) -> None:
    """Warn of wrappers, from the outermost on, whose running statistics are in one place alone.

    Args:
        outermost: A vector that is learned in, or an environment of an evaluation, whose statistics
            are those of training where they are not new.
        name: For messages.
    """
    for layer in layers(outermost):
        for kind, moments, what in _STATISTICS:
            if isinstance(layer, kind) and (not moments or getattr(layer, moments).count < 1):
                warnings.warn(
                    f"{name}: the statistics of {kind.__name__} are not the agent's, so that"
                    f" {what}s are others in evaluations than in training: leave it out;"
                    f" normalize_{what}=True has the agent do it",
                    EnvWarning,
                    stacklevel=5,
                )


def found_masks(envs: AnyVectorEnv) -> FoundMasks:
    """The action masks that environments were found to have; none before their first reset."""
    found = (getattr(layer, "found_masks", None) for layer in layers(envs))
    return next((each for each in found if isinstance(each, FoundMasks)), FoundMasks(None))


def group_count(envs: AnyVectorEnv) -> int:
    """How many groups can be stepped one by one: see `GroupedEnvs`; 1 for other environments."""
    return len(envs.groups) if isinstance(envs, GroupedEnvs) else 1


def drawer(env_id: str) -> str | None:
    """What draws the pictures of a `Pixels/` id that MuJoCo simulates; None for other ids.

    Raises:
        EnvError: The id is unknown, or nothing can draw.
    """
    spec = lookup(env_id)
    return drawn_by() if spec.namespace == PIXELS and uses_mujoco(spec) else None


def describe(
    env_id: str,
    atari: AtariSettings | None = None,
    training: bool = True,
    env_kwargs: Mapping[str, Any] | None = None,
    wrappers: Sequence[str] = (),
    pixels: PixelSettings | None = None,
) -> dict[str, Any]:
    """The protocol of `make_vec(env_id, ...)` as JSON values, for logs and config files.

    Raises:
        EnvError: as `make_vec` for the id.
    """
    spec = lookup(env_id)
    base = pictured(spec)
    facts: dict[str, Any] = {
        "env_id": spec.id,
        "autoreset_mode": AutoresetMode.SAME_STEP.value,
        "gymnasium": gymnasium.__version__,
    }
    if not is_atari_spec(spec):
        if uses_mujoco(spec):
            facts["mujoco"] = _version("mujoco")
        limit = (env_kwargs or {}).get("max_episode_steps", base.max_episode_steps)
        facts |= {"kind": "gymnasium", "max_episode_steps": limit}
        given = {"env_kwargs": dict(env_kwargs or {}), "wrappers": list(wrappers)}
        facts |= {name: value for name, value in given.items() if value}
        if base is spec:
            return facts
        source = EnvSource(env_id, env_kwargs)
        _prepare_pixels(source, pixels)
        return facts | protocol(spec, pixels or PixelSettings(), lambda: make_one(source, 0, None))
    game, settings = atari_game(spec), atari or AtariSettings()
    named = {"kind": "atari", "ale_py": _version("ale-py"), "game": game.rom, "training": training}
    facts |= named | dataclasses.asdict(settings)
    del facts["num_groups"]  # the games are the same for any number
    return facts | {
        "sticky": game.sticky if settings.sticky is None else float(settings.sticky),
        "max_pool": True,
        "grayscale": True,
        "life_loss_ends_return": training and settings.life_loss_ends_return,
        "clip_reward": training and settings.clip_reward,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _make_parallel(
    source: EnvSource,
    num_envs: int,
    seed: int,
    render_mode: str | None,
    workers: int,
    record: tuple[str, ...],
    masks: MaskSetting,
    timeout: float,
    apart: bool,
    first: int,
) -> AnyVectorEnv:
    if source.count not in (None, num_envs):
        raise EnvError(
            f"{num_envs} environments cannot be made: {source.name} is {source.origin}; give its"
            " id, or a class or function that makes it"
        )
    name = source.name
    built: list[AnyEnv] = []
    threads = thread_ids()
    try:
        for index in range(num_envs):
            new = make_one(source, index, render_mode, timeout)
            former, built = built, [one for one in built if one.unwrapped is not new.unwrapped]
            require_new(new, former, name)  # else whoever has it keeps it open
            built.append(new)
        apart = apart and source.foreign and not render_mode
        apart = apart and can_fork(threads)
        if source.spec is not None and source.spec.namespace == PIXELS and drawn_here():
            workers, apart = 1, False
        parallel = ParallelEnvs(built, name, workers, timeout, record, masks, apart)
        return GuardedVectorEnv(
            parallel, name, seed, record=record, bounded=source.foreign, first=first
        )
    except Exception as error:
        for env in built:
            with suppress(Exception):
                env.close()
        if isinstance(error, EnvError):
            raise
        raise EnvError(f"{name} cannot be run in parallel: {one_line(error)}") from error
