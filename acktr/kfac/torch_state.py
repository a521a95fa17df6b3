"""The state of an optimizer as torch writes it, and by the names of its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from acktr.kfac.checks import plain_name

_OWN = ("steps", "curvature")
"""What belongs to no single parameter; the first group holds it, as torch knows no other place."""


def packed(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Torch's form, with ``state`` by number of the parameter and ``param_groups``.

    Args:
        state: The form by name: momentum, groups, steps and curvature.
        groups: The optimizer's parameter groups.
    """
    places: dict[str, int] = {}
    written = []
    for group, settings in zip(groups, state["groups"], strict=True):
        names = [plain_name(name) for name in group["param_names"]]
        numbers = [places.setdefault(name, len(places)) for name in names]
        written.append({**settings, "params": numbers, "param_names": names})
    written[0].update({key: state[key] for key in _OWN})
    momentum = {places[name]: {"momentum": value} for name, value in state["momentum"].items()}
    return {"state": momentum, "param_groups": written}


def unpacked(state: Any, groups: Sequence[Mapping[str, Any]]) -> Any:
    """The form by name of either form; only what is torch's is checked.

    Args:
        state: Parameters may be numbered, or named as torch.distributed.checkpoint does.
        groups: The optimizer's parameter groups.

    Raises:
        ValueError: It has other parameters, or is the state of another kind of optimizer.
    """
    if not isinstance(state, dict) or "param_groups" not in state:
        return state
    given = state["param_groups"]
    fits = isinstance(given, list) and all(isinstance(group, dict) for group in given)
    if not fits or len(given) != len(groups) or not isinstance(state.get("state"), dict):
        raise ValueError(f"K-FAC state must have a state, and {len(groups)} param_groups")
    names: dict[Any, str] = {}
    for index, (stored, group) in enumerate(zip(given, groups, strict=True)):
        own = [plain_name(name) for name in group["param_names"]]
        numbers, theirs = stored.get("params"), stored.get("param_names")
        theirs = numbers if theirs is None else [plain_name(str(name)) for name in theirs]
        if (
            not isinstance(numbers, list)
            or len(numbers) != len(own)
            or theirs not in (own, numbers)
        ):
            raise ValueError(
                f"K-FAC group {index} has the parameters {', '.join(own)}, the state"
                f" {', '.join(map(str, theirs or ()))}"
            )
        names |= dict(zip(numbers, own, strict=True))
    missing = [key for key in _OWN if key not in given[0]]
    foreign = [key for key in state["state"] if key not in names]
    if missing or foreign:
        raise ValueError(
            "this is no K-FAC state: it has"
            + (f" no {' and no '.join(missing)}" if missing else f" a state for {foreign[0]}")
        )
    momentum = {}
    for number, entries in state["state"].items():
        if not isinstance(entries, dict) or set(entries) != {"momentum"}:
            raise ValueError(f"K-FAC state of {names[number]} must have the entry momentum")
        momentum[names[number]] = entries["momentum"]
    apart = {*_OWN, "params", "param_names"}
    settings = [{k: v for k, v in group.items() if k not in apart} for group in given]
    return {"groups": settings, "momentum": momentum, **{key: given[0][key] for key in _OWN}}
