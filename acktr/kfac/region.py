"""The exact Fisher of the last observed batch, and the trust region that it measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from acktr.kfac.cadence import Cadence
from acktr.kfac.clock import Clock
from acktr.kfac.config import KFACConfig
from acktr.kfac.corrected import CorrectedRegion, Proposal
from acktr.kfac.fisher.extent import Estimate
from acktr.kfac.fisher.graph import own_parameters
from acktr.kfac.fisher.joined import JoinedFisher
from acktr.kfac.fisher.observed import Observed
from acktr.kfac.losses.base import OutputLoss
from acktr.kfac.losses.terms import has_rows
from acktr.kfac.ranks import Ranks
from acktr.kfac.statistics.capture import Capture
from acktr.kfac.trust import FisherQuadratic, Fit, UnobservedError, rescale


class Region:
    """Fits steps into the trust region, by the kind of q that the settings name.

    Args:
        module: The network.
        named: The parameters that K-FAC steps, by name.
        config: Settings.
        cadence: When decompositions are renewed.
        example: A parameter: device and type.
        clock: Counts the time of exact forms.
        ranks: Who has the other shares of every batch; None for one process.
    """

    def __init__(
        self,
        module: nn.Module,
        named: Mapping[str, nn.Parameter],
        config: KFACConfig,
        cadence: Cadence,
        example: Tensor,
        clock: Clock,
        ranks: Ranks | None = None,
    ) -> None:
        self._module, self._named, self._config = module, named, config
        self._cadence, self._clock = cadence, clock
        self._ranks, self._place = ranks, example.device
        self.observed: Observed | None = None
        """The last observed pass."""
        self._earlier: tuple[Observed, ...] = ()
        """The micro-batches so far of a batch that goes on."""
        self.corrected: CorrectedRegion | None = None
        """The region of quadratic="corrected"; None for another kind of q, or without a bound."""
        if config.quadratic == "corrected" and config.kl_clip is not None:
            self.corrected = CorrectedRegion(list(named), config.kl_clip, example)
        self.follow_all = config.quadratic == "exact"
        """Whether every observed pass keeps its graph for products with the exact Fisher."""

    @property
    def shared(self) -> bool:
        """Whether other ranks have shares of every batch."""
        return self._ranks is not None

    def _fisher(self, observed: Observed) -> Observed | JoinedFisher:
        """What measures the batch of a pass: the pass itself, or all ranks together."""
        if self._ranks is None:
            return observed
        return JoinedFisher(self._ranks, self._place, observed)

    def see(self) -> None:
        """Note that there is something to measure with."""
        if self.corrected is not None:
            self.corrected.blind = False

    def measures(self, turn: int) -> bool:
        """Whether the step of a turn is measured for the corrected trust region."""
        return self.corrected is not None and self.corrected.due(turn)

    def follows(self, turn: int) -> bool:
        """Whether the observed pass of a turn keeps its graph."""
        entire = self.corrected is not None and self.corrected.entire
        return self.follow_all or (entire and self.measures(turn))

    def observe(
        self,
        captured: Capture,
        output: Any,
        loss: OutputLoss[Any],
        terms: tuple[Any, Any],
        *,
        follow: bool,
        measure: bool,
    ) -> Observed:
        """Take a pass for the last observed one.

        Args:
            captured: The records of the forward pass.
            output: The loss's output.
            loss: What the output means.
            terms: Weights and targets that made the loss that of this batch.
            follow: Whether to keep the graph.
            measure: Whether the next step is measured for the corrected trust region.
        """
        moving = {name: p for name, p in self._named.items() if p.requires_grad}
        region = self.corrected
        with self._clock.part("exact"):
            kept = moving if follow and has_rows(output) else None
            observed = Observed.of(captured, output, loss, kept, terms)
            observed.share = self.shared
            observed.earlier = self._earlier if follow or measure else ()
            if region is not None and measure:
                if region.separate:
                    region.own(own_parameters(output, moving))
                if follow:
                    region.whole |= not self._fisher(observed).estimable
        self.observed = observed
        return observed

    def join(self, observed: Observed) -> None:
        """Keep a pass for the exact forms of the batch that it is a micro-batch of."""
        self._earlier = (*self._earlier, observed.former())

    def drop(self) -> None:
        """Forget the micro-batches of a batch."""
        self._earlier = ()

    def fit(
        self, proposal: Proposal, turn: int, fisher_quadratic: FisherQuadratic | None = None
    ) -> Fit:
        """Fit the step -lr (1 - mu) (mu v + nu U) into the region.

        Args:
            proposal: The step.
            turn: Its number.
            fisher_quadratic: Gives exact forms instead of the observed pass.

        Raises:
            ValueError: An exact form is needed and has nothing to work with.
        """
        region = self.corrected
        if region is None:
            assert not isinstance(self._config.kl_clip, tuple)
            exact = self._config.quadratic == "exact"
            form = (fisher_quadratic or self.quadratic) if exact else None
            gradients, step = dict(proposal.gradients), dict(proposal.step)
            return rescale(gradients, step, self._config.kl_clip, proposal.lr, form)

        if fisher_quadratic is not None:
            self.see()

        def measure(vectors: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
            if fisher_quadratic is not None and not region.separate:
                return fisher_quadratic(dict(vectors[0])).detach().reshape(1, 1, 1)
            return self._measured(region, vectors, turn)

        observed = None if region.entire and not region.whole else self.observed

        def spend(change: Mapping[str, Tensor]) -> Tensor | None:
            return None if observed is None else self._spent(region, observed, change, turn)

        return region.fit(proposal, measure, spend, turn, self._cadence.renewed)

    def _measured(
        self, region: CorrectedRegion, vectors: Sequence[Mapping[str, Tensor]], turn: int
    ) -> Tensor | None:
        """Exact forms (parts, m, m) for the region; those of parts without their weights."""
        if region.entire:
            grams: Tensor | None = self.grams(vectors)
        else:
            found = self.estimated(vectors, turn, region.measurements.sparsest)
            grams = None if found is None else found.grams
            region.measurements.sparsest = 1 if found is None else found.sparsest
        if grams is None or not region.separate:
            return None if grams is None else grams.sum(0, keepdim=True)
        assert self.observed is not None
        return grams / grams.new_tensor(self.observed.weights)[:, None, None]

    def _spent(
        self,
        region: CorrectedRegion,
        observed: Observed,
        change: Mapping[str, Tensor],
        turn: int,
    ) -> Tensor | None:
        """The KL that a change costs as many samples as the next measurement takes."""
        sparsest = 0 if region.whole else region.measurements.sparsest
        with self._clock.part("exact"):
            kl = self._fisher(observed).estimated_kl(self._module, change, turn, sparsest)
        if kl is None or region.separate:
            return kl
        return (kl * kl.new_tensor(observed.weights)).sum().reshape(1)

    def quadratic(self, step: dict[str, Tensor]) -> Tensor:
        """U^T F U with the exact Fisher of the last observed batch; raises as :meth:`grams`."""
        return self.grams([step]).sum()

    def grams(self, vectors: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Forms v_i^T F_k v_j (parts, m, m) of the parts F_k that the exact Fisher is the sum of.

        Raises:
            UnobservedError: Nothing was observed with a loss.
            ValueError: What was observed does not do.
        """
        if self.observed is None:
            raise UnobservedError(
                f'quadratic="{self._config.quadratic}" needs fisher_quadratic in step(),'
                " or observe() with a loss"
            )
        with self._clock.part("exact"):
            return self._fisher(self.observed).grams(self._module, vectors)

    def estimated(
        self, vectors: Sequence[Mapping[str, Tensor]], turn: int, sparsest: int
    ) -> Estimate | None:
        """:meth:`grams` estimated from a part of the observed samples; None if it cannot be."""
        if self.observed is None:
            return None
        with self._clock.part("exact"):
            fisher = self._fisher(self.observed)
            return fisher.estimated_grams(self._module, vectors, turn, sparsest)

    def spending(self, outputs: Callable[[], Any]) -> Callable[[], Tensor]:
        """The KL that a step from here will have cost when it is called, by part (K,).

        Args:
            outputs: Gives the loss's output at the present parameters.

        Raises:
            ValueError: Nothing was observed with a loss, or the loss knows no KL.
        """
        if self.observed is None:
            raise ValueError("the KL of a step needs observe() with a loss before it")
        return self._fisher(self.observed).spending(self._module, outputs)

    def objective(self, value: float) -> float:
        """The objective of the whole batch, from that of this process's share."""
        return value if self.observed is None else self._fisher(self.observed).objective(value)

    def advance(self) -> None:
        """Let go of the graph of parameters that have moved, and of former micro-batches."""
        if self.observed is not None:
            self.observed.followed = None
            self.observed.output = None
            self.observed.earlier = ()
