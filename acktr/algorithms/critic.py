"""A value function of its own, fitted by a first-order optimizer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from acktr import tree
from acktr.algorithms.learner import load_optimizer_state, mean, optimizer_state, part_of
from acktr.config import CriticConfig
from acktr.rollout import Batch, add_means, micro_batches
from acktr.tree import Observed


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
        rows = len(batch.returns)
        size = rows if self.config.batch_size is None else min(rows, self.config.batch_size)
        losses: list[Tensor] = []
        for _ in range(self.config.epochs):
            losses = []
            if size == rows:
                losses.append(self._step(batch.observations, batch.returns, batch.weights))
                continue
            order = torch.randperm(rows, generator=self.generator, device=self.generator.device)
            for mine in torch.split(order, size):
                weights = part_of(batch.weights, mine)
                loss = self._step(tree.rows(batch.observations, mine), batch.returns[mine], weights)
                losses.append(loss * (len(mine) / rows))
        return torch.stack(losses).sum()

    def _step(self, observations: Observed, returns: Tensor, weights: Tensor | None) -> Tensor:
        self._optimizer.zero_grad()
        means: dict[str, Tensor] = {}
        for part in micro_batches(len(returns), self.micro_batch):
            with self.autocast():
                values = self.critic(tree.rows(observations, part.rows))
            loss = mean((values - returns[part.rows]).square(), part_of(weights, part.rows))
            torch.autograd.backward(part.share * loss)
            add_means(means, {"loss": loss}, part.share)
        self._optimizer.step()
        return means["loss"]

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's tensors (the generator belongs to the caller)."""
        return {"optimizer": optimizer_state(self._optimizer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; raises ValueError when it does not fit."""
        load_optimizer_state(self._optimizer, state["optimizer"], self.critic)


def _optimizer(critic: nn.Module, config: CriticConfig) -> torch.optim.Optimizer:
    parameters = list(critic.parameters())
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, config.lr, eps=config.adam_eps, fused=True)
    return torch.optim.SGD(parameters, config.lr, momentum=config.momentum, fused=True)
