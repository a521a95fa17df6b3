"""One K-FAC step of a network on an objective: forward, factors, gradients, step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from acktr import tree
from acktr.algorithms.objectives import Objective
from acktr.compute import compiled_for_updates
from acktr.config import Config, SampledKFACConfig
from acktr.kfac import (
    KFAC,
    Capture,
    FisherQuadratic,
    KFACConfig,
    Linearized,
    Stopwatch,
    output_tangents,
    sample_rows,
)
from acktr.policies import ActorCritic, Outputs, as_outputs
from acktr.rollout import MicroBatch, Share, add_means, parts_of
from acktr.tree import Observed, Sequences


def curvature_settings(
    network: ActorCritic, settings: SampledKFACConfig, radii: tuple[float | None, ...] = ()
) -> KFACConfig:
    """K-FAC's settings for a network: those of the configuration, unless it is one of one's own.

    Presets were tuned on the built-in networks. One of one's own may have any layer: parameters
    outside of known layers get the diagonal of their Fisher, and huge factors are cut. Where it is
    shared, every part of its output has a radius of its own, measured with the exact Fisher: the
    damped Kronecker factors can be wrong by orders of magnitude where a layer sees a sample many
    times (nodes, words), and a value function that is far off would leave the policy no room.

    Args:
        network: The network.
        settings: K-FAC of the actor or the whole network, or of the critic.
        radii: kl_clip of every part of a shared network's output.
    """
    if not network.own:
        return settings
    own = {field.name: getattr(settings, field.name) for field in dataclasses.fields(KFACConfig)}
    if settings.small_parameters == "gradient":
        own["small_parameters"] = "diagonal"
    if settings.max_factor_size is None:
        own["max_factor_size"] = KFACConfig().max_factor_size
    if radii:
        own |= {"quadratic": "corrected", "kl_clip": radii}
    return KFACConfig(**own)


class KFACStep:
    """Takes K-FAC steps of a network, one for each objective that it is given.

    A batch may be taken in micro-batches, whose gradients and factors add up to those of the whole.

    Args:
        network: Observations to one output or a tuple of them.
        optimizer: Its optimizer.
        fraction: Part of the batch that the factors are made of.
        config: Settings: micro-batches and compilation.
        autocast: Context factory for forward passes.
        clock: Counts the parts forward, fisher, backward and step.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: KFAC,
        fraction: float,
        config: Config,
        autocast: Callable[[], AbstractContextManager[Any]],
        clock: Stopwatch,
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        self.curvature = optimizer.curvature
        self._fraction = fraction
        self._limit = config.micro_batch
        self._autocast = autocast
        self._clock = clock
        self._exact = optimizer.config.quadratic == "exact"
        self._corrected = optimizer.config.quadratic == "corrected"
        self.compiled = compiled_for_updates(network) if config.compile else None

    def sample(self, observations: Observed, share: Share | None = None) -> slice | None:
        """The rows of a batch that its factors are made of; None for all.

        Raises:
            ConfigError: A rank has too few samples.
        """
        turn = self.curvature.batches
        if share is not None:
            return share.sample("stat_fraction", self._fraction, turn)
        if isinstance(observations, Sequences):
            return observations.some(self._fraction, turn)
        return sample_rows(tree.length(observations), self._fraction, turn)

    def __call__(
        self, objective: Objective, observations: Observed, share: Share | None = None
    ) -> tuple[dict[str, Tensor], Outputs]:
        """Take one step.

        Args:
            objective: What to learn.
            observations: Those of the batch.
            share: What they are of the batch of all ranks; None in one process.

        Returns:
            The loss terms' means over the batch of this rank, and the network's first two outputs
            before it.
        """
        parts = parts_of(observations, self._limit)
        observing = self.curvature.observing or self.curvature.measuring
        if observing and (sample := self.sample(observations, share)) is not None:
            # A forward pass of the sample alone costs less than a backward pass of all.
            self._observe(objective, observations, sample)
            observing = False
        self.optimizer.zero_grad()
        means: dict[str, Tensor] = {}
        before: list[Outputs] = []
        quadratic: FisherQuadratic | None = None
        for part in parts:
            terms, outputs, quadratic = self._learn(objective, observations, part, observing)
            add_means(means, terms, part.share)
            before.append(outputs[:2])
        if self._exact and len(parts) > 1:
            quadratic = partial(self._quadratic, objective, observations, parts)
        if share is not None:
            share.ranks.average(self.network, share.rows)
            quadratic = None if quadratic is None else _joined(quadratic, share)
        with self._clock.part("step"):
            self.optimizer.step(fisher_quadratic=quadratic)
        if len(before) == 1:
            return means, before[0]
        return means, tuple(map(torch.cat, zip(*before, strict=True)))

    def _observe(self, objective: Objective, observations: Observed, sample: slice) -> None:
        """Renew the factors from a sample of the batch."""
        for part in parts_of(observations, self._limit, sample):
            rows = part.rows
            with self._clock.part("fisher"), self.curvature.capture() as captured, self._autocast():
                outputs = as_outputs(self.network(tree.rows(observations, rows)))
            self._fold(captured, objective, outputs, rows, part.last)

    def _fold(
        self, captured: Capture, objective: Objective, outputs: Outputs, rows: slice, last: bool
    ) -> None:
        """Take a recorded pass into the factors, and into the measurement of the trust region."""
        if objective.plain and not self._corrected:
            self.curvature.update_curvature(captured, objective.fisher(outputs, rows), last=last)
            return
        self.curvature.observe(
            captured,
            outputs if len(outputs) > 1 else outputs[0],
            objective.likelihood,
            weights=objective.weights(rows),
            target=objective.targets(rows),
            last=last,
        )

    def _learn(
        self, objective: Objective, observations: Observed, part: MicroBatch, observing: bool
    ) -> tuple[dict[str, Tensor], Outputs, FisherQuadratic | None]:
        """Add a part of the batch to the gradients, and to the factors if observing.

        It is a function of its own so that the activations of one part are gone before the next.

        Returns:
            The loss terms, the outputs, and the exact quadratic if the part is the batch.
        """
        rows = part.rows
        forward: Callable[[Observed], Tensor | Outputs] = self.network
        if self.compiled is not None and not observing and not self._exact:
            forward = self.compiled  # compiled networks call no hooks and are derived once only
        recording = self.curvature.capture() if observing else nullcontext()
        with self._clock.part("forward"), recording as captured, self._autocast():
            outputs = as_outputs(forward(tree.rows(observations, rows)))
        loss, terms = objective.loss(outputs, rows)
        if captured is not None:
            self._fold(captured, objective, outputs, rows, part.last)
        quadratic: FisherQuadratic | None = None
        with self._clock.part("backward"):
            if self._exact and part.share == 1:
                named = self.curvature.named
                linear = Linearized(outputs, named, torch.autograd.grad(loss, outputs))
                for name, gradient in linear.gradients.items():
                    named[name].grad = gradient
                quadratic = partial(linear.quadratic, objective.metric(outputs, rows))
            else:
                torch.autograd.backward(loss if part.share == 1 else part.share * loss)
        return terms, tuple(output.detach() for output in outputs), quadratic

    def _quadratic(
        self,
        objective: Objective,
        observations: Observed,
        parts: list[MicroBatch],
        direction: dict[str, Tensor],
    ) -> Tensor:
        """U^T F U of a whole batch, by one forward-mode pass for each part of it."""
        forms = []
        for part in parts:
            with self._autocast():
                output, (tangent,) = output_tangents(
                    self.network, (tree.rows(observations, part.rows),), [direction]
                )
            metric = objective.metric(as_outputs(output), part.rows)
            forms.append(part.share * metric(*as_outputs(tangent)).mean())
        return torch.stack(forms).sum()


def _joined(quadratic: FisherQuadratic, share: Share) -> FisherQuadratic:
    """The form of the Fisher matrix of all ranks' samples, from that of one's own."""
    return lambda step: share.means({"": quadratic(step)}, share.rows)[""]
