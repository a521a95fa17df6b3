"""Curvature of a whole module: statistics, refreshes and directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Never

import torch
from torch import Tensor, nn

from acktr.kfac.blocks.kronecker import extreme_eigenvalues
from acktr.kfac.blocks.refresh import Refresher
from acktr.kfac.blocks.registry import Block, Registry
from acktr.kfac.blocks.rules import Rules
from acktr.kfac.blocks.skip import Skip
from acktr.kfac.cadence import Cadence
from acktr.kfac.checks import check_integer, refuse_settings
from acktr.kfac.clock import Clock
from acktr.kfac.config import KFACConfig
from acktr.kfac.estimator import Estimator, Scalars
from acktr.kfac.fisher.extent import sizes
from acktr.kfac.guard import Guard, check_capture, check_loss
from acktr.kfac.linalg import LARGE_FACTOR, float32_products
from acktr.kfac.losses.base import OutputLoss, with_weights
from acktr.kfac.losses.sources import Sampled, Source
from acktr.kfac.ranks import Ranks
from acktr.kfac.region import Region
from acktr.kfac.state import curvature_state, plain_name
from acktr.kfac.statistics.capture import Capture, Divisor
from acktr.kfac.statistics.samples import Samples


class Curvature:
    """Kronecker-factored curvature of a module: learns from batches, and gives directions.

    Linear, convolution and embedding layers get a block A (x) G with the bias as a homogeneous
    coordinate; normalisations and lone biases the second moment of their gradients; parameters
    named in ``known_fisher`` that constant diagonal Fisher; everything else the diagonal of its
    Fisher, or what else ``config.small_parameters`` says. Layers that share a weight share a block.
    The module is not changed.

    Args:
        module: The network.
        config: Settings; those of momentum and cold steps are for :class:`acktr.kfac.KFAC` only.
        known_fisher: Diagonal Fisher by parameter name, for parameters outside of layers.
        layers: How layers of one's own become rows, by their type.
        skip: Layers without a block of their own, by path, pattern of paths ("blocks.*.mlp") or
            class; their parameters get what parameters outside of layers get.
        parameters: Those to precondition, by default all trainable; others may have an optimizer.
        seed: Seed of the generator that sampled targets are drawn with.
        ranks: The processes that have the other shares of every batch; None for one process.
        settings: There are none: they belong into the config.

    Raises:
        ValueError: ``known_fisher``, the structure or a rule for layers does not fit the module.
    """

    def __init__(
        self,
        module: nn.Module,
        config: KFACConfig | None = None,
        *,
        known_fisher: Mapping[str, float] | None = None,
        layers: Rules | None = None,
        skip: Skip = (),
        parameters: Iterable[nn.Parameter] | None = None,
        seed: int = 0,
        ranks: Ranks | None = None,
        **settings: Never,
    ) -> None:
        refuse_settings(self, settings, KFACConfig)
        self.module = module
        self.config = config or KFACConfig()
        every = {name: p for name, p in module.named_parameters() if p.requires_grad}
        mine = None if parameters is None else set(map(id, parameters))
        self.named = {n: p for n, p in every.items() if mine is None or id(p) in mine}
        self._guard = Guard(module, self.named, everything=parameters is None, ranks=ranks)
        self.blocks = Registry(
            module, every, known_fisher or {}, self.config, layers, skip, self.named
        ).build()
        several = None if ranks is None or ranks.size == 1 else ranks  # one has whole batches
        self._estimator = Estimator(module, self.named, self.blocks, self._guard, several)
        self.stats = self._estimator.blocks
        self.damping = self.config.damping
        place = next(module.parameters(), None)
        if place is None:
            raise ValueError("K-FAC needs a module with parameters")
        self.generator = torch.Generator(place.device).manual_seed(seed)
        factors = (factor.value for block in self.stats.values() for factor in block.factors)
        self._large = any(max(value.shape) >= LARGE_FACTOR for value in factors)
        parts = ("fisher", "factors", "refresh", "apply", "exact")
        self._clock = Clock(parts, place.device, fast=self._large and self.config.fast_products)
        self.seconds = self._clock.seconds
        self._cadence = Cadence(self.config)
        kinds = self.config, self._cadence, place, self._clock, several
        self.region = Region(module, self.named, *kinds)
        self.cold = False
        """Whether the next step does not use the curvature."""
        self.weights = {name for name, parameter in self.named.items() if parameter.dim() > 1}
        self.batches = 0
        """Batches folded so far."""
        self.turn = 0
        """Number of the next step."""
        self._refresher = Refresher(self.stats, ranks)
        self._guard.check_settings(self.blocks, self.config, seed)

    # --- statistics -------------------------------------------------------------------------------

    def capture(self) -> AbstractContextManager[Capture]:
        """Context in which forward passes are recorded for :meth:`observe`.

        Raises:
            ValueError: A parameter was replaced, moved or unfrozen since the construction.
        """
        self._guard.check_parameters()
        self._guard.check_kept()
        return self._estimator.capture(layers=self.observing, twice=self.following)

    def observe(
        self,
        captured: Capture,
        output: Any,
        loss: OutputLoss[Any],
        *,
        source: Source | None = None,
        weights: Any = None,
        target: Any = None,
        present: Tensor | Sequence[Tensor] | None = None,
        last: bool = True,
    ) -> None:
        """Fold one batch into the curvature, unless ``stat_interval`` passes it over.

        Args:
            captured: The records of the forward pass.
            output: The module's output in that pass, or a part of it, with its graph (which is
                kept).
            loss: What the output means: it draws targets and knows the objective's scale.
            source: Sampled(n), by default n = 1; Exact(), Empirical(target) where no samples meet.
            weights: A mask, or numbers >= 0, for the loss's terms (N, ...) or for samples (N,), as
                the objective has them: padded tokens, absent agents. For a SumLoss one tensor, or
                a tuple with one or None for each part.
            target: The real targets, for a loss in which they decide on weights
                (``ignore_index``, ``class_weights``).
            present: A mask (N, T, ...) of the positions that are no padding, where the loss's terms
                do not tell, as nodes or words that are pooled: the others count in no factor. Of
                several masks a layer takes the first that fits most of its dimensions.
            last: False for all micro-batches of a batch but the last. For the exact Fisher of the
                step the module runs again on the inputs of the former ones. Calls are averaged:
                several losses of one pass are one :class:`acktr.kfac.SumLoss`.

        Raises:
            ValueError: Nothing was recorded or a layer does not fit, and all parts of the batch are
                forgotten; or the loss or the source does not fit, and those before are kept.
        """
        check_capture(captured)
        check_loss(loss)
        loss = with_weights(loss, output, weights, target, empty=self.region.shared)
        self.region.see()
        follow, measure = self.following and last, self.measuring and last
        observed = self.region.observe(
            captured, output, loss, (weights, target), follow=follow, measure=measure
        )
        if self.observing:
            if last:
                self._guard.warn_average(captured, output)
                self._guard.warn_rounded(captured, self.damping)
            part = observed.select is not None
            self._estimator.check_scales(loss, output, last)
            given = loss, source or Sampled(), present, self.generator
            scalars, batch = self._estimator.scalars(captured, output, *given, part=part)
            size = sizes(loss, output)[0]
            self._fold(captured, scalars, "sum" if size is None else size, batch, last)
        if last:
            self.region.drop()
        elif self.following or self.measuring:
            self.region.join(observed)

    def update_curvature(
        self,
        captured: Capture,
        log_likelihood: Tensor,
        *,
        samples: int | None = None,
        last: bool = True,
    ) -> None:
        """Fold one batch into the Fisher factors, as :meth:`observe`, for a loss of one's own.

        Args:
            captured: The records of the forward pass.
            log_likelihood: *Sum* over the samples of the log-likelihood (its sign is irrelevant) of
                targets sampled from the model's own output distribution, which gives the true
                Fisher of a mean over samples.
            samples: Their number N; by default the leading dimension of the module's output. For a
                mean over the N T positions of an output (N, T, ...) it is N T.
            last: False for all micro-batches of a large batch but the last.

        Raises:
            ValueError: As :meth:`observe`, or samples is not positive.
        """
        lengths = captured.sizes()
        if samples is not None:
            check_integer("samples", samples, 0 if self.region.shared else 1)
        elif len(lengths) == 1:
            (samples,) = lengths
            self._guard.warn_positions(captured, log_likelihood)
        if self.observing:
            empty = self.region.shared and samples == 0
            scalars = [] if empty else [(log_likelihood, 1.0)]
            divisor: Divisor = "samples" if samples is None else samples
            self._fold(captured, scalars, divisor, Samples(lengths), last)

    def _fold(
        self, captured: Capture, scalars: Scalars, divisor: Divisor, batch: Samples, last: bool
    ) -> None:
        with self._clock.part("fisher"):
            pairs, squares = self._estimator.gradients(captured, scalars)
        with self._clock.part("factors"):
            enough, turn = self.config.factor_rows, self.batches
            try:
                self._estimator.observe(captured, pairs, squares, divisor, batch, enough, turn)
            except BaseException:
                self.region.drop()
                raise
            if last:
                self._estimator.fold(self.config.stat_decay)
                self.batches += 1

    def forget(self) -> None:
        """Forget what was observed since the last whole batch: a batch that is given up.

        What ``last=False`` began would otherwise be part of the next batch, as after an error of
        the loader or of memory. Gradients are the caller's own, to be set to zero.
        """
        self._estimator.drop()
        self.region.drop()

    @property
    def observing(self) -> bool:
        """Whether batches are folded before the next step; others cost a forward pass at most."""
        return self._cadence.observes(self.turn)

    @property
    def measuring(self) -> bool:
        """Whether the next step measures its exact form for the corrected trust region."""
        return not self.cold and self.region.measures(self.turn)

    @property
    def following(self) -> bool:
        """Whether the observed pass keeps its graph for the exact Fisher of the next step."""
        return not self.cold and self.region.follows(self.turn)

    # --- refreshes --------------------------------------------------------------------------------

    @property
    def needs_refresh(self) -> bool:
        """Whether the next step renews decompositions."""
        return self._cadence.refreshes(self.turn)

    def refresh(self, decay: Mapping[str, float] | None = None) -> None:
        """Renew the decompositions now; raises FactorError after max_failures in a row.

        ``decay`` is that of :meth:`direction`, for inverses that hold their damping.
        """
        with self._clock.part("refresh"):
            self._refresher.renew(partial(self.block_damping, decay=decay))

    def prepare(self, decay: Mapping[str, float] | None = None) -> None:
        """Before a step: install a background result that is due, and refresh if it is time.

        A block whose first statistics came late is not left waiting for the next refresh.
        :meth:`advance` after the step moves on to the next one. Raises FactorError as
        :meth:`refresh`, or when the background refresh failed; ValueError for several ranks.
        """
        self._guard.check_ranks()
        with self._clock.part("refresh"):
            self._refresher.finish(self.turn)
            if self.needs_refresh or self.measuring:
                self._guard.check_gradients(self.turn)
            if self.needs_refresh:
                self._guard.check_skipped(self.config.max_failures)
            late = any(block.history.late for block in self._estimator.layers)
            if self.needs_refresh or late:
                delay = 0 if late else self._cadence.delay(self.turn)
                due = self.turn + delay if delay else None
                self._refresher.renew(partial(self.block_damping, decay=decay), due)

    def advance(self, quadratic: Tensor | None = None) -> None:
        """After a step, with its quadratic form: the next one is another turn of the intervals."""
        self.turn += 1
        self.region.advance()
        if quadratic is not None:
            self._guard.count_skipped(quadratic)

    def close(self) -> None:
        """Wait for a running background refresh and forget it; no thread is left."""
        self._refresher.close()

    # --- directions ------------------------------------------------------------------------------

    def block_damping(self, block: Block, decay: Mapping[str, float] | None = None) -> float:
        """Lambda, and the largest weight decay among the block's weights (one of them as a rule).

        ``decay`` is by name; by default all have that of the settings.
        """
        mine = self.weights.intersection(block.names)
        rates = [self.config.weight_decay if decay is None else decay.get(n, 0.0) for n in mine]
        return self.damping + max(rates, default=0.0)

    def gradients(
        self, decay: Mapping[str, float] | None = None, *, factor: float = 1.0
    ) -> dict[str, Tensor]:
        """Present gradients by name, with weight decay added to all with two dimensions or more.

        ``decay`` is by name, for the parameters wanted; by default all have that of the settings.
        The gradients are taken times ``factor``.
        """
        rates = dict.fromkeys(self.named, self.config.weight_decay) if decay is None else decay
        result: dict[str, Tensor] = {}
        for name, rate in rates.items():
            parameter = self.named[name]
            if parameter.grad is not None:
                grad = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
                grad = grad if factor == 1 else grad * factor
                decayed = rate and name in self.weights
                result[name] = grad.add(parameter, alpha=rate) if decayed else grad
        return result

    @torch.no_grad()
    def direction(
        self, gradients: dict[str, Tensor], decay: Mapping[str, float] | None = None
    ) -> dict[str, Tensor]:
        """U = (F + lambda)^-1 g by parameter name.

        Args:
            gradients: g by name.
            decay: Weight decay by name, which adds to the damping; by default that of the settings.
        """
        self._guard.warn_unseen(self.stats.values(), gradients)
        products = float32_products(self.generator.device) if self._large else nullcontext()
        with self._clock.part("apply"), products:
            step: dict[str, Tensor] = {}
            for block in self.blocks:
                missing = [name for name in block.names if name not in gradients]
                if len(missing) < len(block.names):
                    given = gradients | {n: torch.zeros_like(self.named[n]) for n in missing}
                    step |= block.precondition(given, self.block_damping(block, decay))
            return {n: u.to(gradients[n].dtype) for n, u in step.items() if n in gradients}

    # --- inspection and state ---------------------------------------------------------------------

    def extreme_eigenvalues(self) -> tuple[float, float]:
        """Smallest and largest eigenvalue over all Kronecker blocks; NaN before a refresh."""
        return extreme_eigenvalues(self.blocks)

    @property
    def failures(self) -> int:
        """Failed decompositions so far, over all blocks."""
        return sum(block.history.total_failures for block in self.stats.values())

    def state_dict(self) -> dict[str, Any]:
        """Statistics, the possibly stale decompositions, a refresh under way, and the generator.

        Names are those of a module that is not compiled. What :meth:`observe` collected with
        ``last=False`` is not part of it, and loading forgets it.
        """
        corrected = self.region.corrected
        return {
            "turn": self.turn,
            "statistics": self.batches,
            "damping": self.damping,
            "generator": self.generator.get_state(),
            "pending": self._refresher.state_dict(),
            "layers": {plain_name(name): b.state_dict() for name, b in self.stats.items()},
            "trust": None if corrected is None else corrected.state_dict(),
        }

    def checked(self, state: Any) -> dict[str, Any]:
        """A state to load; ValueError if it does not fit."""
        fitting = curvature_state(state, self.state_dict(), self._estimator.rest)
        if fitting["pending"] is not None:
            self._refresher.check_state(fitting["pending"])
        return fitting

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; ValueError and no change if it does not fit."""
        state = self.checked(state)
        self.close()
        self.forget()
        for name, block in self.stats.items():
            block.load(state["layers"][plain_name(name)])
        self.turn = state["turn"]
        self.batches = state["statistics"]
        self.damping = float(state["damping"])
        self.generator.set_state(state["generator"].cpu())
        self.region.observed = None
        if self.region.corrected is not None:
            self.region.corrected.load_state_dict(state["trust"])
        self._refresher.load_state_dict(state["pending"])
