"""Trees of tensors: one tensor, or several by name, all with the samples in their first dimension.

Observations of a Dict or Tuple space are a dict of tensors, one for each part, by the names of
``acktr.envs.parts``; those of any other space are one tensor. What goes through rollouts and
updates is either, and these functions are all that those need to know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Tree = Tensor | dict[str, Tensor]
"""One tensor (N, ...), or a dict of such tensors with the same N."""


def tree_map(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """The tree of what a function makes of each tensor."""
    if isinstance(tree, dict):
        return {name: function(part) for name, part in tree.items()}
    return function(tree)


def rows(tree: Tree, index: Any) -> Tree:
    """Samples of a tree, by a slice, a mask or a tensor of numbers."""
    if isinstance(tree, dict):
        return {name: part[index] for name, part in tree.items()}
    return tree[index]


def first(tree: Tree) -> Tensor:
    """One of the tensors: what all of them share (samples, device) can be asked of it."""
    return next(iter(tree.values())) if isinstance(tree, dict) else tree


def length(tree: Tree) -> int:
    """Number of samples."""
    return len(first(tree))


def to_device(tree: Tree, device: torch.device) -> Tree:
    """The tree on a device; the same tensors where they are there already."""
    return tree_map(lambda part: part.to(device), tree)


def concatenate(trees: Sequence[Tree]) -> Tree:
    """The samples of all trees, in order; they have the same names."""
    head = trees[0]
    if isinstance(head, dict):
        return {name: torch.cat([_part(tree, name) for tree in trees]) for name in head}
    return torch.cat([first(tree) for tree in trees])


def _part(tree: Tree, name: str) -> Tensor:
    assert isinstance(tree, dict)
    return tree[name]
