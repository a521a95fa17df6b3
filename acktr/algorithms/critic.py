"""A value function of its own: fitted by a first-order optimizer, or learned elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from acktr import tree
from acktr.algorithms.learner import (
    load_optimizer_state,
    mean,
    optimizer_state,
    over_ranks,
    part_of,
)
from acktr.config import CriticConfig
from acktr.rollout import Batch, Share, add_means, micro_batches
from acktr.tree import Observed


class CriticError(RuntimeError):
    """The process in which the critic learns failed, hangs or is gone."""


class Elsewhere(Protocol):
    """Where a separate critic learns from a batch while this process goes on."""

    def begin(self, batch: Batch, noises: list[Tensor], sigma: float) -> None:
        """Begin :meth:`acktr.algorithms.ACKTRLearner.critic_report`; the last one is settled."""

    def settle(self) -> dict[str, float]:
        """Wait for that, if it is under way, and give the report; the parameters are here then."""

    def fetch(self) -> None:
        """Take the optimizer's state over, when all is settled."""

    def drop(self) -> bool:
        """Forget what was learned: critic and optimizer are what they are in this process.

        Returns:
            Whether it can go on with these: it was not lost.
        """


class FirstOrderCritic:
    """Fits V to the returns by epochs of minibatches, with Adam or SGD with momentum.

    Args:
        critic: Observations to values (B,).
        config: Settings.
        generator: Source of the order of samples, on the critic's device.
        autocast: Context factory for forward passes.
        micro_batch: Most samples in memory at once; None: all of a step's.
    """

    def __init__(
        self,
        critic: nn.Module,
        config: CriticConfig,
        generator: torch.Generator,
        autocast: Callable[[], AbstractContextManager[Any]],
        micro_batch: int | None = None,
    ) -> None:
        self.critic = critic
        self.config = config
        self.generator = generator
        self.autocast = autocast
        self.micro_batch = micro_batch
        self._optimizer = _optimizer(critic, config)

    def fit(self, batch: Batch) -> Tensor:
        """Take all steps on a batch; returns the mean squared error over the last epoch."""
        share, own = batch.share, len(batch.returns)
        rows = own if share is None else share.total
        size = rows if self.config.batch_size is None else min(rows, self.config.batch_size)
        losses: list[Tensor] = []
        for _ in range(self.config.epochs):
            losses = []
            if size == rows:
                whole = (batch.observations, batch.returns, batch.weights, share)
                losses.append(self._step(*whole))
                continue
            order = torch.randperm(rows, generator=self.generator, device=self.generator.device)
            for mine in torch.split(order, size):
                some = mine if share is None else _own(mine, share)
                weights, seen = part_of(batch.weights, some), tree.rows(batch.observations, some)
                loss = self._step(seen, batch.returns[some], weights, share)
                losses.append(loss * (len(some) / own))
        return over_ranks(batch, {"loss": torch.stack(losses).sum()})["loss"]

    def _step(
        self,
        observations: Observed,
        returns: Tensor,
        weights: Tensor | None,
        share: Share | None,
    ) -> Tensor:
        """Take a step on some samples; returns their mean loss before it, 0 of none."""
        self._optimizer.zero_grad()
        means = {} if len(returns) else {"loss": returns.new_zeros(())}
        for part in micro_batches(len(returns), self.micro_batch) if len(returns) else ():
            with self.autocast():
                values = self.critic(tree.rows(observations, part.rows))
            loss = mean((values - returns[part.rows]).square(), part_of(weights, part.rows))
            torch.autograd.backward(part.share * loss)
            add_means(means, {"loss": loss}, part.share)
        if share is not None:
            share.ranks.average(self.critic, len(returns))
        self._optimizer.step()
        return means["loss"]

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's tensors (the generator belongs to the caller)."""
        return {"optimizer": optimizer_state(self._optimizer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; raises ValueError when it does not fit."""
        load_optimizer_state(self._optimizer, state["optimizer"], self.critic)


def _own(wanted: Tensor, share: Share) -> Tensor:
    """Those of this rank's rows that are among some rows of all ranks', in the order of these."""
    places = torch.full((share.total,), -1, device=wanted.device)
    places[share.index] = torch.arange(share.rows, device=wanted.device)
    mine = places[wanted]
    return mine[mine >= 0]


def _optimizer(critic: nn.Module, config: CriticConfig) -> torch.optim.Optimizer:
    parameters = list(critic.parameters())
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, config.lr, eps=config.adam_eps, fused=True)
    return torch.optim.SGD(parameters, config.lr, momentum=config.momentum, fused=True)
