"""Curvature of a whole module: statistics, refreshes and preconditioning."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from acktr.kfac.blocks.alike import alike, observe_all
from acktr.kfac.blocks.diagonal import DiagonalBlock
from acktr.kfac.blocks.kronecker import KroneckerBlock
from acktr.kfac.blocks.refresh import Refresher
from acktr.kfac.blocks.registry import ROOT, Block, Registry, StatBlock
from acktr.kfac.blocks.rules import Rules
from acktr.kfac.blocks.skip import Skip
from acktr.kfac.checks import (
    cast_like,
    check_integer,
    check_number,
    modernised,
    plain_name,
    require_like,
)
from acktr.kfac.config import KFACConfig
from acktr.kfac.corrected import fit_step, part_weights
from acktr.kfac.fisher.observed import Observed, own_parameters
from acktr.kfac.guard import Guard, check_loss, check_ranks
from acktr.kfac.linalg import LARGE_FACTOR, float32_products
from acktr.kfac.losses.base import OutputLoss, with_weights
from acktr.kfac.losses.likelihoods import SumLoss
from acktr.kfac.losses.sources import Empirical, Exact, Sampled, Source, curvature_scalars
from acktr.kfac.radius import TrustRegion
from acktr.kfac.statistics.capture import Capture, OutputGradients, RandomState, capture, part_size
from acktr.kfac.statistics.elementary import elementary_operations
from acktr.kfac.statistics.projections import recorded
from acktr.kfac.statistics.samples import Samples, checked_masks
from acktr.kfac.trust import StepInfo, rescale, scaled


class Preconditioner:
    """Kronecker-factored curvature in front of any torch optimizer.

    Linear, convolution and embedding layers get a block A (x) G with the bias as a homogeneous
    coordinate; normalisations and lone biases the second moment of their gradients; parameters
    named in ``known_fisher`` that constant diagonal Fisher; everything else the diagonal of its
    Fisher, or what else ``config.small_parameters`` says. Layers that share a weight share a block.
    The module is not changed. One step::

        with curvature.capture() as captured:
            output = model(inputs)
        curvature.observe(captured, output, loss)
        optimizer.zero_grad()
        loss(output, targets).backward()
        curvature.precondition(lr=optimizer.param_groups[0]["lr"])
        optimizer.step()

    Args:
        module: The network.
        config: Settings; those of momentum and cold steps are for :class:`acktr.kfac.KFAC` only.
        known_fisher: Diagonal Fisher by parameter name, for parameters outside of layers.
        layers: How layers of one's own become rows, by their type.
        skip: Layers without a block of their own, by path, pattern of paths ("blocks.*.mlp") or
            class; their parameters get what parameters outside of layers get.
        parameters: Those to precondition; by default all that are trainable. Others may belong to
            another optimizer.
        seed: Seed of the generator that sampled targets are drawn with.

    Raises:
        ValueError: ``known_fisher`` names a parameter that does not exist, or the structure or a
            rule for layers does not fit the module.
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
    ) -> None:
        self.module = module
        self.config = config or KFACConfig()
        every = {name: p for name, p in module.named_parameters() if p.requires_grad}
        mine = None if parameters is None else set(map(id, parameters))
        self.named = {n: p for n, p in every.items() if mine is None or id(p) in mine}
        self._guard = Guard(module, self.named, everything=parameters is None)
        registry = Registry(
            module, every, known_fisher or {}, self.config, layers, skip, self.named
        )
        self.blocks = registry.build()
        learning = (block for block in self.blocks if isinstance(block, StatBlock))
        self.stats: dict[str, StatBlock] = {block.name: block for block in learning}
        paths = [path for block in self.stats.values() for path in block.paths]
        blocks = self.stats.values()
        self._layers = [block for block in blocks if not isinstance(block, DiagonalBlock)]
        self._alike = alike(self._layers)
        self._rest = {block.name: block for block in blocks if isinstance(block, DiagonalBlock)}
        self._recorded = {p: module if p == ROOT else recorded(module, p) for p in paths}
        self.damping = self.config.damping
        place = next(module.parameters(), None)
        if place is None:
            raise ValueError("K-FAC needs a module with parameters")
        self.generator = torch.Generator(place.device).manual_seed(seed)
        self.observed: Observed | None = None
        self.follow_all = self.config.quadratic == "exact"
        """Whether every observed pass keeps its graph for products with the exact Fisher."""
        self.cold = False
        """Whether the next step does not use the curvature."""
        self.region: TrustRegion | None = None
        """The corrected trust region; None for another kind of q, or without a bound."""
        if self.config.quadratic == "corrected" and self.config.kl_clip is not None:
            self.region = TrustRegion(list(self.named), self.config.kl_clip, place)
        self.seconds = {"fisher": 0.0, "factors": 0.0, "refresh": 0.0, "apply": 0.0, "exact": 0.0}
        self.weights = {name for name, parameter in self.named.items() if parameter.dim() > 1}
        factors = [factor.value for block in self.stats.values() for factor in block.factors]
        self._large = any(max(value.shape) >= LARGE_FACTOR for value in factors)
        self.batches = 0
        """Batches folded so far."""
        self._scales: list[float] = []
        """Those of the parts of a SumLoss in the micro-batches so far."""
        self._turn = 0
        self._refresher = Refresher(self.stats)

    @contextmanager
    def capture(self) -> Iterator[Capture]:
        """Context in which forward passes are recorded for :meth:`observe`.

        Raises:
            ValueError: A parameter was replaced, moved or unfrozen since the construction.
        """
        self._guard.check_parameters()
        self._guard.check_kept()
        random = RandomState.now(self.named.values())
        attention = elementary_operations() if self.following else nullcontext()
        layers = self._recorded if self.observing else {}  # hooks take time in small layers
        with attention, capture(layers, self.module) as captured:
            captured.random = random
            yield captured

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
            source: Sampled(n), Exact() or Empirical(target); by default one sampled target. The
                last two are refused where samples meet.
            weights: A mask, or numbers >= 0, for the loss's terms (N, ...) or for samples (N,), as
                the objective has them: padded tokens, absent agents. For a SumLoss one tensor, or
                a tuple with one or None for each part.
            target: The real targets, for a loss in which they decide on weights
                (``ignore_index``, ``class_weights``).
            present: A mask (N, T, ...) of the positions that are no padding, where the loss's terms
                do not tell, as nodes or words that are pooled: the others count in no factor. Of
                several masks a layer takes the first that fits most of its dimensions.
            last: False for all micro-batches of a large batch but the last, which also gives the
                exact Fisher of the step. Batches are averaged: several losses of one pass are one
                :class:`acktr.kfac.SumLoss`, not several calls.

        Raises:
            ValueError: Nothing was recorded or a layer does not fit, and all parts of the batch are
                forgotten; or the loss or the source does not fit, and those before are kept.
        """
        check_loss(loss)
        loss = with_weights(loss, output, weights, target)
        with self._timed("exact"):
            self._keep(captured, output, loss, (weights, target), last)
        if not self.observing:
            return
        if last:
            self._guard.warn_average(captured, output)
        self._check_scales(loss, output, last)
        batch = self._samples(captured, output, loss, source, present)
        scalars = curvature_scalars(
            source or Sampled(), loss, output, self.generator, apart=bool(self._rest)
        )
        normalizer = loss.normalizer(output)
        self._observe(captured, scalars, "sum" if normalizer is None else normalizer, batch, last)

    def _check_scales(self, loss: OutputLoss[Any], output: Any, last: bool) -> None:
        """Raise ValueError when the parts of a loss weigh differently in the micro-batches."""
        scales = loss.scales(output) if isinstance(loss, SumLoss) else []
        before, self._scales = self._scales or scales, [] if last else self._scales or scales
        pairs = zip(before, scales, strict=False)
        if not all(math.isclose(first, second, rel_tol=1e-5) for first, second in pairs):
            raise ValueError(
                f"SumLoss: its parts have the scales {scales} in this micro-batch and {before} in"
                " those before, which do not add up to one batch: take parts with"
                ' reduction="sum", and give weights that are divided by each part\'s Z of the whole'
                " batch"
            )

    def _keep(
        self,
        captured: Capture,
        output: Any,
        loss: OutputLoss[Any],
        terms: tuple[Any, Any],
        last: bool,
    ) -> None:
        """Keep what products with the exact Fisher of this pass need."""
        moving = {name: p for name, p in self.named.items() if p.requires_grad}
        following = self.following and last
        self.observed = Observed.of(captured, output, loss, moving if following else None, terms)
        region = self.region
        if region is not None and self.measuring and last:
            if region.separate:
                region.own(own_parameters(output, moving))
            if following:
                region.whole |= self.observed.stride == 1 or self.observed.followed is None

    def _samples(
        self,
        captured: Capture,
        output: Any,
        loss: OutputLoss[Any],
        source: Source | None,
        present: Tensor | Sequence[Tensor] | None,
    ) -> Samples:
        """What is known of a batch's samples; ValueError where they must not meet but do."""
        parts = output if isinstance(output, tuple) else (output,)
        sizes = frozenset(len(part) for part in parts if isinstance(part, Tensor) and part.dim())
        apart = isinstance(source, Exact | Empirical)
        if apart and len(sizes) > 1:
            raise ValueError(
                f"{type(source).__name__}() takes every sample by itself, but the outputs have the"
                f" lengths {sorted(sizes)}: Sampled() is right there"
            )
        assert self.observed is not None
        known = sizes if self.observed.select is not None else sizes | captured.sizes()
        batch = Samples(
            known,
            apart,
            weights=getattr(loss, "term_weights", ()),
            present=checked_masks(present, sizes | captured.sizes()),
        )
        unplaced = any(
            block.needs_samples
            and batch.dimension(captured.layers[path].module, call.shape) is None
            for block in self._layers
            for path in block.paths
            for call in captured.layers[path].calls
        )
        looking = len(sizes) == 1 and (apart or unplaced)
        return captured.owners(output, batch) if looking else batch

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
        sizes = captured.sizes()
        if samples is not None:
            check_integer("samples", samples, 1)
        elif len(sizes) == 1:
            (samples,) = sizes
            self._guard.warn_positions(captured, log_likelihood)
        if self.observing:
            batch = Samples(sizes)
            self._observe(captured, [(log_likelihood, 1.0)], samples or "samples", batch, last)

    def _observe(
        self,
        captured: Capture,
        scalars: Iterable[tuple[Tensor, float]],
        divisor: float | Literal["samples", "sum"],
        batch: Samples,
        last: bool,
    ) -> None:
        with self._timed("fisher"):
            pairs, squares = self._gradients(captured, scalars)
        with self._timed("factors"), torch.no_grad():
            try:
                layers = self._layers
                seen = [captured.observation(b.paths, pairs, divisor, batch) for b in layers]
                observe_all(layers, seen, self._alike)
                if layers and not any(part.uses for part in seen):
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
                    self._rest[name].observe(square, part_size(pairs, divisor))
            except BaseException:  # a part that is missing would spoil the whole batch
                self._scales = []
                for average in (a for block in self.stats.values() for a in block.averages):
                    average.drop()
                raise
            if last:
                for folded in self.stats.values():
                    folded.fold(self.config.stat_decay)
                self.batches += 1

    def _gradients(
        self, captured: Capture, scalars: Iterable[tuple[Tensor, float]]
    ) -> tuple[list[tuple[OutputGradients, float]], dict[str, Tensor | None]]:
        """Output gradients and weight of each scalar, and sum_c w_c g_c^2 of the rest."""
        rest = {name: self.named[name] for name in self._rest if self.named[name].requires_grad}
        squares: dict[str, Tensor | None] = dict.fromkeys(rest)
        pairs = []
        for scalar, weight in scalars:
            self._guard.warn_outside(self._layers, captured, scalar)
            gradients = captured.output_gradients(scalar, rest)
            for name in rest:  # squared at once, so that only one such gradient is kept
                (gradient,) = gradients.pop(name)
                if gradient is not None:
                    square, before = self._rest[name].square(gradient) * weight, squares[name]
                    squares[name] = square if before is None else before.add_(square)
            pairs.append((gradients, weight))
        return pairs, squares

    @property
    def observing(self) -> bool:
        """Whether batches are folded before the next step; others cost a forward pass at most."""
        return self._turn % self.config.stat_interval == 0 or self._starting

    @property
    def turn(self) -> int:
        """Number of the next step."""
        return self._turn

    @property
    def measuring(self) -> bool:
        """Whether the next step measures its exact form for the corrected trust region."""
        return self.region is not None and self.region.due(self._turn) and not self.cold

    @property
    def following(self) -> bool:
        """Whether the observed pass keeps its graph for the exact Fisher of the next step."""
        entire = self.measuring and self.region is not None and self.region.entire
        return (self.follow_all and not self.cold) or entire

    @property
    def needs_refresh(self) -> bool:
        """Whether the next step renews decompositions."""
        doubled = self._turn & (self._turn - 1) == 0  # 1, 2, 4, ...
        return self._turn % self.config.refresh_interval == 0 or (self._starting and doubled)

    @property
    def _starting(self) -> bool:
        return self.config.eager_start and self._turn < self.config.refresh_interval

    def refresh(self, decay: Mapping[str, float] | None = None) -> None:
        """Renew the decompositions now; raises FactorError after max_failures in a row.

        ``decay`` is that of :meth:`direction`, for inverses that hold their damping.
        """
        with self._timed("refresh"):
            self._refresher.renew(partial(self.block_damping, decay=decay))

    def prepare(self, decay: Mapping[str, float] | None = None) -> None:
        """Before a step: install a background result that is due, and refresh if it is time.

        A block whose first statistics came late is not left waiting for the next refresh.
        :meth:`advance` after the step moves on to the next one. Raises FactorError as
        :meth:`refresh`, or when the background refresh failed; ValueError for several ranks.
        """
        check_ranks()
        with self._timed("refresh"):
            self._refresher.finish(self._turn)
            late = any(block.history.late for block in self._layers)
            if self.needs_refresh or late:
                delay = 0 if late or self._starting else self.config.refresh_delay
                due = self._turn + delay if delay and self._turn else None  # the first is at once
                self._refresher.renew(partial(self.block_damping, decay=decay), due)

    def advance(self) -> None:
        """After a step: the next one is another turn of the intervals."""
        self._turn += 1
        if self.observed is not None:
            self.observed.followed = None  # the graph of parameters that have moved
            self.observed.output = None

    def close(self) -> None:
        """Wait for a running background refresh and forget it; no thread is left."""
        self._refresher.close()

    # --- preconditioning --------------------------------------------------------------------------

    def block_damping(self, block: Block, decay: Mapping[str, float] | None = None) -> float:
        """Lambda, and the largest weight decay among the block's weights (one of them as a rule).

        ``decay`` is by name; by default all have that of the settings.
        """
        mine = [name for name in block.names if name in self.weights]
        usual = self.config.weight_decay
        extra = (usual if decay is None else decay.get(name, 0.0) for name in mine)
        return self.damping + max(extra, default=0.0)

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
            decay: Weight decay by name of the weight, which adds to its damping; by default that of
                the settings.
        """
        self._guard.warn_unseen(self.stats.values(), gradients)
        products = float32_products(self.generator.device) if self._large else nullcontext()
        with self._timed("apply"), products:
            step: dict[str, Tensor] = {}
            for group in self._alike:
                step.update(group.precondition(gradients, partial(self.block_damping, decay=decay)))
            for block in self.blocks:
                if block.names[0] in step:
                    continue
                missing = [name for name in block.names if name not in gradients]
                if len(missing) == len(block.names):
                    continue
                zeros = {name: torch.zeros_like(self.named[name]) for name in missing}
                mine = gradients | zeros if zeros else gradients
                step.update(block.precondition(mine, self.block_damping(block, decay)))
            return {n: u.to(gradients[n].dtype) for n, u in step.items() if n in gradients}

    def exact_quadratic(self, step: dict[str, Tensor]) -> Tensor:
        """U^T F U with the exact Fisher of the last observed batch.

        Raises:
            ValueError: Nothing was observed with a loss.
        """
        return self.exact_grams([step])[0].sum()

    def exact_grams(self, steps: Sequence[dict[str, Tensor]]) -> tuple[Tensor, tuple[float, ...]]:
        """Forms u_i^T F_k u_j (parts, m, m) of the parts of the exact Fisher, and their weights."""
        if self.observed is None:
            raise ValueError(
                f'quadratic="{self.config.quadratic}" needs fisher_quadratic in step(),'
                " or observe() with a loss"
            )
        with self._timed("exact"):
            grams = self.observed.grams(self.module, steps)
        return grams, part_weights(self.observed.loss)

    def estimated_grams(
        self, steps: Sequence[dict[str, Tensor]]
    ) -> tuple[Tensor, tuple[float, ...]] | None:
        """:meth:`exact_grams` estimated from a part of the observed samples; None if it cannot."""
        if self.observed is None:
            return None
        with self._timed("exact"):
            grams = self.observed.estimated_grams(self.module, steps, self._turn)
        return None if grams is None else (grams, part_weights(self.observed.loss))

    @torch.no_grad()
    def precondition(
        self,
        *,
        lr: float,
        momentum: float = 0.0,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> StepInfo | None:
        """Replace every gradient by nu U, which the torch optimizer then steps along.

        Args:
            lr: The optimizer's step size, which the trust region must know.
            momentum: The optimizer's momentum, which makes its steps up to 1 / (1 - momentum) as
                long.
            grad_scaler: The scaler of gradients that its ``unscale_`` has not divided by the loss
                scale yet; they stay scaled, for its ``step``.

        Returns:
            What was done; None without any gradient.

        Raises:
            FactorError: As :meth:`prepare`.
            ValueError: lr or momentum is out of range, or an exact quadratic form has nothing to
                work with.
        """
        if not (0 <= lr < math.inf and 0 <= momentum < 1):
            raise ValueError(f"lr must be >= 0 and momentum in [0, 1), got {lr!r} and {momentum!r}")
        self.prepare()
        loss_scale = 1.0 if grad_scaler is None else float(grad_scaler.get_scale())
        gradients = self.gradients(factor=1 / loss_scale)
        step = self.direction(gradients)
        info = None
        if step:
            if self.region is None:
                exact = self.exact_quadratic if self.config.quadratic == "exact" else None
                info = rescale(gradients, step, self.config, lr / (1 - momentum), exact)
                step = info.scaled(step)
            else:
                still = dict.fromkeys(step, 0.0)
                fit = fit_step(self, gradients, step, {}, still, lr / (1 - momentum))
                info, step = fit.info, scaled(step, fit.scale * fit.keep, self.region.places)
            for name, update in step.items():
                if grad_scaler is not None:  # NaN is what makes it skip a step and scale less
                    valid = torch.isfinite(info.quadratic).all()
                    update = torch.where(valid, update * loss_scale, torch.nan)
                grad = self.named[name].grad
                assert grad is not None
                if grad.is_sparse:
                    self.named[name].grad = update
                else:
                    grad.copy_(update)
            if grad_scaler is None:
                self._guard.keep(self.named[name].grad for name in step)
        self.advance()
        return info

    # --- inspection and state ---------------------------------------------------------------------

    def extreme_eigenvalues(self) -> tuple[float, float]:
        """Smallest and largest eigenvalue over all Kronecker blocks; NaN before a refresh."""
        kronecker = (block for block in self.blocks if isinstance(block, KroneckerBlock))
        pairs = [pair for block in kronecker if (pair := block.extremes()) is not None]
        if not pairs:
            return math.nan, math.nan
        low, high = torch.stack(pairs).unbind(1)
        return float(low.min()), float(high.max())

    @property
    def failures(self) -> int:
        """Failed decompositions so far, over all blocks."""
        return sum(block.history.total_failures for block in self.stats.values())

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        """Time a part of the work, which runs at its own precision also inside autocast."""
        started = time.perf_counter()
        kind = self.generator.device.type
        plain = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else None
        try:
            with plain or nullcontext():
                yield
        finally:
            self.seconds[what] += time.perf_counter() - started

    def state_dict(self) -> dict[str, Any]:
        """Statistics, the possibly stale decompositions, a refresh under way, and the generator.

        Names are those of a module that is not compiled. What :meth:`observe` collected with
        ``last=False`` is not part of it.
        """
        return {
            "turn": self._turn,
            "statistics": self.batches,
            "damping": self.damping,
            "generator": self.generator.get_state(),
            "pending": self._refresher.state_dict(),
            "layers": {plain_name(name): b.state_dict() for name, b in self.stats.items()},
            "trust": None if self.region is None else self.region.state_dict(),
        }

    def checked(self, state: Any) -> dict[str, Any]:
        """A state that :meth:`load_state_dict` can take, which may be one of former versions.

        Raises:
            ValueError: It does not fit the module or the settings.
        """
        own = {**self.state_dict(), "pending": None}
        state = modernised(state, own["layers"])
        given = state.get("layers") if isinstance(state, dict) else None
        if isinstance(given, dict) and self._rest and not self._rest.keys() & given.keys():
            raise ValueError(
                f"K-FAC state has no statistics of {', '.join(self._rest)}: it was made with"
                ' another small_parameters ("gradient" was the default); give that setting'
            )
        if isinstance(state, dict):
            state = {**state, "trust": _modern_trust(state.get("trust"), own["trust"])}
        pending = state.get("pending") if isinstance(state, dict) else None
        settled = state if pending is None else {**state, "pending": None}
        require_like(settled, own, "K-FAC curvature")
        check_number("K-FAC curvature: damping", state["damping"], open_low=True)
        if pending is not None:
            self._refresher.check_state(pending)
        return {**cast_like(settled, own), "pending": pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; ValueError and no change if it does not fit."""
        state = self.checked(state)
        self.close()
        for name, block in self.stats.items():
            block.load(state["layers"][plain_name(name)])
        self._turn = state["turn"]
        self.batches = state["statistics"]
        self.damping = float(state["damping"])
        self.generator.set_state(state["generator"].cpu())
        self.observed = None
        if self.region is not None:
            self.region.load_state_dict(state["trust"])
        self._refresher.load_state_dict(state["pending"])


def _modern_trust(state: Any, own: dict[str, Any] | None) -> Any:
    """The state of a region as this version has it; its own if it was made with another q."""
    if state is None or own is None:
        return own
    return {"whole": True, **state} if isinstance(state, dict) else state
