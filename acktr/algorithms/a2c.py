"""A2C: synchronous advantage actor-critic with RMSprop (Mnih et al. 2016)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from acktr import tree
from acktr.algorithms.auxiliary import Auxiliary, AuxiliaryObjective
from acktr.algorithms.learner import (
    mean,
    over_ranks,
    part_of,
    require_allowed,
    scheduled_lr,
    to_floats,
    used_advantages,
    value_metrics,
)
from acktr.compute import compiled_for_updates
from acktr.config import Config, LearningRate, rate_at
from acktr.kfac import Ranks, Stopwatch
from acktr.policies import ActionHead, ActorCritic, Outputs, mode
from acktr.rollout import Batch, MicroBatch, add_means, parts_of
from acktr.tree import Observed


class RMSpropTF:
    """RMSprop as TensorFlow defines it, which A2C's published step sizes refer to.

    s <- alpha s + (1 - alpha) g^2 with s_0 = 1;    theta <- theta - lr g / sqrt(s + eps)

    torch's own starts at s_0 = 0 and adds eps outside the root, so that its first steps are larger.

    Args:
        module: Whose parameters to change.
        alpha: Decay of the mean square.
        eps: Added inside the root.
    """

    def __init__(self, module: nn.Module, alpha: float, eps: float) -> None:
        self.alpha = alpha
        self.eps = eps
        self._parameters = dict(module.named_parameters())
        self._squares = {name: torch.ones_like(p) for name, p in self._parameters.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply the gradients that the parameters hold."""
        named = [(name, p) for name, p in self._parameters.items() if p.grad is not None]
        squares = [self._squares[name] for name, _ in named]
        gradients = [p.grad for _, p in named if p.grad is not None]
        torch._foreach_mul_(squares, self.alpha)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - self.alpha)
        roots = torch._foreach_add(squares, self.eps)
        torch._foreach_sqrt_(roots)
        torch._foreach_addcdiv_([p for _, p in named], gradients, roots, -lr)

    def state_dict(self) -> dict[str, Tensor]:
        """The mean squares, by parameter name."""
        return {name: square.clone() for name, square in self._squares.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`; raises ValueError when names or shapes differ."""
        if {name: s.shape for name, s in state.items()} != {
            name: s.shape for name, s in self._squares.items()
        }:
            raise ValueError("RMSprop state belongs to another network")
        for name, square in self._squares.items():
            square.copy_(state[name])


class A2CLearner:
    """One RMSprop step per batch on policy, value and entropy loss together.

    L = -mean(A log pi) + vf_coef mean((V - R)^2) - ent_coef mean(H) + sum_k w_k L_k, with auxiliary
    losses L_k, gradient clipped by its norm over all parameters. The network may be shared or
    separate.

    Args:
        network: Policy and value function.
        head: Action distribution.
        config: Settings.
        generator: Unused; every learner takes one.
        autocast: Context factory for forward passes.
        auxiliary: Losses of the network's further outputs, by name.
        ranks: Who has the other shares of every batch, which say so themselves; unused.
    """

    def __init__(
        self,
        network: ActorCritic,
        head: ActionHead,
        config: Config,
        generator: torch.Generator,
        autocast: Callable[[], AbstractContextManager[Any]],
        auxiliary: Mapping[str, Auxiliary] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.network = network
        self.auxiliary = dict(auxiliary or {})
        self.head = head
        self.config = config
        self.autocast = autocast
        self.learning_rate: LearningRate | None = None
        settings = config.a2c
        self.optimizer = RMSpropTF(network, settings.rms_alpha, settings.rms_eps)
        self._parameters = list(network.parameters())
        self._forward: Callable[[Observed], Outputs] = network
        if config.compile:
            self._forward = compiled_for_updates(network)
        self._clock = Stopwatch()

    @property
    def seconds(self) -> dict[str, float]:
        """Time so far by part: forward, backward, step."""
        return dict(self._clock.seconds)

    def update(self, batch: Batch, progress: float) -> dict[str, float]:
        """Learn from one batch.

        Args:
            batch: The samples.
            progress: Fraction of training done, in [0, 1], for the schedule.

        Returns:
            Metrics by TensorBoard tag.

        Raises:
            ConfigError: The masks do not fit the actions.
        """
        started = time.perf_counter()
        require_allowed(batch, self.head)
        settings = self.config.a2c
        for parameter in self._parameters:
            parameter.grad = None
        means: dict[str, Tensor] = {}
        extra = [AuxiliaryObjective(name, each, batch) for name, each in self.auxiliary.items()]
        with mode(self.network, training=True):
            for part in parts_of(batch.observations, self.config.micro_batch):
                add_means(means, self._add_gradients(batch, part, extra), part.share)
        if batch.share is not None:
            batch.share.ranks.average(self.network, len(batch))
        means = over_ranks(batch, means)
        lr = scheduled_lr(settings.lr, progress, settings.lr_schedule)
        if self.learning_rate is not None:
            lr = rate_at(self.learning_rate, progress)
        with self._clock.part("step"):
            norm = nn.utils.clip_grad_norm_(self._parameters, settings.max_grad_norm)
            self.optimizer.step(lr)
        value_loss = means.pop("train/value_loss")
        tensors = means | {"train/grad_norm": norm} | value_metrics(value_loss, batch)
        metrics = to_floats(tensors)
        metrics["train/learning_rate"] = lr
        metrics["time/update"] = time.perf_counter() - started
        return metrics

    def _add_gradients(
        self, batch: Batch, part: MicroBatch, extra: Sequence[AuxiliaryObjective]
    ) -> dict[str, Tensor]:
        """Add the gradients of a part of the batch to those that the parameters hold."""
        config, rows = self.config, part.rows
        with self._clock.part("forward"), self.autocast():
            parameters, values, *more = self._forward(tree.rows(batch.observations, rows))
        advantages, weights = used_advantages(batch, config), part_of(batch.weights, rows)
        dist = self.head.make(parameters, part_of(batch.masks, rows))
        policy_loss = -mean(advantages[rows] * dist.log_prob(batch.actions[rows]), weights)
        entropy = mean(dist.entropy(), weights)
        value_loss = mean((values - batch.returns[rows]).square(), weights)
        loss = policy_loss - config.ent_coef * entropy + config.vf_coef * value_loss
        terms = {
            "train/policy_loss": policy_loss,
            "train/entropy_loss": -entropy,
            "train/value_loss": value_loss,
        }
        for objective, output in zip(extra, more, strict=True):
            term, _ = objective.loss((output,), rows)
            loss = loss + objective.weight * term
            terms[f"train/{objective.name}_loss"] = term
        with self._clock.part("backward"):
            torch.autograd.backward(part.share * loss)
        return terms

    def state_dict(self) -> dict[str, Any]:
        """The optimizer (the network saves itself)."""
        return {"rmsprop": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; raises ValueError when it is another network's."""
        self.optimizer.load_state_dict(state["rmsprop"])
