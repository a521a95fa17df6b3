"""Checks of numbers and of stored states; a complaint is one line that names the field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def check_integer(name: str, value: object, least: int) -> None:
    """Raise ValueError unless value is an integer >= least."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def check_number(
    name: str,
    value: object,
    low: float = 0.0,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise ValueError unless value is a finite number between the limits.

    Args:
        name: What the message calls it.
        value: What to check.
        low: Smallest value.
        high: Largest value.
        open_low: The value must be above low.
        open_high: The value must be below high.
    """
    real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    number = float(value) if real else math.nan  # type: ignore[arg-type]
    above = number > low if open_low else number >= low
    below = number < high if open_high else number <= high
    if above and below:
        return
    if math.isinf(high):
        limits = f"a finite number {'>' if open_low else '>='} {low:g}"
    else:
        limits = (
            f"a number in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        )
    raise ValueError(f"{name} must be {limits}, got {value!r}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(choices)}, got {value!r}")


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


def plain_name(name: str) -> str:
    """The name of a parameter or layer in the module before torch.compile wrapped a part of it."""
    return name.replace("_orig_mod.", "")


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


def modernised(state: Any, templates: Mapping[str, Mapping[str, Any]]) -> Any:
    """A curvature's state as this version has it, of any version; it is not checked.

    Former states have an entry "chain", and None in a block for what was not there yet.

    Args:
        state: The state.
        templates: Present states of the blocks, which fill what a former one lacks.

    Raises:
        ValueError: It is a former state of which this version cannot go on.
    """
    if not isinstance(state, dict) or "chain" not in state:
        return state
    if state["chain"] is not None or state.get("pending") is not None:
        raise ValueError(
            "K-FAC state of an earlier version with structure=tridiagonal or refresh_delay:"
            " finish that run with that version, or start it anew"
        )
    layers: Any = state.get("layers")
    if isinstance(layers, dict):
        layers = {
            name: _modern_block(block, templates[name]) if name in templates else block
            for name, block in layers.items()
        }
    return {key: value for key, value in state.items() if key != "chain"} | {"layers": layers}


def _modern_block(block: Any, template: Mapping[str, Any]) -> Any:
    if not isinstance(block, dict):
        return block
    kept = {key: value for key, value in block.items() if value is not None}
    filled = {**template, **{k: v for k, v in kept.items() if not k.endswith("reference")}}
    filled["started"] = "a" in kept or "moment" in kept
    filled["ready"] = "basis" in kept or "inverses" in kept
    return filled
