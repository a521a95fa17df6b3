"""Which layers are left without a block of their own."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

Skip = Sequence[str | type[nn.Module]]
"""Layers by path, by a pattern of paths (fnmatch), or by class; what is inside of them too."""


def skipped(module: nn.Module, skip: Skip) -> set[str]:
    """Paths of the layers to leave out, and of all inside of them.

    Raises:
        ValueError: An entry matches no layer.
    """
    layers = dict(module.named_modules())
    result: set[str] = set()
    for entry in skip:
        if isinstance(entry, str):
            heads = [path for path in layers if path and fnmatchcase(path, entry)]
        else:
            heads = [path for path, layer in layers.items() if isinstance(layer, entry)]
        if not heads:
            raise ValueError(f"skip names no layer of the module: {entry!r:.100}")
        for head in heads:
            result.update(p for p in layers if p == head or not head or p.startswith(f"{head}."))
    return result
