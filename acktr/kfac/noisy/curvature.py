"""The curvature of noisy K-FAC: two dampings, and batches that come in any number of parts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from acktr.kfac.blocks.registry import Block, caller_level
from acktr.kfac.blocks.rules import Rules
from acktr.kfac.blocks.skip import Skip
from acktr.kfac.blocks.tridiagonal import ChainInverse, TridiagonalBlock
from acktr.kfac.guard import NoStatisticsWarning
from acktr.kfac.noisy.config import NoisyConfig
from acktr.kfac.noisy.posterior import Posterior
from acktr.kfac.noisy.prior import Prior
from acktr.kfac.noisy.start import restart_scales, start
from acktr.kfac.preconditioner import Preconditioner
from acktr.kfac.ranks import Ranks

_STREAMS = (0x5EED0001, 0x5EED0002)
"""What makes the seeds of the noise of training and of evaluations those of other numbers."""


class NoisyCurvature(Preconditioner):
    """Curvature whose damping is gamma_in + gamma_ex, with the posterior that belongs to gamma_in.

    Args:
        module: The network.
        config: Settings.
        data_size: N.
        layers: How layers of one's own become rows, by their type.
        skip: Layers without a block of their own.
        seed: Seed of the generators of targets and of noise.
        ranks: Who has the other shares of every batch; None for one process.
    """

    def __init__(
        self,
        module: nn.Module,
        config: NoisyConfig,
        data_size: int,
        layers: Rules | None,
        skip: Skip,
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        settings = config.curvature()
        super().__init__(module, settings, layers=layers, skip=skip, seed=seed, ranks=ranks)
        if ranks is not None:
            ranks.check_equal("settings or data_size", (config, data_size), self.generator.device)
        self._settings, self._ranks = config, ranks
        self._inverse: ChainInverse | None = None
        self._told_forgotten = False
        prior = Prior(module, self.named, self.blocks, config)
        weight = config.weight(0)
        self.posterior = Posterior(module, self.named, prior, data_size, weight)
        device = self.generator.device
        self.noise, self.evaluation = (
            torch.Generator(device).manual_seed(seed ^ stream) for stream in _STREAMS
        )
        if config.initial_curvature > 0:
            for block in self.stats.values():
                start(block, config.initial_curvature)
            self.refresh()
            restart_scales(self.stats.values(), self.config.stat_decay)

    def check_parameters(self) -> None:
        """Raise ValueError when the parameters are not those of the construction any more."""
        self._guard.check_parameters()

    def terms_of_all(self, terms: float | None) -> float | None:
        """The loss terms of a context on all ranks, of which it is one weight sample."""
        if self._ranks is None:
            return terms
        return sum(row[0] for row in self._ranks.gather([terms or 0.0], self.generator.device))

    def block_damping(self, block: Block, decay: Mapping[str, float] | None = None) -> float:
        """gamma_in + gamma_ex, also of parameters without noise."""
        return self._settings.external_damping + self.posterior.damping(block.name)

    def refresh(self, decay: Mapping[str, float] | None = None) -> None:
        """As that of a curvature."""
        super().refresh(decay)
        self._keep_weight()

    def prepare(self, decay: Mapping[str, float] | None = None) -> None:
        """As that of a curvature; corrected eigenvalues begin anew in every new basis."""
        renewed = self.needs_refresh
        super().prepare(decay)
        self._keep_weight()
        if renewed:
            restart_scales(self.stats.values(), self.config.stat_decay)

    def fold(self) -> None:
        """Take what was observed since the last call into the running averages, as one batch."""
        self._estimator.fold(self.config.stat_decay)
        self.region.drop()
        self.batches += 1

    def _keep_weight(self) -> None:
        """Keep the lambda of a new inverse of a chain, whose damping it holds."""
        inverse = self._chain()
        if inverse is not self._inverse:
            self._inverse, self.posterior.chain_weight = inverse, self.posterior.weight

    def _chain(self) -> ChainInverse | None:
        """The present inverse of the chain of layers; None without a chain."""
        chains = (b.inverse for b in self.stats.values() if isinstance(b, TridiagonalBlock))
        return next(chains, None)

    def warn_forgotten(self) -> None:
        """Warn once of a step whose contexts were not observed, unless none ever was."""
        if self._told_forgotten or not self.batches:
            return
        self._told_forgotten = True
        warnings.warn(
            "no statistics of this step, so that the posterior stays behind the mean: call"
            " observe() inside of sampled_params(train=True) (stat_interval=k is for one in k"
            " steps)",
            NoStatisticsWarning,
            stacklevel=caller_level(),
        )

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As that of a curvature, with the generators of noise under the name of the posterior."""
        kind = f"{self._settings.structure} with {self._settings.damping_form} damping"
        kept = [self.noise.get_state(), self.evaluation.get_state()]
        if self._chain() is not None:
            kept.append(torch.tensor(self.posterior.chain_weight, dtype=torch.float64))
        return {"noisy": {kind: kept}, **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; ValueError and no change if it does not fit."""
        fitting = self.checked(state)
        super().load_state_dict(fitting)
        ((noise, evaluation, *weight),) = fitting["noisy"].values()
        self.noise.set_state(noise.cpu())
        self.evaluation.set_state(evaluation.cpu())
        self._inverse = self._chain()
        if weight:
            self.posterior.chain_weight = float(weight[0])
