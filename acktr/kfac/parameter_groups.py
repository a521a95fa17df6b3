"""Parameter groups of the K-FAC optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from acktr.kfac.blocks.registry import Block
from acktr.kfac.checks import check_number
from acktr.kfac.config import KFACConfig

_OPTIONS = ("lr", "momentum", "weight_decay")
"""Settings of a group."""
INITIAL = "initial_lr"
"""What torch's schedulers leave in a group."""
FULL = "full_lr"
"""The full step size of a group, of which a scheduler takes a part; files without it are older."""


def _check(value: object, name: str, where: str) -> None:
    high = 1.0 if name == "momentum" else math.inf
    check_number(f"{where} {name}", value, high=high, open_high=name == "momentum")


def make_groups(
    named: Mapping[str, nn.Parameter],
    config: KFACConfig,
    wanted: Sequence[dict[str, Any]] | None,
) -> list[dict[str, Any]]:
    """Complete groups for torch, with the names of their parameters.

    Args:
        named: Trainable parameters of the module.
        config: What a group does not say.
        wanted: The caller's groups, :func:`listed`; None for one group of everything.

    Raises:
        ValueError: A group has unknown options, or foreign or repeated parameters.
    """
    names = {id(parameter): name for name, parameter in named.items()}
    default = {name: getattr(config, name) for name in _OPTIONS}
    if wanted is None:
        wanted = [{"params": list(named.values())}]
    groups = []
    place: dict[str, int] = {}
    for index, given in enumerate(wanted):
        parameters = given["params"]
        for parameter in parameters:
            name = names.get(id(parameter))
            if name is None:
                raise ValueError(
                    f"parameter group {index} has a parameter that is not trainable in the module"
                )
            if name in place:
                raise ValueError(f"parameter {name!r} is in two groups")
            place[name] = index
        group = {**default, **given, "params": parameters}
        for option in _OPTIONS:
            _check(group[option], option, f"parameter group {index}:")
        own_names = [names[id(p)] for p in parameters]
        groups.append({**group, FULL: group["lr"], "param_names": own_names})
    return groups


def check_whole(groups: Sequence[dict[str, Any]], blocks: Sequence[Block]) -> None:
    """Raise ValueError for a block whose parameters are in two groups."""
    place = {name: index for index, group in enumerate(groups) for name in group["param_names"]}
    for block in blocks:
        if len({place.get(name) for name in block.names}) > 1:
            raise ValueError(
                f"{' and '.join(block.names)} share a curvature block: give them one group"
            )


def listed(wanted: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Groups whose parameters are lists; raises ValueError where they cannot be."""
    if wanted is None:
        return None
    if not isinstance(wanted, Sequence):
        raise ValueError(f"param_groups must be a list of dicts, got {type(wanted).__name__}")
    parameters = [_parameters(given, index) for index, given in enumerate(wanted)]
    return [{**g, "params": p} for g, p in zip(wanted, parameters, strict=True)]


def _parameters(given: dict[str, Any], index: int) -> list[Any]:
    """What a group lists; raises ValueError for a group that is none."""
    if not isinstance(given, dict):
        raise ValueError(f"parameter group {index} must be a dict, got {type(given).__name__}")
    extra = sorted(map(str, set(given) - {"params", *_OPTIONS}))
    if extra or "params" not in given:
        raise ValueError(
            f"parameter group {index} may have params, {', '.join(_OPTIONS)}; got"
            f" {', '.join(extra) or 'no params'}"
        )
    listed = given["params"]
    if not isinstance(listed, Iterable):
        raise ValueError(f"parameter group {index}: params must be parameters, got {listed!r}")
    return [listed] if isinstance(listed, nn.Parameter) else list(listed)


def group_state(groups: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """The settings of each group, and the numbers that schedulers keep beside them."""
    return [
        {name: float(value) for name, value in group.items() if _is_number(value)}
        for group in groups
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_groups(state: object, groups: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError when stored settings do not fit the groups."""
    if not isinstance(state, list) or len(state) != len(groups):
        raise ValueError(f"K-FAC state must have the settings of {len(groups)} parameter groups")
    for index, stored in enumerate(state):
        if not isinstance(stored, dict) or not set(_OPTIONS) <= set(stored):
            raise ValueError(f"K-FAC group {index} must have the entries {sorted(_OPTIONS)}")
        for name, value in stored.items():
            if name in (*_OPTIONS, INITIAL, FULL):
                _check(value, name, f"K-FAC group {index}:")
            elif not _is_number(groups[index].get(name, 0.0)):
                raise ValueError(f"K-FAC group {index}: {name!r:.40} is no number of a scheduler")
            else:
                check_number(f"K-FAC group {index}: {name}", value, low=-math.inf)
