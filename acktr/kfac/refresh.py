"""Refreshes: a plan made on the main thread, computed anywhere, installed at once or later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acktr.kfac.background import BackgroundJob
from acktr.kfac.blocks.chain import Chain
from acktr.kfac.blocks.simple import Block, StatBlock
from acktr.kfac.blocks.tridiagonal import ChainInverse
from acktr.kfac.config import KFACConfig
from acktr.kfac.linalg import FactorError, Parts, Request, decompose
from acktr.kfac.statistics.averages import check_count, check_shape

ChainResult = ChainInverse | FactorError | None
Refresh = tuple[list[Parts | FactorError], ChainResult]
"""Decompositions in the order of the plan, and the chain's inverse."""
Damping = Callable[[Block], float]
"""The damping of a block."""


def staleness(requests: list[Request], references: list[Tensor | None]) -> list[float]:
    """Relative change ||S - S_ref|| / ||S_ref|| of factors; Inf without a reference, NaN kept."""
    changes = []
    for (matrix, _), reference in zip(requests, references, strict=True):
        if reference is None:
            changes.append(matrix.new_full((), torch.inf))
        else:
            size = reference.norm().clamp(min=torch.finfo(reference.dtype).tiny)
            changes.append((matrix - reference).norm() / size)
    found: list[float] = torch.stack(changes).tolist() if changes else []
    return found


@dataclass
class Plan:
    """Snapshots of the factors to decompose; computing it touches no state."""

    names: list[str]
    """Block of each request."""
    places: list[int]
    """Number of the factor inside its block."""
    requests: list[Request]
    counts: dict[str, int]
    """Factors per block."""
    chain: Callable[[], ChainResult] | None

    @classmethod
    def make(
        cls,
        stats: Mapping[str, StatBlock],
        chain: Chain | None,
        config: KFACConfig,
        damping: Damping,
    ) -> Plan:
        """Collect what needs a decomposition; with ``refresh_staleness`` only what changed.

        Raises:
            FactorError: A block's statistics were NaN or Inf ``max_failures`` times in a row.
        """
        chained = set() if chain is None else chain.names
        plan = cls([], [], [], {}, None)
        for name, block in stats.items():
            if name in chained:
                continue
            requests = block.requests(config, damping(block))
            plan.counts[name] = len(requests)
            chosen = [True] * len(requests)
            if config.refresh_staleness is not None and requests:
                limit = config.refresh_staleness
                changes = staleness(requests, block.references)
                chosen = [not change <= limit for change in changes]
            for place, request in enumerate(requests):
                if chosen[place]:
                    plan.names.append(name)
                    plan.places.append(place)
                    plan.requests.append(request)
        if chain is not None:
            per_layer = {block.name: damping(block) for block in chain.blocks}
            plan.chain = chain.request(per_layer, config.max_failures)
        return plan

    def state_dict(self) -> dict[str, Any]:
        """What is needed to compute the same plan again (without a chain)."""
        matrices = [matrix for matrix, _ in self.requests]
        return {"names": list(self.names), "places": list(self.places), "matrices": matrices}

    @classmethod
    def restored(
        cls, state: dict[str, Any], stats: Mapping[str, StatBlock], config: KFACConfig
    ) -> Plan:
        """The plan of :meth:`state_dict`; raises ValueError when it does not fit the blocks."""
        keys = ("names", "places", "matrices")
        if not isinstance(state, dict) or not all(isinstance(state.get(k), list) for k in keys):
            raise ValueError("K-FAC state: a refresh under way needs names, places and matrices")
        if len({len(state[key]) for key in keys}) != 1:
            raise ValueError("K-FAC state: a refresh under way has lists of unequal lengths")
        plan = cls([], [], [], {}, None)
        for name, place, matrix in zip(*(state[key] for key in keys), strict=True):
            if name not in stats:
                raise ValueError(f"K-FAC state: a refresh under way of an unknown layer {name!r}")
            block = stats[name]
            shapes = block.factor_shapes
            check_count(place, f"K-FAC layer {name!r}: number of a factor")
            if place >= len(shapes):
                raise ValueError(f"K-FAC layer {name!r} has no factor number {place}")
            check_shape(matrix, shapes[place], block.dtype, f"K-FAC layer {name!r}: pending")
            plan.names.append(name)
            plan.places.append(place)
            plan.requests.append((matrix.to(block.device), block.method(config)))
            plan.counts[name] = len(shapes)
        return plan

    def compute(self) -> Refresh:
        """Decompose everything; failures are returned, not raised."""
        return decompose(self.requests), None if self.chain is None else self.chain()

    def install(
        self,
        stats: Mapping[str, StatBlock],
        chain: Chain | None,
        config: KFACConfig,
        found: Refresh,
    ) -> None:
        """Give the blocks their results.

        Raises:
            FactorError: A block failed ``max_failures`` times in a row.
        """
        results: dict[str, list[Parts | FactorError | None]] = {
            name: [None] * count for name, count in self.counts.items()
        }
        for name, place, result in zip(self.names, self.places, found[0], strict=True):
            results[name][place] = result
        for name, mine in results.items():
            stats[name].install(mine, config)
        if config.refresh_staleness is not None:
            for name, place, request in zip(self.names, self.places, self.requests, strict=True):
                if not any(isinstance(result, FactorError) for result in results[name]):
                    stats[name].references[place] = request[0]
        if chain is not None:
            chain.install(found[1], config.max_failures)


