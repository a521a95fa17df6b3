"""What autograd's graph says of a tensor: the leaves that it depends on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from acktr.kfac.statistics.outputs import parts_of


def uses_of_leaves(root: Tensor) -> Counter[int]:
    """How often the graph of a tensor takes each leaf, by the leaf's id.

    A leaf that is cast once for several uses, as autocast does it, counts once.
    """
    counts: Counter[int] = Counter()
    waiting, seen = [root.grad_fn], {root.grad_fn}
    while waiting:
        node = waiting.pop()
        for child, _ in () if node is None else node.next_functions:
            leaf = getattr(child, "variable", None)
            if leaf is not None:
                counts[id(leaf)] += 1
            elif child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)
    return counts


def own_parameters(output: Any, parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """1 + k for every parameter that part k of an output depends on and no other part, by name."""
    parts = parts_of(output)
    uses = [uses_of_leaves(part) for part in parts]
    places = {n: [k for k, ids in enumerate(uses) if id(p) in ids] for n, p in parameters.items()}
    return {name: 1 + mine[0] for name, mine in places.items() if len(mine) == 1}
