"""Estimation of the blocks' curvature: passes are recorded, and what they show is folded in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from acktr.kfac.blocks.diagonal import DiagonalBlock
from acktr.kfac.blocks.kronecker import KroneckerBlock
from acktr.kfac.blocks.layouts import ConvLayout
from acktr.kfac.blocks.linear import LinearLayout
from acktr.kfac.blocks.registry import Block, LayerBlock, StatBlock
from acktr.kfac.fisher.extent import without_terms
from acktr.kfac.fisher.graph import own_parts
from acktr.kfac.guard import Guard
from acktr.kfac.losses.base import OutputLoss
from acktr.kfac.losses.sources import Empirical, Exact, Source, curvature_scalars
from acktr.kfac.losses.sums import SumLoss, term_weights
from acktr.kfac.ranks import Ranks
from acktr.kfac.statistics.averages import RunningAverage, join_ranks
from acktr.kfac.statistics.capture import (
    ROOT,
    Capture,
    Divisor,
    OutputGradients,
    capture,
    part_size,
)
from acktr.kfac.statistics.elementary import twice_differentiable
from acktr.kfac.statistics.generators import RandomState
from acktr.kfac.statistics.projections import recorded
from acktr.kfac.statistics.samples import Samples, checked_masks
from acktr.kfac.statistics.uses import Observation
from acktr.kfac.tensors import parts_of

Scalars = Iterable[tuple[Tensor, float]]
"""Scalars f_c of a batch and weights w_c; the curvature is sum_c w_c (grad f_c) (grad f_c)^T."""
Pairs = Sequence[tuple[OutputGradients, float]]
"""The gradients of the layers' outputs for each scalar, and its weight."""
Squares = Mapping[str, Tensor | None]
"""sum_c w_c (df_c / dtheta)^2 of the parameters outside of layers, by name."""


