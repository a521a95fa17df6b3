"""Look-up of environment ids in Gymnasium's registry, with one-line errors."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import re
import sys
import warnings
from dataclasses import dataclass

import gymnasium
from gymnasium.envs.registration import EnvSpec, find_highest_version, get_env_id, parse_env_id

from acktr.envs.errors import EnvError, named, one_line

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_ATARI_KWARGS = {
    "game",
    "repeat_action_probability",
    "full_action_space",
    "frameskip",
    "max_num_frames_per_episode",
}


PIXELS = "Pixels"
"""Namespace of ids whose observations are pictures: `Pixels/Id-v0` of `Id-v0`."""


@dataclass(frozen=True)
class AtariGame:
    """An Atari game as registered by ale-py."""

    rom: str
    """Name of the ROM, for example `space_invaders`."""
    sticky: float
    """Probability of repeating the last action that the id stands for."""


def lookup(env_id: str) -> EnvSpec:
    """Find the specification of `env_id`; `module:Id` imports the module first.

    An id without version means the highest one, `Pixels/Id-v0` the pictures of `Id-v0`. ale-py is
    imported only if the id is not known without it.

    Raises:
        EnvError: the id is unknown (with the nearest known one) or its module cannot be imported.
    """
    if not isinstance(env_id, str) or not env_id.strip():
        raise EnvError(f"the environment id must be a name such as CartPole-v1, got {env_id!r}")
    module, colon, name = env_id.rpartition(":")
    if colon:
        if not module or ":" in module:
            raise EnvError(f"{env_id!r} is not an environment id; write Id-v0 or module:Id-v0")
        try:
            importlib.import_module(module)
        except Exception as error:
            where = f"module {module!r} of environment {env_id!r}"
            raise EnvError(f"cannot import {where}: {named(error)}") from error
    if name.startswith(f"{PIXELS}/"):
        return _pixel_spec(lookup(name.partition("/")[2]))
    spec = _registered(name)
    if spec is None:
        with contextlib.suppress(ImportError):
            importlib.import_module("ale_py")  # registers its ids with Gymnasium
        spec = _registered(name)
    if spec is None and colon and callable(getattr(sys.modules.get(module), name, None)):
        raise EnvError(
            f"{env_id} is no id: call gymnasium.register('{name}-v0', {name}) in {module} and write"
            f" {module}:{name}-v0"
        )
    if spec is None:
        raise EnvError(_unknown(name))
    return spec


def is_atari_spec(spec: EnvSpec) -> bool:
    """Whether the environment is implemented by ale-py."""
    return isinstance(spec.entry_point, str) and spec.entry_point.startswith("ale_py")


def pictured(spec: EnvSpec) -> EnvSpec:
    """What is behind the pictures of a `Pixels/` id; another specification as it is."""
    return lookup(spec.kwargs["base"]) if spec.namespace == PIXELS else spec


def is_gymnasiums(spec: EnvSpec | None) -> bool:
    """Whether the environment, or the one behind its pictures, is one of Gymnasium's own."""
    entry = None if spec is None else pictured(spec).entry_point
    return isinstance(entry, str) and entry.startswith("gymnasium.envs.")


def uses_mujoco(spec: EnvSpec) -> bool:
    """Whether MuJoCo simulates the environment, as far as the name of its module says."""
    entry = pictured(spec).entry_point
    return isinstance(entry, str) and "mujoco" in entry


def is_atari(env_id: str) -> bool:
    """Whether `env_id` is an Atari game.

    Raises:
        EnvError: the id is unknown.
    """
    return is_atari_spec(lookup(env_id))


def atari_game(spec: EnvSpec) -> AtariGame:
    """The game and stickiness of an Atari id, after checking that its ROM can be loaded.

    Raises:
        EnvError: the id stands for random frame skips or other settings that the Atari protocol
            has no place for, or the ROM is missing or damaged.
    """
    if _skips_randomly(spec):
        good = f"{spec.name}NoFrameskip-v4"
        raise EnvError(
            f"{spec.id} skips a random number of frames, which is not supported; "
            f"did you mean {good!r} or 'ALE/{spec.name}-v5'?"
        )
    unknown = sorted(set(spec.kwargs) - _ATARI_KWARGS)
    if unknown:
        raise EnvError(f"{spec.id} is registered with unsupported Atari settings: {unknown}")
    # The native code ends the process on a ROM that it cannot load: check its name and checksum.
    from ale_py import roms

    rom = str(spec.kwargs.get("game"))
    try:
        path = roms.get_rom_path(rom) if rom in roms.get_all_rom_ids() else None
    except OSError as error:
        raise EnvError(f"the ROM of {spec.id} cannot be used: {one_line(error)}") from error
    if path is None:
        raise EnvError(f"the ROM {rom!r} of {spec.id} is not one that ale-py knows")
    return AtariGame(rom, float(spec.kwargs.get("repeat_action_probability", 0.25)))


def mujoco_py_replacements(spec: EnvSpec) -> list[str]:
    """Ids that replace a v2 or v3 MuJoCo id, which Gymnasium registers only to refuse it."""
    if getattr(spec.entry_point, "__name__", "") != "_raise_mujoco_py_error":
        return []
    return [
        other.id
        for other in gymnasium.registry.values()
        if other.name == spec.name and other.namespace is None and (other.version or 0) >= 4
    ]


def _pixel_spec(base: EnvSpec) -> EnvSpec:
    """The specification of an environment's pictures, without their settings."""
    if is_atari_spec(base):
        raise EnvError(
            f"{base.id} is an Atari game, seen by its pictures anyway: no {PIXELS}/ then"
        )
    if base.namespace is not None:
        raise EnvError(
            f"{base.id} has a namespace, which Gymnasium allows only one of: register it without"
        )
    return EnvSpec(
        id=f"{PIXELS}/{base.id}",
        entry_point="acktr.envs.pixels:make_pixels",
        reward_threshold=base.reward_threshold,
        nondeterministic=base.nondeterministic,
        kwargs={"base": base.id, "settings": {}},
    )


def _skips_randomly(spec: EnvSpec) -> bool:
    return not isinstance(spec.kwargs.get("frameskip", 4), int)


def _registered(name: str) -> EnvSpec | None:
    if name in gymnasium.registry:
        return gymnasium.registry[name]
    try:
        namespace, base, version = parse_env_id(name)
    except gymnasium.error.Error:
        return None
    highest = find_highest_version(namespace, base) if version is None else None
    return None if highest is None else gymnasium.registry[get_env_id(namespace, base, highest)]


def _unknown(name: str) -> str:
    known = [
        spec.id
        for spec in gymnasium.registry.values()
        if not mujoco_py_replacements(spec) and not (is_atari_spec(spec) and _skips_randomly(spec))
    ]
    folded = {known_id.casefold(): known_id for known_id in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=1)
    hint = f"; did you mean {folded[near[0]]!r}?" if near else ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says more
            gymnasium.spec(name)
        reason = ""
    except gymnasium.error.Error as error:
        reason = f" ({_ANSI.sub('', one_line(error))})"
    if near and "Did you mean" in reason:
        reason = ""  # the same hint, less complete
    if name.startswith("ALE/") and not any(known_id.startswith("ALE/") for known_id in known):
        reason = " (install ale-py for Atari games)"
    return f"unknown environment {name!r}{hint}{reason}"