class Refresher:
    """Refreshes the blocks at once, or in the background with a result that is due later.

    Args:
        stats: The blocks by name.
        chain: The chain they form, if any.
        config: Settings.
    """

    def __init__(
        self, stats: Mapping[str, StatBlock], chain: Chain | None, config: KFACConfig
    ) -> None:
        self.stats = stats
        self.chain = chain
        self.config = config
        self._job: tuple[Plan, BackgroundJob[Refresh]] | None = None
        self._due = 0

    def now(self, damping: Damping) -> None:
        """Renew the decompositions, after installing what is under way.

        Raises:
            FactorError: A block failed ``max_failures`` times in a row.
        """
        self._settle()
        plan = self._plan(damping)
        self._install(plan, plan.compute())

    def start(self, damping: Damping, turn: int, delay: int) -> None:
        """Begin a refresh that is due ``delay`` turns later; the first of all cannot be late.

        Raises:
            FactorError: As :meth:`now`, of a refresh before this one too.
        """
        self._settle()
        self._begin(self._plan(damping), turn + delay)
        if delay == 0 or turn == 0:
            self._settle()

    def install_due(self, turn: int) -> None:
        """Install a background result at its turn, waiting for it; raises as :meth:`now`."""
        if turn >= self._due:
            self._settle()

    def close(self) -> None:
        """Wait for a running refresh and forget it; no thread is left."""
        if self._job is not None:
            (_, job), self._job = self._job, None
            job.wait()

    def _plan(self, damping: Damping) -> Plan:
        return Plan.make(self.stats, self.chain, self.config, damping)

    def _begin(self, plan: Plan, due: int) -> None:
        self._job = (plan, BackgroundJob(plan.compute))
        self._due = due

    def _settle(self) -> None:
        if self._job is not None:
            (plan, job), self._job = self._job, None
            self._install(plan, job.collect())

    def _install(self, plan: Plan, found: Refresh) -> None:
        plan.install(self.stats, self.chain, self.config, found)

    def state_dict(self) -> dict[str, Any] | None:
        """A refresh under way; None without one."""
        return None if self._job is None else {"due": self._due, **self._job[0].state_dict()}

    def check_state(self, state: Any) -> None:
        """Raise ValueError when a state does not fit the blocks or the settings."""
        if state is None:
            return
        if self.config.refresh_delay is None:
            raise ValueError("K-FAC state has a refresh under way, but refresh_delay is None")
        Plan.restored(state, self.stats, self.config)
        check_count(state.get("due"), "K-FAC pending due")

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore a checked state: the refresh under way begins again."""
        self.close()
        if state is not None:
            self._begin(Plan.restored(state, self.stats, self.config), state["due"])