class Estimator:
    """The blocks that learn from batches, and what their statistics are taken from.

    Args:
        module: The network.
        named: The parameters that K-FAC steps, by name.
        blocks: Those of the module.
        guard: Warns of what the statistics do not see.
        ranks: Who has the other shares of every batch; None for one process.
    """

    def __init__(
        self,
        module: nn.Module,
        named: Mapping[str, nn.Parameter],
        blocks: Sequence[Block],
        guard: Guard,
        ranks: Ranks | None = None,
    ) -> None:
        learning = [block for block in blocks if isinstance(block, StatBlock)]
        self.blocks: dict[str, StatBlock] = {block.name: block for block in learning}
        self.layers = [block for block in learning if not isinstance(block, DiagonalBlock)]
        self.rest = {block.name: block for block in learning if isinstance(block, DiagonalBlock)}
        """Blocks of the parameters outside of layers, which see the gradients of whole batches."""
        self._module, self._named, self._guard, self._ranks = module, named, guard, ranks
        self._targets: torch.Generator | None = None
        """Source of this rank's targets in the batch that is being observed."""
        paths = [path for block in learning for path in block.paths]
        self._scales: list[float] = []
        """Those of the parts of a SumLoss in the micro-batches so far."""
        self._recorded = {p: module if p == ROOT else recorded(module, p) for p in paths}

    @contextmanager
    def capture(self, *, layers: bool, twice: bool) -> Iterator[Capture]:
        """Context in which forward passes are recorded.

        Args:
            layers: Whether what layers see is recorded, beside what the module gets and returns;
                hooks take time in small layers.
            twice: Whether the graphs of the passes must have second derivatives.
        """
        random = RandomState.now(self._named.values())
        with ExitStack() as stack:
            if twice:
                stack.enter_context(twice_differentiable(self._module))
            recorded = self._recorded if layers else {}
            captured = stack.enter_context(capture(recorded, self._module))
            captured.random = random
            yield captured

    def check_scales(self, loss: OutputLoss[Any], output: Any, last: bool) -> None:
        """Raise ValueError when the parts of a loss weigh differently in the micro-batches."""
        empty = self._empty(loss, output)
        scales = loss.scales(output) if isinstance(loss, SumLoss) and not empty else []
        before, self._scales = self._scales or scales, [] if last else self._scales or scales
        alike = _close(before, scales)
        if last and self._ranks is not None and isinstance(loss, SumLoss):
            # A rank without terms agrees with every other one.
            terms = float(not empty and loss.normalizer(output) != 0)
            device = next(iter(self._named.values())).device
            told = scales or [0.0] * len(loss.parts)
            rows = self._ranks.gather([float(alike), terms, *told], device)
            before = next((row[2:] for row in rows if row[1]), scales)
            alike = all(row[0] and (not row[1] or _close(row[2:], before)) for row in rows)
        if not alike:
            raise ValueError(
                f"SumLoss: its parts have the scales {scales} in this micro-batch and {before} in"
                " another one, which do not add up to one batch: take parts with"
                ' reduction="sum", and give weights that are divided by each part\'s Z of the whole'
                " batch"
            )

    def targets(self, common: torch.Generator) -> torch.Generator:
        """Source of sampled targets: the common one, or for a rank's share of a batch its own.

        One number of the common one, whatever the shares are, begins those of all ranks, so that
        the common one is the same on all.
        """
        if self._ranks is None or self._ranks.size == 1:
            return common
        if self._targets is None:
            seed = int(torch.randint(2**62, (), generator=common, device=common.device))
            self._targets = torch.Generator(common.device).manual_seed(seed + self._ranks.rank)
        return self._targets

    def _empty(self, loss: OutputLoss[Any], output: Any) -> bool:
        """Whether the share of this rank has no terms, which add nothing but to Z."""
        return self._ranks is not None and without_terms(loss, output)

    def scalars(
        self,
        captured: Capture,
        output: Any,
        loss: OutputLoss[Any],
        source: Source,
        present: Tensor | Sequence[Tensor] | None,
        common: torch.Generator,
        *,
        part: bool,
    ) -> tuple[Scalars, Samples]:
        """The scalars that a batch's curvature is of, and what is known of its samples.

        Args:
            captured: The records of the forward pass.
            output: The loss's output.
            loss: It may weight the samples.
            source: Where targets come from.
            present: Masks of the positions that are no padding.
            common: Draws the targets, or the seeds of those of ranks.
            part: Whether the output is a part of what the module returned, or that itself.

        Raises:
            ValueError: Samples must not meet but do.
        """
        if self._empty(loss, output):
            self.targets(common)
            return [], Samples()
        batch = self._samples(captured, output, loss, source, present, part=part)
        generator = self.targets(common)
        scalars = curvature_scalars(source, loss, output, generator, apart=bool(self.rest))
        return scalars, batch

    def _samples(
        self,
        captured: Capture,
        output: Any,
        loss: OutputLoss[Any],
        source: Source,
        present: Tensor | Sequence[Tensor] | None,
        *,
        part: bool,
    ) -> Samples:
        parts = parts_of(output)
        sizes = frozenset(len(part) for part in parts if isinstance(part, Tensor) and part.dim())
        apart = isinstance(source, Exact | Empirical)
        if apart and len(sizes) > 1:
            raise ValueError(
                f"{type(source).__name__}() takes every sample by itself, but the outputs have the"
                f" lengths {sorted(sizes)}: Sampled() is right there"
            )
        known = sizes if part else sizes | captured.sizes()
        given, own = _term_weights(captured, output, loss)
        masks = checked_masks(present, sizes | captured.sizes())
        batch = Samples(known, apart, weights=given, own_weights=own, present=masks)
        unplaced = any(
            block.needs_samples
            and batch.dimension(captured.layers[path].module, call.shape) is None
            for block in self.layers
            for path in block.paths
            for call in captured.layers[path].calls
        )
        looking = len(sizes) == 1 and (apart or unplaced)
        return captured.owners(output, batch) if looking else batch

    def gradients(self, captured: Capture, scalars: Scalars) -> tuple[Pairs, Squares]:
        """Differentiate the scalars with respect to the outputs of layers, and to the rest."""
        rest = {name: self._named[name] for name in self.rest if self._named[name].requires_grad}
        squares: dict[str, Tensor | None] = dict.fromkeys(rest)
        pairs = []
        for scalar, weight in scalars:
            self._guard.warn_outside(self.layers, captured, scalar)
            gradients = captured.output_gradients(scalar, rest)
            for name in rest:  # squared at once, so that only one such gradient is kept
                (gradient,) = gradients.pop(name)
                if gradient is not None:
                    square, before = self.rest[name].square(gradient) * weight, squares[name]
                    squares[name] = square if before is None else before.add_(square)
            pairs.append((gradients, weight))
        return pairs, squares

    @torch.no_grad()
    def observe(
        self,
        captured: Capture,
        pairs: Pairs,
        squares: Squares,
        divisor: Divisor,
        batch: Samples,
        enough: int | None,
        turn: int,
    ) -> None:
        """Add a part of a batch to what :meth:`fold` takes; all of it is forgotten on an error.

        Of more rows than ``enough`` for each row of a factor some are taken, others at every turn.

        Raises:
            ValueError: Nothing was recorded, or a layer does not fit.
        """
        try:
            seen = [captured.observation(b.paths, pairs, divisor, batch) for b in self.layers]
            if enough is not None:
                both = zip(self.layers, seen, strict=True)
                seen = [_thinned(block, part, enough, turn) for block, part in both]
            for block, part in zip(self.layers, seen, strict=True):
                if part.uses:
                    block.observe(part)
                else:
                    block.pass_over(part.count)
            if pairs and self.layers and not any(part.uses for part in seen):
                raise ValueError(
                    "nothing was recorded: run the forward pass inside capture() with gradients"
                    " enabled (a module compiled before its first capture() calls no hooks)"
                )
            if ROOT in captured.layers and not captured.layers[ROOT].calls:
                raise ValueError(
                    'small_parameters="dense" needs the module itself to be called inside'
                    ' capture(), not only its submodules (or small_parameters="diagonal")'
                )
            for name, square in squares.items():
                self.rest[name].observe(square, part_size(pairs, divisor))
        except BaseException:  # a part that is missing would spoil the whole batch
            self.drop()
            raise

    def drop(self) -> None:
        """Forget the parts of an unfinished batch."""
        self._scales, self._targets = [], None
        for average in self._averages():
            average.drop()

    def _averages(self) -> list[RunningAverage]:
        return [average for block in self.blocks.values() for average in block.averages]

    @torch.no_grad()
    def fold(self, decay: float) -> None:
        """Fold the parts of a batch, those of all ranks, into the running averages."""
        self._targets = None
        if self._ranks is not None:
            join_ranks(self._averages(), self._ranks)
        for block in self.blocks.values():
            block.fold(decay)


