"""Settings that earlier versions wrote to their files, in the words of this one."""

from __future__ import annotations

import copy
import typing
from collections.abc import Mapping
from typing import Any

from acktr.config.schema import ConfigError
from acktr.kfac import Structure

_UNUSED: dict[str, Any] = {
    "env_backend": "gymnasium",
    "acktr.actor.norm_clip": None,
    "acktr.actor.refresh_staleness": None,
    "acktr.critic.norm_clip": None,
    "acktr.critic.refresh_staleness": None,
}
"""Settings that were removed, with the value that changed nothing."""

_STRUCTURES: dict[tuple[str, str, bool], str] = {
    ("kfac", "eigen", False): "kfac",
    ("kfac", "eigen", True): "kfac_factored",
    ("kfac", "cholesky", True): "cholesky",
    ("ekfac", "eigen", False): "ekfac",
    ("tridiagonal", "eigen", True): "tridiagonal",
    ("tridiagonal", "cholesky", True): "tridiagonal",
}
"""K-FAC's structure by the three settings that stood for it."""

_CHOICES = ", ".join(typing.get_args(Structure))
_THREE = ("structure", "inverse", "factored_damping")


def translated(values: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a file without those of earlier versions.

    Args:
        values: All or part of a run's settings, as JSON values.
        base: The settings that they are laid over; what is not in it has its default.

    Raises:
        ConfigError: A setting of an earlier version whose value nothing here follows.
    """
    settings = copy.deepcopy(dict(values))
    for name, neutral in _UNUSED.items():
        *groups, key = name.split(".")
        value = _group(settings, *groups).pop(key, neutral)
        if value != neutral:
            raise ConfigError(
                f"configuration: {name} was removed and only {neutral!r} can still be read,"
                f" got {value!r:.40}; an earlier version of acktr can use it"
            )
    for network in ("actor", "critic"):
        group = _group(settings, "acktr", network)
        if "inverse" in group or "factored_damping" in group:
            start = _group(base, "acktr", network).get("structure", "kfac")
            known = next(three for three, name in _STRUCTURES.items() if name == start)
            three = [group.pop(key, old) for key, old in zip(_THREE, known, strict=True)]
            fits = isinstance(three[-1], bool)  # 1 equals True
            names = [n for combined, n in _STRUCTURES.items() if fits and [*combined] == three]
            if not names:
                said = ", ".join(f"{k}={v!r:.40}" for k, v in zip(_THREE, three, strict=True))
                raise ConfigError(
                    f"acktr.{network}: {said} cannot go together; write structure as one of"
                    f" {_CHOICES} alone"
                )
            group["structure"] = names[0]
    return settings


def _group(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """A group of settings inside of others; an empty one if there is none."""
    group: Any = values
    for name in names:
        group = group.get(name) if isinstance(group, dict) else None
    return group if isinstance(group, dict) else {}
