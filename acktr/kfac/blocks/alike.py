"""Many small layers of one shape: their products are made in one call.

A layer of 32 x 32 takes longer to call than to compute. Results are those of the blocks one by one,
up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from acktr.kfac.blocks.entries import EntriesBlock
from acktr.kfac.blocks.kronecker import Corrected, Eigen, KroneckerBlock
from acktr.kfac.blocks.linear import LinearLayout
from acktr.kfac.blocks.registry import Block, StatBlock
from acktr.kfac.blocks.tridiagonal import TridiagonalBlock
from acktr.kfac.blocks.vectors import VectorBlock
from acktr.kfac.statistics.averages import fold_together
from acktr.kfac.statistics.factors import append_one, second_moment, squared_gradients
from acktr.kfac.statistics.uses import Observation

LayerBlock = KroneckerBlock | VectorBlock | TridiagonalBlock | EntriesBlock
"""A block that learns from what its layers saw."""
LEAST = 8
"""Number of layers from which they are taken together."""
LARGEST = 128
"""Size of a factor above which the products themselves take the time."""


class Alike:
    """Kronecker blocks of small linear layers with one shape, see :func:`alike`.

    Args:
        blocks: The blocks.
    """

    def __init__(self, blocks: Sequence[KroneckerBlock]) -> None:
        self.blocks = list(blocks)
        first = self.blocks[0].layer
        self.dtype, self.bias = first.dtype, first.bias_name is not None

    def observe(self, seen: Sequence[Observation]) -> bool:
        """Join a part of a batch to the statistics of all blocks, or of none.

        It takes one use of each layer, over inputs (N, in) of one shape and type and without
        weights of their rows.
        """
        if any(len(part.uses) != 1 for part in seen):
            return False
        uses, weights = [part.uses[0] for part in seen], seen[0].weights
        if any(use.weights is not None or not use.batched for use in uses):
            return False
        inputs = [use.input for use in uses]
        size = inputs[0].shape
        if len(size) != 2 or any(x.shape != size or x.dtype != self.dtype for x in inputs):
            return False
        rows = torch.stack(inputs)
        scalars = [torch.stack([use.gradients[i] for use in uses]) for i in range(len(weights))]
        sums = [
            second_moment(rows, self.bias),
            _weighted(weights, (second_moment(g, False) for g in scalars)),
        ]
        averages = [[block.a for block in self.blocks], [block.g for block in self.blocks]]
        counts = [[float(size[0])] * len(seen), [part.count for part in seen]]
        inverses = [block.inverse for block in self.blocks if block.history.ready]
        corrected = [inverse for inverse in inverses if isinstance(inverse, Corrected)]
        if corrected and len(corrected) == len(seen):
            basis = Eigen.stacked([inverse.basis for inverse in corrected])
            a, g = basis.a.vectors, basis.g.vectors
            assert a is not None and g is not None
            rotated = ((append_one(rows) if self.bias else rows) @ a)[..., None, :]
            squares = (squared_gradients(rotated, (x @ g)[..., None, :]) for x in scalars)
            sums.append(_weighted(weights, squares))
            averages.append([inverse.scales for inverse in corrected])
            counts.append(counts[1])
        elif corrected:
            return False
        for total, mine, shares in zip(sums, averages, counts, strict=True):
            for average, part, count in zip(mine, total, shares, strict=True):
                average.add(part, count)
        return True

    def fold(self, decay: float) -> bool:
        """Take the joined batch into the running averages of all blocks, or of none."""
        if isinstance(self.blocks[0].inverse, Corrected):
            return False
        averages = [block.factors for block in self.blocks]
        fold_together([block.history for block in self.blocks], averages, decay)
        return True

    def precondition(
        self, gradients: Mapping[str, Tensor], damping: Callable[[KroneckerBlock], float]
    ) -> dict[str, Tensor]:
        """(F + lambda)^-1 g of all blocks.

        Nothing unless all have a gradient, a decomposition, and one damping.
        """
        dampings = {damping(block) for block in self.blocks}
        given = all(name in gradients for block in self.blocks for name in block.names)
        if len(dampings) > 1 or not given or not all(b.history.ready for b in self.blocks):
            return {}
        layers = [block.layer for block in self.blocks]
        parts = [torch.stack([gradients[layer.weight_name] for layer in layers])]
        biases = [layer.bias_name for layer in layers if layer.bias_name is not None]
        if biases:
            parts.append(torch.stack([gradients[name] for name in biases])[..., None])
        gradient = torch.cat(parts, -1).to(self.dtype)
        inverses = [block.inverse for block in self.blocks]
        step = (
            type(inverses[0]).stacked(inverses).solve(gradient, dampings.pop()).to(parts[0].dtype)
        )
        width = parts[0].shape[-1]
        result = {
            layer.weight_name: part for layer, part in zip(layers, step[..., :width], strict=True)
        }
        if biases:
            result |= dict(zip(biases, step[..., width].contiguous(), strict=True))
        return result


def _weighted(weights: Sequence[float], sums: Iterable[Tensor]) -> Tensor:
    total: Tensor | None = None
    for weight, part in zip(weights, sums, strict=True):
        scaled = part if weight == 1 else part * weight
        total = scaled if total is None else total + scaled
    assert total is not None
    return total


def observe_all(
    blocks: Sequence[LayerBlock], seen: Sequence[Observation], groups: Iterable[Alike]
) -> None:
    """Join a part of a batch to the statistics of all blocks, those of a group together."""
    parts = dict(zip((block.name for block in blocks), seen, strict=True))
    done = {
        block.name
        for group in groups
        if group.observe([parts[block.name] for block in group.blocks])
        for block in group.blocks
    }
    for block in blocks:
        part = parts[block.name]
        if block.name not in done and part.uses:
            block.observe(part)
        elif block.name not in done:
            block.pass_over(part.count)


def fold_all(blocks: Iterable[StatBlock], groups: Iterable[Alike], decay: float) -> None:
    """Take the joined batch into the running averages of all blocks, those of a group together."""
    done = {id(block) for group in groups if group.fold(decay) for block in group.blocks}
    for block in blocks:
        if id(block) not in done:
            block.fold(decay)


def precondition_all(
    blocks: Iterable[Block],
    groups: Iterable[Alike],
    gradients: dict[str, Tensor],
    parameters: Mapping[str, Tensor],
    damping: Callable[[Block], float],
) -> dict[str, Tensor]:
    """(F + lambda)^-1 g by name of all blocks with a gradient, those of a group together."""
    step: dict[str, Tensor] = {}
    for group in groups:
        step.update(group.precondition(gradients, damping))
    for block in blocks:
        if block.names[0] in step:
            continue
        missing = [name for name in block.names if name not in gradients]
        if len(missing) == len(block.names):
            continue
        given = gradients
        if missing:
            given = gradients | {name: torch.zeros_like(parameters[name]) for name in missing}
        step.update(block.precondition(given, damping(block)))
    return step


def alike(blocks: Iterable[LayerBlock]) -> list[Alike]:
    """Groups of blocks whose products are worth making together."""
    groups: dict[tuple[object, ...], list[KroneckerBlock]] = {}
    for block in blocks:
        if not isinstance(block, KroneckerBlock) or len(block.paths) > 1:
            continue
        layout, layer = block.layer.layout, block.layer
        plain = isinstance(layout, LinearLayout) and layout.sharing == "expand"
        whole = layer.a.value.dim() == layer.g.value.dim() == 2
        if plain and whole and max(max(shape) for shape in layout.shapes) <= LARGEST:
            key = layout.shapes, layer.bias_name is None, layer.dtype, layer.device
            groups.setdefault(key, []).append(block)
    return [Alike(group) for group in groups.values() if len(group) >= LEAST]
