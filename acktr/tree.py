"""Trees of tensors: one tensor, or several by name, all with the samples in their first dimension.

Observations of a Dict or Tuple space are a dict of tensors, one for each part, by the names of
``acktr.envs.parts``; those of any other space are one tensor. What goes through rollouts and
updates is either, and these functions are all that those need to know of it. A recurrent network
learns from whole :class:`Sequences` of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, overload

import torch
from torch import Tensor

Tree = Tensor | dict[str, Tensor]
"""One tensor (N, ...), or a dict of such tensors with the same N."""


def tree_map(function: Callable[..., Tensor], *trees: Tree) -> Tree:
    """The tree of what a function makes of each tensor, or of all in one place of several trees."""
    if isinstance(trees[0], dict):
        parts: Any = trees  # of the same names
        return {name: function(*[part[name] for part in parts]) for name in trees[0]}
    return function(*trees)


@dataclass(frozen=True)
class Sequences:
    """Whole sequences, as a recurrent network takes them.

    The samples are the steps that count, those of the first sequence in time, then of the second.
    """

    observations: Tree
    """(T, N, ...)"""
    starts: Tensor
    """(T, N), whether a step is the first of an episode."""
    state: tuple[Tensor, ...]
    """The network's state before the first step, (N, ...)."""
    valid: Tensor
    """(T, N), steps that count."""
    edges: tuple[int, ...]
    """Numbers of samples before each sequence, and of all."""

    @classmethod
    def of(
        cls, observations: Tree, starts: Tensor, state: tuple[Tensor, ...], valid: Tensor
    ) -> Sequences:
        """The sequences with their edges."""
        counts = valid.sum(0).tolist()
        return cls(observations, starts, state, valid, tuple(accumulate(counts, initial=0)))

    @classmethod
    def step(cls, observations: Tree, starts: Tensor, state: tuple[Tensor, ...]) -> Sequences:
        """One step (N, ...) of every sequence."""
        shown = tree_map(lambda part: part[None], observations)
        edges = tuple(range(len(starts) + 1))
        return cls(shown, starts[None], state, torch.ones_like(starts[None]), edges)

    def __len__(self) -> int:
        """Number of samples."""
        return self.edges[-1]

    def samples(self, output: Tensor) -> Tensor:
        """Outputs (T, N, ...) of the samples, as rows (B, ...)."""
        output = output.transpose(0, 1)
        return output.flatten(0, 1) if len(self) == self.valid.numel() else output[self.valid.T]

    def rows(self, index: slice) -> Sequences:
        """The sequences of consecutive samples.

        Raises:
            ValueError: They are a part of a sequence.
        """
        start, stop, step = index.indices(len(self))
        if step != 1 or not {start, stop} <= set(self.edges):
            raise ValueError(f"samples {start} to {stop} are not whole sequences")
        some = slice(bisect_left(self.edges, start), bisect_left(self.edges, stop))
        return Sequences.of(
            tree_map(lambda part: part[:, some], self.observations),
            self.starts[:, some],
            tuple(part[some] for part in self.state),
            self.valid[:, some],
        )

    def some(self, fraction: float, turn: int) -> slice | None:
        """The samples of a part of the sequences, others at every turn; None for all."""
        num = len(self.edges) - 1
        count = max(1, round(fraction * num))
        if count >= num:
            return None
        first = turn * count % (num - count + 1)
        return slice(self.edges[first], self.edges[first + count])

    def split(self, limit: int | None) -> list[int]:
        """Edges of parts with at most ``limit`` samples, or one sequence that has more."""
        edges, limit = [0], len(self) if limit is None else limit
        for before, after in pairwise(self.edges):
            if after - edges[-1] > limit and before > edges[-1]:
                edges.append(before)
        return [*edges, len(self)]


Observed = Tree | Sequences
"""Observations of a batch."""


@overload
def rows(tree: Tree, index: Any) -> Tree: ...
@overload
def rows(tree: Sequences, index: Any) -> Sequences: ...
def rows(tree: Observed, index: Any) -> Observed:
    """Samples of a tree, by a slice, a mask or a tensor of numbers; of sequences by a slice."""
    if isinstance(tree, Sequences):
        return tree.rows(index)
    if isinstance(tree, dict):
        return {name: part[index] for name, part in tree.items()}
    return tree[index]


def first(tree: Tree) -> Tensor:
    """One of the tensors: what all of them share (samples, device) can be asked of it."""
    return next(iter(tree.values())) if isinstance(tree, dict) else tree


def length(tree: Observed) -> int:
    """Number of samples."""
    if isinstance(tree, Sequences):
        return len(tree)
    return len(first(tree))


def to_device(tree: Tree, device: torch.device) -> Tree:
    """The tree on a device; the same tensors where they are there already."""
    return tree_map(lambda part: part.to(device), tree)


def concatenate(trees: Sequence[Tree]) -> Tree:
    """The samples of all trees, in order."""
    return tree_map(lambda *parts: torch.cat(parts), *trees)
