"""The ACKTR update (Wu et al. 2017): natural-gradient actor, Gauss-Newton critic, trust region."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from acktr.algorithms.critic import FirstOrderCritic
from acktr.algorithms.learner import (
    policy_terms,
    scheduled_lr,
    standardised,
    to_floats,
    value_metrics,
)
from acktr.algorithms.objectives import Losses, Outputs, Task, as_outputs, differentiate
from acktr.compute import Clock, Compiled, compiled_for_updates, joined, restore_generator
from acktr.config import Config
from acktr.kfac import KFAC, FisherQuadratic, KFACConfig
from acktr.policies import (
    ActionHead,
    ActorCritic,
    Distribution,
    SeparateActorCritic,
    SharedActorCritic,
)
from acktr.rollout import Batch, MicroBatch, add_means, micro_batches, outputs_of

LOG_STD_FISHER = 2.0
"""Fisher information of the log standard deviation of a Gaussian."""

_MIN_ADAPTED_LR = 1e-8
_SCHEDULE_HORIZON = 1.1
"""Fraction of training at which the linear schedule would reach 0 (Baselines)."""


def sampled_policy_loss(dist: Distribution, noise: Tensor) -> Tensor:
    """Sum of negative log-likelihoods of actions that the distribution makes of the noise."""
    with torch.no_grad():
        sampled = dist.action(noise)
    return -dist.log_prob(sampled).sum()


def sampled_value_loss(values: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """Sum of negative log-likelihoods of v ~ N(V, sigma^2); its output Fisher is 1 / sigma^2.

    Args:
        values: V (B,).
        sigma: Standard deviation.
        noise: Standard normal numbers (B,).
    """
    target = (values + sigma * noise).detach()
    return 0.5 * ((values - target) / sigma).square().sum()


def adapt_lr(lr: float, kl: float, target: float) -> float:
    """Divide lr by 1.5 when the KL exceeds twice the target, multiply below half; in [1e-8, 1]."""
    if kl > 2 * target:
        lr /= 1.5
    elif kl < target / 2:
        lr *= 1.5
    return min(1.0, max(_MIN_ADAPTED_LR, lr))


class ACKTRLearner:
    """One ACKTR update per batch, for a shared network or a separate actor and critic.

    A batch may be taken in micro-batches, whose gradients and factors add up to those of the whole.
    The sampled Fisher's noise is drawn for the whole batch first, and its subsample is every k-th
    sample of the whole batch, so that both are the same ones however the batch is split.

    Args:
        network: Policy and value function.
        head: Action distribution.
        config: Settings.
        generator: Source of the sampled Fisher's noise, on the network's device.
        autocast: Context factory for forward passes.
    """

    def __init__(
        self,
        network: ActorCritic,
        head: ActionHead,
        config: Config,
        generator: torch.Generator,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.network = network
        self.head = head
        self.config = config
        self.generator = generator
        self.autocast = autocast
        self._clock = Clock()
        self._compiled: dict[nn.Module, Compiled[Tensor | Outputs, Tensor]] = {}
        settings = config.acktr
        self._lr = settings.actor.lr
        self.critic: KFAC | FirstOrderCritic | None = None
        if isinstance(network, SharedActorCritic):
            self.actor = _optimizer(network, settings.actor)
            return
        self.actor = _optimizer(network.actor, settings.actor)
        if settings.critic_optimizer == "kfac":
            self.critic = _optimizer(network.critic, settings.critic)
        else:
            self.critic = FirstOrderCritic(
                network.critic, settings.first_order, generator, autocast, config.micro_batch
            )

    def update(self, batch: Batch, progress: float) -> dict[str, float]:
        """Learn from one batch.

        Args:
            batch: The samples.
            progress: Fraction of training done, in [0, 1], for the schedule.

        Returns:
            Metrics by TensorBoard tag.

        Raises:
            FactorError: K-FAC cannot go on.
        """
        started = time.perf_counter()
        refreshed = self.seconds["refresh"]
        settings = self.config.acktr
        if settings.target_kl is None:
            self.actor.lr = scheduled_lr(
                settings.actor.lr, progress, settings.lr_schedule, _SCHEDULE_HORIZON
            )
        else:
            self.actor.lr = self._lr
        if isinstance(self.network, SeparateActorCritic):
            tensors = self._fit_critic(self.network.critic, batch)
            tensors |= self._actor_step(self.network.actor, batch)
        else:
            tensors = self._joint_step(self.network, batch)
        metrics = to_floats(tensors)
        metrics["train/learning_rate"] = self.actor.lr
        if settings.target_kl is not None:
            self._lr = adapt_lr(self._lr, metrics["train/approx_kl"], settings.target_kl)
        metrics |= _eigenvalues(self.actor, "")
        metrics["kfac/failures"] = float(self.actor.failures)
        if isinstance(self.critic, KFAC):
            metrics |= _eigenvalues(self.critic, "critic_")
            metrics["kfac/failures"] += self.critic.failures
        metrics["time/refresh"] = self.seconds["refresh"] - refreshed
        metrics["time/update"] = time.perf_counter() - started
        return metrics

    @property
    def seconds(self) -> dict[str, float]:
        """Time so far by part: forward, fisher, factors, backward, step (with refresh, apply).

        The exact quadratic, where it is wanted, is the rest of step.
        """
        optimizers = [o for o in (self.actor, self.critic) if isinstance(o, KFAC)]
        return joined(self._clock.seconds, *(o.curvature.seconds for o in optimizers))

    def _policy_terms(
        self, dist: Distribution, batch: Batch, rows: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Policy loss and entropy of some rows; advantages are standardised over the batch."""
        advantages = batch.advantages
        if self.config.normalize_advantage:
            advantages = standardised(advantages)
        return policy_terms(dist, batch.actions[rows], advantages[rows])

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self.actor.curvature.named.values())).dtype

    def _policy_noise(self, batch: Batch) -> Tensor:
        return self.head.noise(len(batch), self.generator, self._dtype)

    def _value_noise(self, batch: Batch) -> Tensor:
        draw = self.generator
        return torch.randn(len(batch), generator=draw, device=draw.device, dtype=self._dtype)

    def _take_step(self, task: Task, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """One K-FAC step.

        Returns:
            The terms' means over the batch, and the network's first output before the step.
        """
        parts = micro_batches(len(batch), self.config.micro_batch)
        observing = task.optimizer.observing
        sample = task.sample(task.optimizer.curvature.batches, len(batch))
        if observing and sample is not None:
            self._observe(task, batch, sample)
        task.optimizer.zero_grad()
        means: dict[str, Tensor] = {}
        before: list[Tensor] = []
        quadratic: FisherQuadratic | None = None
        for part in parts:
            observes = observing and sample is None
            terms, output, quadratic = self._learn(task, batch, part, observes=observes)
            add_means(means, terms, part.share)
            before.append(output)
        if len(parts) > 1 and task.optimizer.config.quadratic == "exact":
            quadratic = task.summed_quadratic(batch.observations, parts, self.autocast)
        with self._clock.part("step"):
            task.optimizer.step(fisher_quadratic=quadratic)
        return means, torch.cat(before)

    def _observe(self, task: Task, batch: Batch, sample: slice) -> None:
        """Renew the factors from a sample, whose forward pass is cheaper than a whole backward."""
        numbers = range(len(batch))[sample]
        for part in micro_batches(len(numbers), self.config.micro_batch):
            chosen = numbers[part.rows]
            rows = slice(chosen.start, chosen.stop, chosen.step)
            with self._clock.part("fisher"), task.optimizer.capture() as captured, self.autocast():
                outputs = as_outputs(task.network(batch.observations[rows]))
            fisher = task.fisher(outputs, rows)
            task.optimizer.update_curvature(captured, fisher, last=part.last)

    def _learn(
        self, task: Task, batch: Batch, part: MicroBatch, *, observes: bool
    ) -> tuple[dict[str, Tensor], Tensor, FisherQuadratic | None]:
        """Add a part of the batch to the gradients, and to the factors if it ``observes``.

        Returns:
            The terms' means, the first output, and the exact quadratic if the part is the batch.
        """
        optimizer, rows = task.optimizer, part.rows
        recording = optimizer.capture() if observes else nullcontext()
        once = not observes and optimizer.config.quadratic != "exact"
        forward = self._forward(task.network) if once else task.network
        with self._clock.part("forward"), recording as captured, self.autocast():
            outputs = as_outputs(forward(batch.observations[rows]))
        losses = task.losses(outputs, rows)
        if captured is not None:
            optimizer.update_curvature(captured, task.fisher(outputs, rows), last=part.last)
        quadratic: FisherQuadratic | None = None
        with self._clock.part("backward"):
            if part.share == 1:
                metric = task.metric(outputs)
                quadratic = differentiate(optimizer, losses.objective, outputs, metric)
            else:
                torch.autograd.backward(part.share * losses.objective)
        return losses.terms, outputs[0].detach(), quadratic

    def _forward(self, network: nn.Module) -> Callable[[Tensor], Tensor | Outputs]:
        """A network of which only the gradients of a loss are wanted, compiled if so configured."""
        if not self.config.compile:
            return network
        if network not in self._compiled:
            self._compiled[network] = compiled_for_updates(network)
        return self._compiled[network]

    def _joint_step(self, network: SharedActorCritic, batch: Batch) -> dict[str, Tensor]:
        config, sigma = self.config, self.config.acktr.value_sigma
        noise, value_noise = self._policy_noise(batch), self._value_noise(batch)

        def losses(outputs: Outputs, rows: slice) -> Losses:
            parameters, values = outputs
            policy_loss, entropy = self._policy_terms(self.head.make(parameters), batch, rows)
            value_loss = (values - batch.returns[rows]).square().mean()
            loss = policy_loss - config.ent_coef * entropy + config.vf_coef * value_loss
            terms = {"policy_loss": policy_loss, "entropy": entropy, "value_loss": value_loss}
            return Losses(loss, terms)

        def fisher(outputs: Outputs, rows: slice) -> Tensor:
            parameters, values = outputs
            policy = sampled_policy_loss(self.head.make(parameters), noise[rows])
            return policy + sampled_value_loss(values, sigma, value_noise[rows])

        def metric(outputs: Outputs) -> Callable[..., Tensor]:
            old = self.head.make(outputs[0].detach())
            return lambda policy, value: old.fisher_quadratic(policy) + value.square() / sigma**2

        fraction = config.acktr.actor.stat_fraction
        task = Task(network, self.actor, losses, fisher, metric, fraction)
        means, before = self._take_step(task, batch)
        kl = self._kl(task, lambda observations: network(observations)[0], before, batch)
        terms = _policy_metrics(kl, means, self.actor)
        return terms | value_metrics(means["value_loss"], batch)

    def _actor_step(self, actor: nn.Module, batch: Batch) -> dict[str, Tensor]:
        noise = self._policy_noise(batch)

        def losses(outputs: Outputs, rows: slice) -> Losses:
            policy_loss, entropy = self._policy_terms(self.head.make(outputs[0]), batch, rows)
            loss = policy_loss - self.config.ent_coef * entropy
            return Losses(loss, {"policy_loss": policy_loss, "entropy": entropy})

        def fisher(outputs: Outputs, rows: slice) -> Tensor:
            return sampled_policy_loss(self.head.make(outputs[0]), noise[rows])

        def metric(outputs: Outputs) -> Callable[..., Tensor]:
            return self.head.make(outputs[0].detach()).fisher_quadratic

        fraction = self.config.acktr.actor.stat_fraction
        task = Task(actor, self.actor, losses, fisher, metric, fraction)
        means, before = self._take_step(task, batch)
        return _policy_metrics(self._kl(task, actor, before, batch), means, self.actor)

    def _kl(
        self, task: Task, forward: Callable[[Tensor], Tensor], before: Tensor, batch: Batch
    ) -> Tensor:
        """Mean KL of the step, on as many samples as statistics are made of."""
        rows = task.sample(task.optimizer.curvature.batches, len(batch)) or slice(None)
        with self._clock.part("forward"), self.autocast():
            after = outputs_of(forward, batch.observations[rows], self.config.micro_batch)
        return self.head.make(before[rows]).kl(after).mean()

    def _fit_critic(self, critic: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if isinstance(self.critic, FirstOrderCritic):
            return value_metrics(self.critic.fit(batch), batch)
        assert self.critic is not None
        return self._critic_steps(critic, self.critic, batch)

    def _critic_steps(self, critic: nn.Module, optimizer: KFAC, batch: Batch) -> dict[str, Tensor]:
        sigma = self.config.acktr.value_sigma

        def metric(_outputs: Outputs) -> Callable[..., Tensor]:
            return lambda tangent: tangent.square() / sigma**2

        def losses(outputs: Outputs, rows: slice) -> Losses:
            loss = (outputs[0] - batch.returns[rows]).square().mean()
            return Losses(loss, {"value_loss": loss})

        fraction = self.config.acktr.critic.stat_fraction
        means: dict[str, Tensor] = {}
        for _ in range(self.config.acktr.critic_steps):
            noise = self._value_noise(batch)

            def fisher(outputs: Outputs, rows: slice, noise: Tensor = noise) -> Tensor:
                return sampled_value_loss(outputs[0], sigma, noise[rows])

            task = Task(critic, optimizer, losses, fisher, metric, fraction)
            means, _ = self._take_step(task, batch)
        terms = value_metrics(means["value_loss"], batch)
        if optimizer.last_step is not None:
            terms["train/trust_scale_critic"] = optimizer.last_step.scale
            terms["train/quadratic_critic"] = optimizer.last_step.quadratic
        return terms

    def state_dict(self) -> dict[str, Any]:
        """Optimizers, the adapted step size and the generator (the network saves itself)."""
        return {
            "actor": self.actor.state_dict(),
            "critic": None if self.critic is None else self.critic.state_dict(),
            "lr": self._lr,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; raises ValueError when it is another network's."""
        if (state["critic"] is None) != (self.critic is None):
            raise ValueError("checkpoint and configuration disagree about a separate critic")
        self.actor.load_state_dict(state["actor"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
        self._lr = float(state["lr"])
        restore_generator(self.generator, state["generator"])


def _optimizer(module: nn.Module, config: KFACConfig) -> KFAC:
    known = {
        name: LOG_STD_FISHER
        for name, _ in module.named_parameters()
        if name.rsplit(".", 1)[-1] == "log_std"
    }
    # Of a batch's sample everything is observed.
    return KFAC(module, dataclasses.replace(config, stat_fraction=1.0), known_fisher=known)


def _eigenvalues(optimizer: KFAC, prefix: str) -> dict[str, float]:
    """The extreme eigenvalues of the curvature; nothing where it is inverted without them."""
    if optimizer.config.inverse != "eigen":
        return {}
    low, high = optimizer.extreme_eigenvalues()
    return {f"kfac/{prefix}min_eig": low, f"kfac/{prefix}max_eig": high}


def _policy_metrics(kl: Tensor, means: dict[str, Tensor], optimizer: KFAC) -> dict[str, Tensor]:
    terms = {
        "train/approx_kl": kl,
        "train/policy_loss": means["policy_loss"],
        "train/entropy_loss": -means["entropy"],
    }
    if optimizer.last_step is not None:
        terms["train/kl_quadratic"] = optimizer.last_step.predicted_kl
        terms["train/trust_scale_actor"] = optimizer.last_step.scale
        terms["train/quadratic_actor"] = optimizer.last_step.quadratic
    return terms
