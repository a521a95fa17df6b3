"""Tensors in what a module returns: a tensor, or tuples, lists, dicts and dataclasses of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]
"""Keys, indices and names of fields that lead to a tensor."""


def tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """All tensors in a module's output, with their paths."""
    if isinstance(value, Tensor):
        yield path, value
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, tuple | list):
        items = enumerate(value)
    elif is_dataclass(value) and not isinstance(value, type):
        items = ((field.name, getattr(value, field.name)) for field in fields(value))
    for key, part in items:
        yield from tensors(part, (*path, key))


@dataclass(frozen=True)
class Selection:
    """The output that a loss takes, as a part of what the module returns."""

    paths: tuple[Path, ...]
    alone: bool
    """Whether the loss takes one tensor, and no tuple."""

    def __call__(self, returned: Any) -> Any:
        """The loss's output."""
        parts = tuple(_at(returned, path) for path in self.paths)
        return parts[0] if self.alone else parts


def selection(returned: Any, output: Any) -> Selection | None:
    """Where the tensors of a loss's output are in what the module returned; None if nowhere.

    A tensor that is another object is found by its values, as after ``logits.float()``.
    """
    places = list(tensors(returned))
    wanted = (output,) if isinstance(output, Tensor) else output
    if not isinstance(wanted, tuple) or not all(isinstance(part, Tensor) for part in wanted):
        return None
    paths = []
    for part in wanted:
        same = [path for path, tensor in places if tensor is part]
        same = same or [path for path, tensor in places if _equal(tensor, part)]
        if not same:
            return None
        paths.append(same[0])
    return Selection(tuple(paths), isinstance(output, Tensor))


def _equal(tensor: Tensor, part: Tensor) -> bool:
    same = tensor.shape == part.shape and tensor.device == part.device
    return same and torch.equal(tensor.detach().to(part.dtype), part.detach())


def _at(value: Any, path: Path) -> Any:
    for key in path:
        plain = isinstance(value, Mapping | tuple | list)
        value = value[key] if plain else getattr(value, key)
    return value
