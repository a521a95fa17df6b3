"""Stored states: their checks, and their form in torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from acktr.kfac.checks import check_integer, check_number

_OWN = ("steps", "curvature")
"""What belongs to no single parameter; the first group holds it, as torch knows no other place."""
_GENERATORS = (16, 5056)
"""Bytes of a generator's state: of CUDA (seed and offset) and of the CPU."""


def plain_name(name: str) -> str:
    """The name of a parameter or layer in the module before torch.compile wrapped a part of it."""
    return name.replace("_orig_mod.", "")


# --- checks ---------------------------------------------------------------------------------------


def require_like(state: object, template: object, where: str, *, finite: bool = True) -> None:
    """Raise ValueError unless a stored state is built as a template, so that it can be loaded.

    Args:
        state: Dicts, lists, tensors, numbers and None; not trusted.
        template: An object's own state. Dicts must have its keys, lists its length, tensors its
            shapes and types, where one type of numbers with a fraction may stand for another, as
            :func:`cast_like` turns it into; an integer must be a count, a number finite.
        where: What the message calls the state.
        finite: Whether NaN and Inf in tensors are refused.
    """
    if isinstance(template, Mapping):
        entries = _same_keys(state, template, where)
        for key, part in template.items():
            require_like(entries[key], part, f"{where}: {key}", finite=finite)
    elif isinstance(template, list):
        if not isinstance(state, list) or len(state) != len(template):
            raise ValueError(f"{where} must be a list of {len(template)}")
        for index, part in enumerate(template):
            require_like(state[index], part, f"{where}: {index}", finite=finite)
    elif isinstance(template, Tensor):
        if not isinstance(state, Tensor) or state.shape != template.shape:
            raise ValueError(f"{where} does not fit {tuple(template.shape)}")
        same = state.dtype == template.dtype
        castable = state.is_floating_point() and template.is_floating_point()
        if not (same or castable) or (finite and not bool(torch.isfinite(state).all())):
            raise ValueError(f"{where} must be {'finite ' if finite else ''}{template.dtype}")
    else:
        _require_number(state, template, where)


def cast_like(state: Any, template: object) -> Any:
    """A state that :func:`require_like` passed, with the types of the template's tensors."""
    if isinstance(template, Mapping):
        return {key: cast_like(state[key], part) for key, part in template.items()}
    if isinstance(template, list):
        return [cast_like(entry, part) for entry, part in zip(state, template, strict=True)]
    return state.to(template.dtype) if isinstance(template, Tensor) else state


def with_own_generators(state: Any, own: Any) -> Any:
    """A stored state in which generators of another kind of device are one's own.

    Their states have other sizes: such a stream cannot go on here, and all else can.

    Args:
        state: The state of a generator, or a dict or list of some; not trusted.
        own: What it is to be loaded into.
    """
    if isinstance(state, dict) and isinstance(own, dict):
        return {k: with_own_generators(v, own[k]) if k in own else v for k, v in state.items()}
    if isinstance(state, list) and isinstance(own, list) and len(state) == len(own):
        return [with_own_generators(*pair) for pair in zip(state, own, strict=True)]
    if not isinstance(state, Tensor) or not isinstance(own, Tensor):
        return state
    foreign = state.dtype == torch.uint8 and state.dim() == 1 and state.shape != own.shape
    return own if foreign and len(state) in _GENERATORS else state


def _same_keys(state: object, template: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    if not isinstance(state, Mapping):
        raise ValueError(f"{where} must be a dict")
    if set(state) != set(template):
        lacking = ", ".join(str(key) for key in template if key not in state) or "nothing"
        extra = ", ".join(str(key) for key in state if key not in template) or "nothing"
        raise ValueError(f"{where} does not fit: it lacks {lacking} and has {extra} instead")
    return state


def _require_number(state: object, template: object, where: str) -> None:
    if template is None or isinstance(template, bool):
        if type(state) is not type(template):
            raise ValueError(f"{where} must be {'None' if template is None else 'true or false'}")
    elif isinstance(template, int):
        check_integer(where, state, 0)
    else:
        check_number(where, state, -math.inf)


def curvature_state(state: Any, own: dict[str, Any], outside: Collection[str]) -> dict[str, Any]:
    """The state of a curvature that fits; ``pending`` as it is.

    Args:
        state: The state.
        own: That of the curvature which is to take it.
        outside: The parameters outside of layers that have statistics.

    Raises:
        ValueError: It does not fit.
    """
    own = {**own, "pending": None}
    if not isinstance(state, dict):
        raise ValueError("K-FAC curvature must be a dict")
    given = state.get("layers")
    if isinstance(given, dict) and outside and not {*outside} & {*given}:
        raise ValueError(
            f"K-FAC state has no statistics of {', '.join(outside)}: it was made with another"
            ' small_parameters ("gradient" was the default) or known_fisher; give that setting'
        )
    state = dict(state)
    if own["trust"] is None or state.get("trust") is None:  # one of the two has another q
        state["trust"] = own["trust"]
    for key in ("generator", "noisy"):
        if key in own and key in state:
            state[key] = with_own_generators(state[key], own[key])
    pending = state.get("pending")
    settled = state if pending is None else {**state, "pending": None}
    require_like(settled, own, "K-FAC curvature")
    check_number("K-FAC curvature: damping", state["damping"], open_low=True)
    fitting: dict[str, Any] = cast_like(settled, own)
    return fitting | {"pending": pending}


# --- torch's form ---------------------------------------------------------------------------------


def packed(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Torch's form, with ``state`` by number of the parameter and ``param_groups``.

    Args:
        state: The form by name: groups, steps and curvature; what else is there is by parameter.
        groups: The optimizer's parameter groups.
    """
    places: dict[str, int] = {}
    written = []
    for group, settings in zip(groups, state["groups"], strict=True):
        names = [plain_name(name) for name in group["param_names"]]
        numbers = [places.setdefault(name, len(places)) for name in names]
        written.append({**settings, "params": numbers, "param_names": names})
    written[0].update({key: state[key] for key in _OWN})
    kept: dict[int, dict[str, Any]] = {}
    for kind in (key for key in state if key not in ("groups", *_OWN)):
        for name, value in state[kind].items():
            kept.setdefault(places[name], {})[kind] = value
    return {"state": kept, "param_groups": written}


def unpacked(state: Any, groups: Sequence[Mapping[str, Any]], kinds: Collection[str]) -> Any:
    """The form by name of either form; only what is torch's is checked.

    Args:
        state: Parameters may be numbered, or named as torch.distributed.checkpoint does.
        groups: The optimizer's parameter groups.
        kinds: What a parameter has: momentum, and whatever else.

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
    kept: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
    for number, entries in state["state"].items():
        if not isinstance(entries, dict) or set(entries) != set(kinds):
            wanted = " and the entry ".join(kinds)
            raise ValueError(f"K-FAC state of {names[number]} must have the entry {wanted}")
        for kind, value in entries.items():
            kept[kind][names[number]] = value
    apart = {*_OWN, "params", "param_names"}
    settings = [{k: v for k, v in group.items() if k not in apart} for group in given]
    return {"groups": settings, **kept, **{key: given[0][key] for key in _OWN}}