def _term_weights(
    captured: Capture, output: Any, loss: OutputLoss[Any]
) -> tuple[list[Tensor], dict[str, list[list[Tensor] | None]]]:
    """Weights of the terms of a loss: of all its parts, and by layer of a use's own one."""
    each = term_weights(loss)
    given = [weights for part in each for weights in part]
    alike = len(given) == len(each) and all(torch.equal(given[0], other) for other in given[1:])
    if not given or alike or len(each) == 1:  # one tensor for all: the graph need not be looked at
        return given, {}
    layers = captured.layers.items()
    places = {path: [call.edge.node for call in record.calls] for path, record in layers}
    parts = own_parts(output, places)
    return given, {
        path: [None if part is None else each[part] for part in mine]
        for path, mine in parts.items()
    }


def _close(first: Sequence[float], second: Sequence[float]) -> bool:
    pairs = zip(first, second, strict=False)
    return all(math.isclose(one, other, rel_tol=1e-5) for one, other in pairs)


def _thinned(block: LayerBlock, seen: Observation, enough: int, turn: int) -> Observation:
    """What a block sees, of as many samples as its factors need."""
    if not isinstance(block, KroneckerBlock) or block.needs_samples:
        return seen
    layout = block.layer.layout
    if not isinstance(layout, LinearLayout | ConvLayout):
        return seen
    largest = max(block.a.value.shape[-1], block.g.value.shape[-1])
    return seen.thinned(enough * largest, math.prod(layout.shapes[1][:-1]), turn)
