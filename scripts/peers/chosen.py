"""Where the settings of a run come from: our configuration, a published table, a file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gymnasium import spaces

from acktr.config import ConfigError
from acktr.config import to_dict as config_to_dict
from acktr.envs import make_vec
from acktr.files import read_object
from acktr.presets import preset
from scripts.peers.errors import PeerError
from scripts.peers.settings import Settings, overlay, read_settings, to_dict
from scripts.peers.translate import OURS, translate

_PUBLISHED = Path(__file__).with_name("ppo.json")
_VERSION = re.compile(r"-v\d+$")


@dataclass(frozen=True)
class Chosen:
    """Settings and one line that says where they come from."""

    settings: Settings
    source: str


def choose(peer: str, env: str, like: Path | None, changes: Path | None) -> Chosen:
    """The settings of a peer for an environment.

    Args:
        peer: sb3-a2c, sb3-trpo or sb3-ppo.
        env: Environment id.
        like: Run or config.json of ours to equal (sb3-a2c and sb3-trpo); our preset if None.
        changes: JSON file with settings that replace others.

    Raises:
        PeerError: There are none, or a file cannot be used; one line.
        EnvError: The environment cannot be made.
    """
    edits = None if changes is None else read_json(changes)
    found = _published(env, edits is not None) if peer == "sb3-ppo" else _ours(peer, env, like)
    if edits is None:
        return found
    try:
        settings = read_settings(peer, overlay(to_dict(found.settings), edits))
    except PeerError as error:
        raise PeerError(f"{changes}: {error}") from error
    return Chosen(settings, f"{found.source}, changed by a file of settings")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        PeerError: It cannot be read, is larger than 1 MiB or is no JSON object.
    """
    try:
        return read_object(path)
    except ValueError as error:
        raise PeerError(str(error)) from error


def _ours(peer: str, env: str, like: Path | None) -> Chosen:
    if like is None:
        return _preset(peer, env)
    path = like / "config.json" if like.is_dir() else like
    config = read_json(path)
    if config.get("env") != env:
        raise PeerError(f"{path}: a configuration for {config.get('env')!r}, not for {env!r}")
    try:
        return _translated(peer, env, config, f"a run of {OURS[peer]}")
    except PeerError as error:
        raise PeerError(f"{path}: {error}") from error


def _preset(peer: str, env: str) -> Chosen:
    try:
        config, source = preset(env, OURS[peer])
    except ConfigError as error:
        raise PeerError(f"{peer} without --like takes our preset: {error}") from error
    values = json.loads(json.dumps(config_to_dict(config)))
    return _translated(peer, env, values, source)


def _translated(peer: str, env: str, config: Mapping[str, Any], source: str) -> Chosen:
    parts = kl_parts(env)
    settings = translate(peer, config, parts)
    divided = f"; KL and damping divided by {parts} action dimensions" if parts > 1 else ""
    return Chosen(settings, f"translated from {source}{divided if peer == 'sb3-trpo' else ''}")


def kl_parts(env: str) -> int:
    """Numbers over which the peers average what is one KL: the dimensions of a vector of actions.

    Raises:
        EnvError: The environment cannot be made.
    """
    envs = make_vec(env, 1)
    space = envs.single_action_space
    envs.close()
    return math.prod(space.shape) if isinstance(space, spaces.Box | spaces.MultiBinary) else 1


def _published(env: str, changed: bool) -> Chosen:
    """The published settings; the library's defaults with normalisation for a file to change."""
    table = read_json(_PUBLISHED)
    environments: Mapping[str, Any] = table["environments"]
    name = _VERSION.sub("", env)
    if name not in environments and not changed:
        raise PeerError(
            f"no published settings of PPO for {env}: there are some for"
            f" {', '.join(environments)}; or give --settings FILE"
        )
    values = overlay(table["defaults"], environments.get(name, {}))
    source = table["source"] if name in environments else "defaults of stable-baselines3"
    return Chosen(read_settings("sb3-ppo", values), source)
