"""Curvature of a whole module: statistics, refreshes and preconditioning."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from acktr.kfac.blocks.chain import Chain
from acktr.kfac.blocks.kronecker import KroneckerBlock, extreme_eigenvalues
from acktr.kfac.blocks.registry import Registry, located
from acktr.kfac.blocks.simple import Block, StatBlock
from acktr.kfac.collection import Collection
from acktr.kfac.config import KFACConfig
from acktr.kfac.fast import LARGE_FACTOR, float32_products
from acktr.kfac.fisher.products import fisher_gram
from acktr.kfac.gradients import completed, decayed_gradients
from acktr.kfac.losses.likelihoods import OutputLoss
from acktr.kfac.losses.sources import Sampled, Source, curvature_scalars
from acktr.kfac.refresh import Refresher
from acktr.kfac.statistics.averages import check_count, check_positive, check_tensor
from acktr.kfac.statistics.capture import Capture, Gradients, Observed, capture
from acktr.kfac.trust import StepInfo, rescale

_SUM = 0.0


class Preconditioner:
    """Kronecker-factored curvature in front of any torch optimizer.

    Linear, convolution and embedding layers get a block A (x) G with the bias as a homogeneous
    coordinate; normalisations and lone biases the second moment of their gradients; parameters
    named in ``known_fisher`` that constant diagonal Fisher; everything else what
    ``config.small_parameters`` says. Layers that share a weight share a block. The module is not
    changed. One step::

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
        seed: Seed of the generator that sampled targets are drawn with.

    Raises:
        ValueError: ``known_fisher`` names a parameter that does not exist, or the structure does
            not fit the module.
    """

    def __init__(
        self,
        module: nn.Module,
        config: KFACConfig | None = None,
        *,
        known_fisher: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        self.module = module
        self.config = config or KFACConfig()
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.blocks = Registry(module, self.named, known_fisher or {}, self.config).build()
        self.stats: dict[str, StatBlock] = {
            block.name: block for block in self.blocks if isinstance(block, StatBlock)
        }
        self.chain: Chain | None = None
        if self.config.structure == "tridiagonal":
            self.chain = Chain([b for b in self.blocks if isinstance(b, KroneckerBlock)])
        self.damping = self.config.damping
        place = next(module.parameters(), None)
        if place is None:
            raise ValueError("K-FAC needs a module with parameters")
        self.generator = torch.Generator(place.device).manual_seed(seed)
        self.observed: Observed | None = None
        self.seconds = {"fisher": 0.0, "factors": 0.0, "refresh": 0.0, "apply": 0.0}
        self.weights = {name for name, parameter in self.named.items() if parameter.dim() > 1}
        sizes = [size for block in self.stats.values() for size in block.factor_shapes]
        self._large = max((max(size) for size in sizes), default=0) >= LARGE_FACTOR
        self._turn = 0
        self._collection = Collection(self.stats, self.chain, self.config)
        self._refresher = Refresher(self.stats, self.chain, self.config)

    def capture(self) -> AbstractContextManager[Capture]:
        """Context in which forward passes are recorded for :meth:`observe`."""
        paths = [path for block in self.stats.values() for path in block.paths]
        return capture(located(self.module, paths), self.module)

    def observe(
        self,
        captured: Capture,
        output: Any,
        loss: OutputLoss[Any],
        *,
        source: Source | None = None,
        last: bool = True,
    ) -> None:
        """Fold one batch into the curvature, unless ``stat_interval`` passes it over.

        Args:
            captured: The records of the forward pass.
            output: The module's output in that pass, with its graph (which is kept).
            loss: What the output means: it draws targets and knows the objective's scale.
            source: Sampled(n), Exact() or Empirical(target); by default one sampled target.
            last: False for all micro-batches of a large batch but the last, which also gives the
                exact Fisher of the step.

        Raises:
            ValueError: Nothing was recorded or a layer does not fit, and all parts of the batch are
                forgotten; or the loss or the source does not fit, and those before are kept.
        """
        if not isinstance(loss, OutputLoss):
            raise ValueError(
                "loss must be an OutputLoss such as CategoricalLoss() or GaussianLoss(),"
                f" got {loss!r:.100}"
            )
        self.observed = Observed(captured.inputs, loss)
        if not self.observing:
            return
        scalars = curvature_scalars(source or Sampled(), loss, output, self.generator)
        normalizer = loss.normalizer(output)
        self._observe(captured, scalars, _SUM if normalizer is None else normalizer, last)

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
                Fisher of a mean over samples. No weight gradient is computed.
            samples: Their number; by default the leading dimension of each layer's output.
            last: False for all micro-batches of a large batch but the last.

        Raises:
            ValueError: As :meth:`observe`, or samples is not positive.
        """
        if samples is not None and samples < 1:
            raise ValueError(f"samples must be an integer >= 1 or None, got {samples!r}")
        if self.observing:
            self._observe(captured, [(log_likelihood, 1.0)], samples, last)

    def _observe(
        self,
        captured: Capture,
        scalars: Iterable[tuple[Tensor, float]],
        normalizer: float | None,
        last: bool,
    ) -> None:
        with self._timed("fisher"):
            pairs = [(captured.output_gradients(scalar), weight) for scalar, weight in scalars]
        found = Gradients(captured, [p[0] for p in pairs], [p[1] for p in pairs], normalizer)
        with self._timed("factors"):
            self._collection.add(found, last=last)

    @property
    def batches(self) -> int:
        """Batches folded so far."""
        return self._collection.batches

    @property
    def observing(self) -> bool:
        """Whether batches are folded before the next step; others cost a forward pass at most."""
        return self._turn % self.config.stat_interval == 0

    @property
    def needs_refresh(self) -> bool:
        """Whether the next step renews decompositions."""
        return self._turn % self.config.refresh_interval == 0

    def refresh(self, decay: Mapping[str, float] | None = None) -> None:
        """Renew the decompositions now; raises FactorError after max_failures in a row.

        ``decay`` is that of :meth:`direction`, for inverses that hold their damping.
        """
        with self._timed("refresh"):
            self._refresher.now(partial(self.block_damping, decay=decay))

    def prepare(self, decay: Mapping[str, float] | None = None) -> None:
        """Before a step: install a background result that is due, and refresh if it is time.

        :meth:`advance` after the step moves on to the next one.

        Raises:
            FactorError: A factor could not be decomposed ``max_failures`` times in a row, or the
                background refresh failed.
        """
        with self._timed("refresh"):
            self._refresher.install_due(self._turn)
            if self.needs_refresh:
                damping = partial(self.block_damping, decay=decay)
                if (delay := self.config.refresh_delay) is None:
                    self._refresher.now(damping)
                else:
                    self._refresher.start(damping, self._turn, delay)

    def advance(self) -> None:
        """After a step: the next one is another turn of the intervals."""
        self._turn += 1

    def close(self) -> None:
        """Wait for a running background refresh and forget it; no thread is left."""
        self._refresher.close()

    # --- preconditioning --------------------------------------------------------------------------

    def block_damping(self, block: Block, decay: Mapping[str, float] | None = None) -> float:
        """Lambda, and the largest weight decay among the block's weights (one of them as a rule).

        Args:
            block: One of :attr:`blocks`.
            decay: Weight decay by name; by default that of the settings.
        """
        mine = [name for name in block.names if name in self.weights]
        usual = self.config.weight_decay
        extra = (usual if decay is None else decay.get(name, 0.0) for name in mine)
        return self.damping + max(extra, default=0.0)

    def gradients(self, decay: Mapping[str, float] | None = None) -> dict[str, Tensor]:
        """Present gradients by name, with weight decay added to all with two dimensions or more."""
        chosen = dict.fromkeys(self.named, self.config.weight_decay) if decay is None else decay
        return decayed_gradients(self.named, self.weights, chosen)

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
        products = float32_products(self.generator.device) if self._large else nullcontext()
        with self._timed("apply"), products:
            step: dict[str, Tensor] = {}
            full = completed(gradients, self.blocks, self.chain, self.named)
            chained = None if self.chain is None else self.chain.precondition(full)
            for block in self.blocks:
                if chained is not None and isinstance(block, KroneckerBlock):
                    continue
                damping = self.block_damping(block, decay)
                step.update(block.precondition(full, damping, self.config.factored_damping))
            step |= chained or {}
            return {n: u.to(gradients[n].dtype) for n, u in step.items() if n in gradients}

    def exact_quadratic(self, step: dict[str, Tensor]) -> Tensor:
        """U^T F U with the exact Fisher of the last observed batch.

        Raises:
            ValueError: Nothing was observed with a loss.
        """
        if self.observed is None:
            raise ValueError('quadratic="exact" needs fisher_quadratic in step(), or observe()')
        call, loss = self.observed.inputs, self.observed.loss
        return fisher_gram(self.module, call.args, loss, [step], kwargs=call.kwargs)[0, 0]

    @torch.no_grad()
    def precondition(self, *, lr: float, momentum: float = 0.0) -> StepInfo | None:
        """Replace every gradient by nu U, which the torch optimizer then steps along.

        Args:
            lr: The optimizer's step size, which the trust region must know.
            momentum: The optimizer's momentum, which makes its steps up to 1 / (1 - momentum) as
                long.

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
        gradients = self.gradients()
        step = self.direction(gradients)
        info = None
        if step:
            exact = self.exact_quadratic if self.config.quadratic == "exact" else None
            info = rescale(gradients, step, self.config, lr / (1 - momentum), exact)
            for name, update in info.scaled(step).items():
                grad = self.named[name].grad
                assert grad is not None
                if grad.is_sparse:
                    self.named[name].grad = update
                else:
                    grad.copy_(update)
        self.advance()
        return info

    # --- inspection and state ---------------------------------------------------------------------

    def extreme_eigenvalues(self) -> tuple[float, float]:
        """Smallest and largest eigenvalue over all Kronecker blocks; NaN before a refresh."""
        return extreme_eigenvalues(b for b in self.blocks if isinstance(b, KroneckerBlock))

    @property
    def failures(self) -> int:
        """Failed decompositions so far, over all blocks."""
        return sum(block.total_failures for block in self._collection.folding)

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

        What :meth:`observe` collected with ``last=False`` is not part of it.
        """
        return {
            "turn": self._turn,
            "statistics": self.batches,
            "damping": self.damping,
            "generator": self.generator.get_state(),
            "pending": self._refresher.state_dict(),
            "chain": None if self.chain is None else self.chain.state_dict(),
            "layers": {name: block.state_dict() for name, block in self.stats.items()},
        }

    def check_state(self, state: object) -> None:
        """Raise ValueError when a state does not fit the module or the settings."""
        keys = {"turn", "statistics", "damping", "generator", "pending", "chain", "layers"}
        if not isinstance(state, dict) or set(state) != keys:
            raise ValueError(f"K-FAC curvature must have the entries {sorted(keys)}")
        if not isinstance(state["layers"], dict) or set(state["layers"]) != set(self.stats):
            raise ValueError("K-FAC state belongs to a network with other layers")
        for name, block in self.stats.items():
            block.check_state(state["layers"][name])
            if isinstance(block, KroneckerBlock):
                block.check_settings(state["layers"][name], self.config)
        if (state["chain"] is None) != (self.chain is None):
            raise ValueError("K-FAC state belongs to another structure")
        if self.chain is not None:
            self.chain.check_state(state["chain"])
        for key in ("turn", "statistics"):
            check_count(state[key], f"K-FAC {key}")
        check_positive(state["damping"], "K-FAC damping")
        size = tuple(self.generator.get_state().shape)
        check_tensor(state["generator"], size, torch.uint8, "K-FAC generator")
        self._refresher.check_state(state["pending"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; ValueError and no change if it does not fit."""
        self.check_state(state)
        self.close()
        for name, block in self.stats.items():
            block.load_state_dict(state["layers"][name])
        if self.chain is not None:
            self.chain.load_state_dict(state["chain"])
        self._turn = state["turn"]
        self._collection.batches = state["statistics"]
        self.damping = float(state["damping"])
        self.generator.set_state(state["generator"].cpu())
        self.observed = None
        self._collection.drop()
        self._refresher.load_state_dict(state["pending"])
