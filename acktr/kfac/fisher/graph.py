"""What autograd's graph says of a tensor: the leaves that it depends on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from acktr.kfac.statistics.outputs import tensors
from acktr.kfac.tensors import parts_of


def joined(output: Any) -> Tensor | None:
    """A scalar whose graph is that of all tensors of an output; None without a graph."""
    parts = [part.sum() for _, part in tensors(output) if part.requires_grad]
    return torch.stack(parts).sum() if parts else None


def nodes(root: Tensor) -> Iterator[Any]:
    """The nodes of the graph of a tensor; its leaves are children of some."""
    waiting, seen = [root.grad_fn], {root.grad_fn}
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        yield node
        for child, _ in node.next_functions:
            if child is not None and child not in seen and not hasattr(child, "variable"):
                seen.add(child)
                waiting.append(child)


def uses_of_leaves(root: Tensor) -> Counter[int]:
    """How often the graph of a tensor takes each leaf, by the leaf's id.

    A leaf that is cast once for several uses, as autocast does it, counts once. One that a linear
    layer transposes counts for every use of that: a gradient inside the graph uses it again.
    """
    used = [root.grad_fn]
    used += [c for n in nodes(root) if not _transposes(n) for c, _ in n.next_functions]
    leaves = (_untransposed(node) for node in used)
    return Counter(id(leaf.variable) for leaf in leaves if hasattr(leaf, "variable"))


def _transposes(node: Any) -> bool:
    return type(node).__name__ == "TBackward0"


def _untransposed(node: Any) -> Any:
    while _transposes(node):
        node = node.next_functions[0][0]
    return node


def own_parameters(output: Any, parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """1 + k for every parameter that part k of an output depends on and no other part, by name."""
    parts = parts_of(output)
    uses = [uses_of_leaves(part) for part in parts]
    places = {n: [k for k, ids in enumerate(uses) if id(p) in ids] for n, p in parameters.items()}
    return {name: 1 + mine[0] for name, mine in places.items() if len(mine) == 1}


def own_parts(output: Any, places: Mapping[str, Sequence[Any]]) -> dict[str, list[int | None]]:
    """The part of an output that depends on a node, for nodes that no other part depends on.

    Args:
        output: The parts.
        places: Nodes of their graphs, by any name.

    Returns:
        By name its place for every node; None if there are several, or none.
    """
    parts = [set(nodes(part)) for part in parts_of(output)]

    def own(node: Any) -> int | None:
        mine = [k for k, part in enumerate(parts) if node in part]
        return mine[0] if len(mine) == 1 else None

    return {name: [own(node) for node in some] for name, some in places.items()}
