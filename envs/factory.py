"""Construction of vector and single environments by id."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from contextlib import suppress

import gymnasium
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode

from acktr.envs.errors import EnvError, check_integer, one_line
from acktr.envs.groups import GroupedEnvs
from acktr.envs.guard import GuardedVectorEnv
from acktr.envs.parallel import ParallelEnvs, worker_count
from acktr.envs.registry import atari_game, is_atari_spec, lookup, uses_mujoco
from acktr.envs.settings import AtariSettings, Workers
from acktr.envs.single import make_one
from acktr.envs.vector import AnyEnv, AnyVectorEnv, check_seed

MAX_ENVS = 16_384

Scalar = str | int | float | bool | None


def make_vec(
    env_id: str,
    num_envs: int,
    seed: int = 0,
    *,
    training: bool = True,
    atari: AtariSettings | None = None,
    render_mode: str | None = None,
    env_workers: Workers = 1,
) -> AnyVectorEnv:
    """Make parallel environments that keep the promises listed in the package's docstring.

    Args:
        env_id: Gymnasium id, `module:Id-v0`, `<Game>NoFrameskip-v4` or `ALE/<Game>-v5`.
        num_envs: number of environments.
        seed: used by the first `reset()` that is given no seed.
        training: for Atari: clip rewards and let lost lives end returns, as the settings say.
        atari: the Atari protocol; ignored by other environments.
        render_mode: Gymnasium's render mode; Atari games are rendered by `make_single` only.
        env_workers: processes that step the environments, this one included, or "auto": as many
            as `worker_count` says. Steps do not depend on it. Atari games have
            threads of their own and environments that render stay here: both ignore it.

    Raises:
        EnvError: unknown id, bad argument, missing dependency or unsupported space; one line.
    """
    check_seed(seed)
    check_integer("num_envs", num_envs, 1, MAX_ENVS)
    spec = lookup(env_id)
    workers = worker_count(env_workers, spec, num_envs)
    if not is_atari_spec(spec):
        return _make_parallel(spec, num_envs, seed, render_mode, 1 if render_mode else workers)
    if render_mode is not None:
        raise EnvError("parallel Atari games cannot be rendered; render a single one")
    from acktr.envs.atari import make_atari  # ale-py is loaded for Atari ids only

    settings = atari or AtariSettings()
    return make_atari(atari_game(spec), num_envs, seed, settings, training=training)


def make_single(
    env_id: str, *, atari: AtariSettings | None = None, render_mode: str | None = "rgb_array"
) -> AnyEnv:
    """Make one environment with the protocol of evaluation, for videos.

    It does not reset by itself. Rewards are raw and only the end of the game terminates; Atari
    observations and FIRE are those of `make_vec(..., training=False)`.

    Raises:
        EnvError: unknown id, bad render mode, missing dependency or unsupported space.
    """
    spec = lookup(env_id)
    if not is_atari_spec(spec):
        return make_one(spec, 0, render_mode)
    if render_mode not in (None, "rgb_array"):
        raise EnvError(f"render_mode of Atari games must be 'rgb_array', got {render_mode!r}")
    from acktr.envs.atari_single import AtariSingle

    return AtariSingle(atari_game(spec), atari or AtariSettings(), render_mode=render_mode)


def workers(envs: AnyVectorEnv) -> int:
    """How many processes step these environments; 1 if `make_vec` did not make them."""
    inner = envs.unwrapped
    return inner.workers if isinstance(inner, ParallelEnvs) else 1


def group_count(envs: AnyVectorEnv) -> int:
    """How many groups can be stepped one by one: see `GroupedEnvs`; 1 for other environments."""
    return len(envs.groups) if isinstance(envs, GroupedEnvs) else 1


def describe(
    env_id: str, atari: AtariSettings | None = None, training: bool = True
) -> dict[str, Scalar]:
    """The protocol of `make_vec(env_id, ...)` as JSON scalars, for logs and config files.

    Raises:
        EnvError: as `make_vec` for the id.
    """
    spec = lookup(env_id)
    facts: dict[str, Scalar] = {
        "env_id": spec.id,
        "autoreset_mode": AutoresetMode.SAME_STEP.value,
        "gymnasium": gymnasium.__version__,
    }
    if not is_atari_spec(spec):
        if uses_mujoco(spec):
            facts["mujoco"] = _version("mujoco")
        return facts | {"kind": "gymnasium", "max_episode_steps": spec.max_episode_steps}
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
    spec: EnvSpec, num_envs: int, seed: int, render_mode: str | None, workers: int
) -> AnyVectorEnv:
    built: list[AnyEnv] = []
    try:
        for index in range(num_envs):
            built.append(make_one(spec, index, render_mode))
        return GuardedVectorEnv(ParallelEnvs(built, spec.id, workers), spec.id, seed)
    except Exception as error:
        for env in built:
            with suppress(Exception):
                env.close()
        if isinstance(error, EnvError):
            raise
        raise EnvError(f"{spec.id} cannot be run in parallel: {one_line(error)}") from error
