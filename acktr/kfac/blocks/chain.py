"""The block-tridiagonal curvature of a chain of linear layers, as state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from acktr.kfac.blocks.kronecker import KroneckerBlock
from acktr.kfac.blocks.tridiagonal import ChainInverse, chain_inverse
from acktr.kfac.linalg import FactorError, factored_tikhonov
from acktr.kfac.statistics.averages import Observation, RunningAverage, check_count, check_tensor

_logger = logging.getLogger(__name__)


class Chain:
    """Cross moments of neighbouring layers, and the prepared inverse.

    The layers' own factors stay in their blocks; the chain adds E[a_i a_{i+1}^T] and
    E[g_i g_{i+1}^T] (Martens & Grosse 2015, section 4.3).

    Args:
        blocks: The linear layers in the order of registration, which must be that of the forward
            pass.

    Raises:
        ValueError: There are no layers, or some are not linear layers of their own.
    """

    def __init__(self, blocks: Sequence[KroneckerBlock]) -> None:
        odd = [b.name for b in blocks if not isinstance(b.module, nn.Linear) or len(b.paths) > 1]
        if odd or not blocks:
            raise ValueError(
                "structure=tridiagonal needs a chain of linear layers without shared weights, not"
                f" {', '.join(odd) or 'a network without linear layers'}"
            )
        self.blocks = list(blocks)
        self.a_cross = [RunningAverage() for _ in self.blocks[1:]]
        self.g_cross = [RunningAverage() for _ in self.blocks[1:]]
        self.inverse: ChainInverse | None = None
        self.failures = 0
        self.total_failures = 0

    @property
    def names(self) -> set[str]:
        """Names of the layers."""
        return {block.name for block in self.blocks}

    @torch.no_grad()
    def observe(self, seen: Mapping[str, Observation]) -> None:
        """Join a part of a batch to the cross moments.

        Raises:
            ValueError: A layer was not used exactly once, or over several positions.
        """
        if not set(seen) >= self.names:
            return
        rows: list[list[tuple[Tensor, Tensor]]] = []
        for block in self.blocks:
            uses = seen[block.name].uses
            if len(uses) != 1 or uses[0].args[0].dim() != 2:
                raise ValueError(
                    f"structure=tridiagonal needs every layer used once for (N, d) inputs:"
                    f" {block.name!r} is not"
                )
            weights = seen[block.name].weights
            rows.append([block.layout.rows(uses[0], index) for index in range(len(weights))])
        for index in range(len(self.a_cross)):
            here, there = rows[index], rows[index + 1]
            batch = seen[self.blocks[index].name]
            inputs = here[0][0][:, 0], there[0][0][:, 0]
            self.a_cross[index].add(inputs[0].mT @ inputs[1], len(inputs[0]))
            total: Tensor | None = None
            for weight, (_, g), (_, after) in zip(batch.weights, here, there, strict=True):
                part = (g[:, 0].mT @ after[:, 0]) * weight
                total = part if total is None else total + part
            assert total is not None
            self.g_cross[index].add(total * batch.factor, batch.count)

    def drop(self) -> None:
        """Forget the parts of an unfinished batch."""
        for average in (*self.a_cross, *self.g_cross):
            average.drop()

    @torch.no_grad()
    def fold(self, decay: float) -> None:
        """Take the joined batch into the running averages, with the decay of the own factors."""
        for average in (*self.a_cross, *self.g_cross):
            new = average.take()
            if new is not None:
                average.update(new, decay)

    @torch.no_grad()
    def request(self, damping: Mapping[str, float], limit: int) -> Callable[[], Any] | None:
        """A function that prepares the inverse from today's factors; None before statistics.

        Args:
            damping: Per layer name, split by pi as in factored Tikhonov.
            limit: Batches of NaN or Inf in a row that are an error.
        """
        if any(average.value is None for average in (*self.a_cross, *self.g_cross)):
            return None
        if any(block.a.value is None for block in self.blocks):
            return None
        own_a, own_g = [], []
        for block in self.blocks:
            block.counts.check_rejected(limit)
            a, g = factored_tikhonov(block.a.mean(), block.g.mean(), damping[block.name])
            own_a.append(a)
            own_g.append(g)
        a_cross = [average.mean() for average in self.a_cross]
        g_cross = [average.mean() for average in self.g_cross]

        def prepare() -> ChainInverse | FactorError:
            try:
                return chain_inverse(own_a, own_g, a_cross, g_cross)
            except FactorError as error:
                return error

        return prepare

    def install(self, result: ChainInverse | FactorError | None, limit: int) -> None:
        """Take a new inverse; an error keeps the former one.

        Raises:
            FactorError: After ``limit`` failures in a row.
        """
        if isinstance(result, FactorError):
            self.failures += 1
            self.total_failures += 1
            if self.failures >= limit:
                raise FactorError(
                    f"K-FAC chain: {result}; {self.failures} refreshes failed in a row"
                    " (lower lr or kl_clip, raise damping)"
                ) from result
            _logger.warning("the K-FAC chain keeps its former inverse: %s", result)
        elif result is not None:
            self.failures = 0
            self.inverse = result

    def precondition(self, gradients: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """F^-1 g of all layers, or None before any refresh or with a gradient missing."""
        if self.inverse is None:
            return None
        if any(name not in gradients for block in self.blocks for name in block.names):
            return None
        matrices = [block.matrix(gradients) for block in self.blocks]
        dtype = self.blocks[0].dtype
        steps = self.inverse.apply([matrix.to(dtype) for matrix in matrices])
        found: dict[str, Tensor] = {}
        for block, step in zip(self.blocks, steps, strict=True):
            found.update(block.split(step.to(matrices[0].dtype)))
        return found

    def _averages(self) -> dict[str, RunningAverage]:
        named = {}
        for kind, averages in (("a", self.a_cross), ("g", self.g_cross)):
            for index, average in enumerate(averages):
                named[f"{kind}{index}"] = average
        return named

    def _shapes(self) -> dict[str, tuple[int, int]]:
        a = [block.layout.a_shape[0] for block in self.blocks]
        g = [block.layout.g_shape[0] for block in self.blocks]
        found = {f"a{i}": (a[i], a[i + 1]) for i in range(len(a) - 1)}
        return found | {f"g{i}": (g[i], g[i + 1]) for i in range(len(g) - 1)}

    def state_dict(self) -> dict[str, Any]:
        """Cross moments and the possibly stale inverse."""
        averages = self._averages()
        return {
            "moments": {name: average.value for name, average in averages.items()},
            "weights": {name: average.weight for name, average in averages.items()},
            "inverse": None if self.inverse is None else list(self.inverse.tensors()),
            "failures": self.failures,
            "total_failures": self.total_failures,
        }

    def check_state(self, state: object) -> None:
        """Raise ValueError when a state does not fit the chain."""
        keys = {"moments", "weights", "inverse", "failures", "total_failures"}
        shapes = self._shapes()
        if not isinstance(state, dict) or set(state) != keys:
            raise ValueError(f"K-FAC chain: its state must have the entries {sorted(keys)}")
        dtype = self.blocks[0].dtype
        for entry in ("moments", "weights"):
            found = state[entry]
            if not isinstance(found, dict) or set(found) != set(shapes):
                raise ValueError(f"K-FAC chain: {entry} belong to other layers")
            for name, tensor in found.items():
                if (state["moments"][name] is None) != (tensor is None):
                    raise ValueError("K-FAC chain: some of the moments are missing")
                if tensor is not None:
                    shape = shapes[name] if entry == "moments" else ()
                    check_tensor(tensor, shape, dtype, f"K-FAC chain: {entry} {name}")
        if state["inverse"] is not None:
            self._restored(state["inverse"])
        for key in ("failures", "total_failures"):
            check_count(state[key], f"K-FAC chain: {key}")

    def _restored(self, tensors: Sequence[Tensor]) -> ChainInverse:
        shapes = [(b.layout.g_shape[0], b.layout.a_shape[0]) for b in self.blocks]
        return ChainInverse.from_tensors(tensors, shapes, self.blocks[0].dtype)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; raises ValueError, and changes nothing, when the state does not fit."""
        self.check_state(state)
        device = self.blocks[0].counts.rejected.device
        for name, average in self._averages().items():
            average.load(state["moments"][name], state["weights"][name], device)
        stored = state["inverse"]
        moved = None if stored is None else [tensor.to(device) for tensor in stored]
        self.inverse = None if moved is None else self._restored(moved)
        self.failures = state["failures"]
        self.total_failures = state["total_failures"]
