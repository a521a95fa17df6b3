"""ACKTR (Wu et al. 2017): natural-gradient actor, Gauss-Newton critic, both by K-FAC.

Each batch gives one step per network. K-FAC turns the gradient g into U = (F + damping)^-1 g, with
F the Fisher matrix of the objective's distribution. The trust region (:mod:`acktr.kfac.trust`)
takes nu U with nu = min(1, sqrt(kl_clip / (lr^2 U^T F U))), so that the quadratic model predicts a
KL of at most kl_clip / 2.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from acktr import tree
from acktr.algorithms.auxiliary import Auxiliary
from acktr.algorithms.critic import Elsewhere, FirstOrderCritic
from acktr.algorithms.kfac_step import KFACStep, curvature_settings
from acktr.algorithms.learner import (
    average,
    explained_variance,
    over_ranks,
    part_of,
    require_allowed,
    scheduled_lr,
    to_floats,
    value_metrics,
)
from acktr.algorithms.objectives import (
    JointObjective,
    Objective,
    PolicyObjective,
    ValueObjective,
    value_noise,
)
from acktr.compute import joined, restore_generator
from acktr.config import Config, ConfigError, LearningRate, SampledKFACConfig, rate_at
from acktr.kfac import KFAC, DiagonalGaussian, Ranks, Stopwatch
from acktr.policies import ActionHead, ActorCritic, Outputs, as_outputs, mode
from acktr.rollout import Batch, outputs_of
from acktr.tree import Observed

_MIN_ADAPTED_LR = 1e-8
_VARIANCE_DECAY = 0.99
_LEAST_VARIANCE = 1e-4
_SCHEDULE_HORIZON = 1.1
"""Fraction of training at which the linear schedule would reach 0 (Baselines)."""


def adapt_lr(lr: float, kl: float, target: float) -> float:
    """Divide lr by 1.5 when the KL exceeds twice the target, multiply below half; in [1e-8, 1]."""
    if kl > 2 * target:
        lr /= 1.5
    elif kl < target / 2:
        lr *= 1.5
    return min(1.0, max(_MIN_ADAPTED_LR, lr))


class ACKTRLearner:
    """One ACKTR update per batch, for a shared network or a separate actor and critic.

    Args:
        network: Policy and value function.
        head: Action distribution.
        config: Settings.
        generator: Source of the sampled Fisher's noise, on the network's device.
        autocast: Context factory for forward passes.
        auxiliary: Losses of the network's further outputs, by name.
        ranks: Who has the other shares of every batch; None for one process.
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
        self.ranks = ranks
        self.auxiliary = dict(auxiliary or {})
        self.head = head
        self.config = config
        self.generator = generator
        self.autocast = autocast
        self.learning_rate: LearningRate | None = None
        self.elsewhere: Elsewhere | None = None
        """Who takes the critic's steps while the next rollout is collected; None: this learner."""
        self._report: dict[str, float] = {}
        """Metrics of steps elsewhere, which are told with the next update."""
        self._clock = Stopwatch()
        self._dtype = next(network.parameters()).dtype
        settings = config.acktr
        self._lr = settings.actor.lr
        self._variance = self._variance_weight = 0.0
        self.critic: KFAC | FirstOrderCritic | None = None
        if network.own and not settings.value_fisher:
            raise ConfigError("acktr.value_fisher=false is for the built-in networks")
        if network.shared:
            radii = (settings.actor.kl_clip, *[settings.critic.kl_clip] * (1 + len(self.auxiliary)))
            self._policy_step = self._kfac_step(network, settings.actor, radii)
        else:
            self._policy_step = self._kfac_step(network.actor, settings.actor)
            if settings.critic_optimizer == "kfac":
                self._value_step = self._kfac_step(network.critic, settings.critic)
                self.critic = self._value_step.optimizer
            else:
                self.critic = FirstOrderCritic(
                    network.critic, settings.first_order, generator, autocast, config.micro_batch
                )
        self.actor = self._policy_step.optimizer
        self._optimizers = {"": self.actor}
        if isinstance(self.critic, KFAC):
            self._optimizers["critic_"] = self.critic

    def _kfac_step(
        self,
        network: nn.Module,
        settings: SampledKFACConfig,
        radii: tuple[float | None, ...] = (),
    ) -> KFACStep:
        """A network's K-FAC optimizer; the log_std of the built-in ones has a known Fisher."""
        known = {
            name: DiagonalGaussian.LOG_STD_FISHER
            for name, parameter in network.named_parameters()
            if name.rsplit(".", 1)[-1] == "log_std"
            and not self.network.own  # where the name may mean anything
            and parameter.requires_grad
        }
        config = curvature_settings(self.network, settings, radii)
        optimizer = KFAC(network, config, known_fisher=known, ranks=self.ranks)
        fraction = settings.stat_fraction
        return KFACStep(network, optimizer, fraction, self.config, self.autocast, self._clock)

    def update(self, batch: Batch, progress: float) -> dict[str, float]:
        """Learn from one batch.

        Args:
            batch: The samples.
            progress: Fraction of training done, in [0, 1], for the schedule.

        Returns:
            Metrics by TensorBoard tag.

        Raises:
            FactorError: K-FAC cannot go on.
            ConfigError: The masks do not fit the actions.
        """
        started = time.perf_counter()
        require_allowed(batch, self.head)
        optimizers = self._optimizers_here()
        refreshed = sum(each.curvature.seconds["refresh"] for each in optimizers.values())
        settings, lr = self.config.acktr, self._lr
        if settings.target_kl is None:
            lr = scheduled_lr(settings.actor.lr, progress, settings.lr_schedule, _SCHEDULE_HORIZON)
        if self.learning_rate is not None:
            lr = rate_at(self.learning_rate, progress)
        self.actor.lr = lr
        if settings.value_sigma == "adaptive":
            self._follow_variance(batch)
        self.settle()
        reported, self._report = self._report, {}
        with mode(self.network, training=True):
            if self.elsewhere is not None:
                noises = list(self._noises(batch))
                self.elsewhere.begin(batch, noises, self.value_sigma)
                tensors = explained_variance(batch)
            else:
                reported = {}
                tensors = {} if self.network.shared else self._critic_step(batch)
            tensors |= self._policy_update(batch)
        metrics = to_floats(tensors)
        metrics["train/learning_rate"] = lr
        if settings.value_sigma == "adaptive":
            metrics["train/value_sigma"] = self.value_sigma
        if settings.target_kl is not None:
            self._lr = adapt_lr(lr, metrics["train/approx_kl"], settings.target_kl)
        for prefix, each in optimizers.items():
            metrics |= _spectrum(prefix, each)
        failures = sum(each.failures for each in optimizers.values())
        metrics |= reported
        metrics["kfac/failures"] = failures + reported.get("kfac/failures", 0.0)
        seconds = sum(each.curvature.seconds["refresh"] for each in optimizers.values())
        metrics["time/refresh"] = seconds - refreshed
        metrics["time/update"] = time.perf_counter() - started
        return metrics

    def _policy_update(self, batch: Batch) -> dict[str, Tensor]:
        """Natural-gradient step of a shared network along all losses, or of a separate actor."""
        shared, extra = self.network.shared, self.auxiliary
        given = (self.head, batch, self.config, self.generator, self._dtype)
        objective: Objective
        if shared or extra:
            objective = JointObjective(*given, extra, self.value_sigma if shared else None)
        else:
            objective = PolicyObjective(*given)
        acted = self._outputs(batch, slice(None)) if self.network.modal else None
        means, before = self._policy_step(objective, batch.observations, batch.share)
        means = over_ranks(batch, means)
        terms = self._policy_metrics(means, acted or before, batch)
        terms |= {f"train/{name}_loss": means[f"{name}_loss"] for name in extra}
        return terms | value_metrics(means["value_loss"], batch) if shared else terms

    def _critic_step(self, batch: Batch) -> dict[str, Tensor]:
        """Gauss-Newton steps of a separate critic, or its fit by a first-order optimizer."""
        if isinstance(self.critic, FirstOrderCritic):
            return value_metrics(self.critic.fit(batch), batch)
        means = self._fit_critic(batch, self._noises(batch), self.value_sigma)
        return value_metrics(means.pop("value_loss"), batch) | means

    def _noises(self, batch: Batch) -> Iterator[Tensor]:
        """The noise of each of the critic's steps on a batch."""
        for _ in range(self.config.acktr.critic_steps):
            yield value_noise(batch, self.generator, self._dtype)

    def _fit_critic(
        self, batch: Batch, noises: Iterable[Tensor], sigma: float
    ) -> dict[str, Tensor]:
        """Take one Gauss-Newton step with each noise; the loss before the last one, and metrics."""
        means: dict[str, Tensor] = {}
        for noise in noises:
            objective = ValueObjective(batch, sigma, noise)
            means, _ = self._value_step(objective, batch.observations, batch.share)
        means = over_ranks(batch, means)
        last = self._value_step.optimizer.last_step
        if last is not None:
            means["train/trust_scale_critic"] = last.scale
            means["train/quadratic_critic"] = last.quadratic
        return means

    def critic_report(
        self, batch: Batch, noises: Iterable[Tensor], sigma: float
    ) -> dict[str, float]:
        """Take a separate critic's Gauss-Newton steps on a batch, and tell their metrics.

        Args:
            batch: The samples, of which observations, returns and weights count.
            noises: The noise (B, 1) of each step.
            sigma: Standard deviation of the observation model.

        Raises:
            FactorError: K-FAC cannot go on.
        """
        means = self._fit_critic(batch, noises, sigma)
        report = to_floats({"train/value_loss": means.pop("value_loss"), **means})
        report |= _spectrum("critic_", self._optimizers["critic_"])
        return report | {"kfac/failures": float(self._optimizers["critic_"].failures)}

    def settle(self) -> None:
        """Wait for what learns elsewhere; its parameters are here then."""
        if self.elsewhere is not None:
            self._report = self.elsewhere.settle() or self._report

    def _optimizers_here(self) -> dict[str, KFAC]:
        """Those that step in this process, by the prefix of their metrics."""
        apart = self.elsewhere is not None
        return {name: each for name, each in self._optimizers.items() if not (apart and name)}

    def _outputs(self, batch: Batch, rows: slice) -> Outputs:
        """The policy's parameters, and the values of a shared network, in evaluation mode."""
        step, shared = self._policy_step, self.network.shared

        def side_by_side(observations: Observed) -> Tensor:
            policy, *values = as_outputs(step.network(observations))[: 1 + shared]
            columns = [value[:, None].to(policy.dtype) for value in values]
            return torch.cat([policy, *columns], dim=-1)

        evaluating = mode(self.network, training=False)
        with self._clock.part("forward"), evaluating, self.autocast():
            found = outputs_of(
                side_by_side, tree.rows(batch.observations, rows), self.config.micro_batch
            )
        return (found[:, :-1], found[:, -1]) if shared else (found,)

    def _policy_metrics(
        self, means: dict[str, Tensor], before: Outputs, batch: Batch
    ) -> dict[str, Tensor]:
        """Metrics of a step of the policy, with its KL measured on as many samples as F is."""
        rows = self._policy_step.sample(batch.observations, batch.share) or slice(None)
        after, weights = self._outputs(batch, rows), part_of(batch.weights, rows)
        old = self.head.make(before[0][rows], part_of(batch.masks, rows))
        measured = {"train/approx_kl": average(old.kl(after[0]), weights)}
        if self.network.shared:
            change = (after[1] - before[1][rows]) / self.value_sigma
            measured["train/value_kl"] = 0.5 * average(change.square(), weights)
        measured = over_ranks(batch, measured, len(after[0]))
        terms = {
            "train/approx_kl": measured.pop("train/approx_kl"),
            "train/policy_loss": means["policy_loss"],
            "train/entropy_loss": -means["entropy"],
            **measured,
        }
        if self.actor.last_step is not None:
            terms["train/kl_quadratic"] = self.actor.last_step.predicted_kl
            terms["train/trust_scale_actor"] = self.actor.last_step.scale
            terms["train/quadratic_actor"] = self.actor.last_step.quadratic
        return terms

    @property
    def value_sigma(self) -> float:
        """Standard deviation of the value's observation model, in this update or the last one."""
        given = self.config.acktr.value_sigma
        if isinstance(given, str):
            mean_square = self._variance / self._variance_weight
            return math.sqrt(max(mean_square, _LEAST_VARIANCE))
        return given

    def _follow_variance(self, batch: Batch) -> None:
        """Take mean((R - V)^2), of values of before the update, into its running average.

        The average weighs earlier batches by 0.99 each; it begins with the first one.

        Raises:
            ConfigError: The batch has no values.
        """
        if batch.values is None:
            raise ConfigError("acktr.value_sigma=adaptive needs the batch's values, of V before it")
        squares = {"": average((batch.returns - batch.values).square(), batch.weights)}
        square = float(over_ranks(batch, squares)[""])
        decay = _VARIANCE_DECAY
        self._variance = decay * self._variance + (1 - decay) * square
        self._variance_weight = decay * self._variance_weight + 1 - decay

    @property
    def seconds(self) -> dict[str, float]:
        """Time so far by part: forward, fisher, factors, backward, step (with refresh, apply).

        The exact quadratic, where it is wanted, is the rest of step. What is done elsewhere does
        not count.
        """
        return joined(
            self._clock.seconds, *(o.curvature.seconds for o in self._optimizers_here().values())
        )

    def state_dict(self) -> dict[str, Any]:
        """Optimizers, the adapted step size and the generator (the network saves itself)."""
        self.settle()
        if self.elsewhere is not None:
            self.elsewhere.fetch()
        critic: dict[str, Any] | None
        if isinstance(self.critic, KFAC):
            critic = self.critic.state_by_name()  # a checkpoint takes text keys alone
        else:
            critic = None if self.critic is None else self.critic.state_dict()
        return {
            "actor": self.actor.state_by_name(),
            "critic": critic,
            "lr": self._lr,
            "value_variance": [self._variance, self._variance_weight],
            "generator": self.generator.get_state(),
            # Metrics may be NaN, as of a step that was left out; a state may not.
            "critic_report": {k: v for k, v in self._report.items() if math.isfinite(v)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; raises ValueError when it is another network's."""
        if (state["critic"] is None) != (self.critic is None):
            raise ValueError("checkpoint and configuration disagree about a separate critic")
        self.actor.load_state_dict(state["actor"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
        self._lr = float(state["lr"])
        saved = state.get("value_variance", [0.0, 0.0])  # which earlier versions did not write
        self._variance, self._variance_weight = map(float, saved)
        report = state.get("critic_report", {})  # which earlier versions did not write
        self._report = {str(name): float(value) for name, value in report.items()}
        if self.elsewhere is not None and not self.elsewhere.drop():
            self.elsewhere = None
        restore_generator(self.generator, state["generator"])


def _spectrum(prefix: str, optimizer: KFAC) -> dict[str, float]:
    """Metrics of the factors' eigenvalues; none where they are inverted without."""
    if optimizer.config.structure == "cholesky":
        return {}
    low, high = optimizer.curvature.extreme_eigenvalues()
    if math.isnan(low):  # before the first decomposition, and where a structure needs none
        return {}
    return {f"kfac/{prefix}min_eig": low, f"kfac/{prefix}max_eig": high}
