"""TRPO: trust-region policy optimisation (Schulman et al. 2015)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from acktr import tree
from acktr.algorithms.auxiliary import Auxiliary
from acktr.algorithms.critic import FirstOrderCritic
from acktr.algorithms.learner import (
    average,
    mean,
    over_ranks,
    part_of,
    require_allowed,
    to_floats,
    used_advantages,
    value_metrics,
)
from acktr.compute import restore_generator
from acktr.config import Config, ConfigError, LearningRate
from acktr.kfac import (
    Distribution,
    Linearized,
    Ranks,
    Stopwatch,
    flattened,
    sample_rows,
    unflattened,
)
from acktr.policies import ActionHead, ActorCritic, mode
from acktr.rollout import Batch, Share

Product = Callable[[Tensor], Tensor]


def fisher_product(
    outputs: Tensor,
    dist: Distribution,
    network: nn.Module,
    damping: float,
    weights: Tensor | None = None,
) -> Product:
    """Product v -> (F + damping I) v with the exact Fisher F = 1/B sum_b J_b^T H_b J_b of a batch.

    F is also the Hessian of mean KL(old || new) at the old parameters. All products share the graph
    of one forward pass.

    Args:
        outputs: Distribution parameters (B, P), with their graph.
        dist: The distribution of the same outputs, detached.
        network: What they come from; v runs over its parameters, each flattened, in their order.
        damping: Added to the diagonal (Schulman et al. 2015, appendix C.1).
        weights: Weights of the samples (B,); None for 1.
    """
    parameters = trained(network)
    names = list(parameters)
    linear = Linearized([outputs], parameters, [torch.zeros_like(outputs)])
    unused = {n: torch.zeros_like(p) for n, p in parameters.items() if n not in linear.gradients}
    share = None if weights is None else weights / weights.mean()

    def metric(tangent: Tensor) -> Tensor:
        form = dist.fisher_quadratic(tangent)
        return form if share is None else share * form

    def product(vector: Tensor) -> Tensor:
        curved = linear.product(metric, unflattened(vector, names, network))
        return flattened(curved | unused, names) + damping * vector

    return product


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def conjugate_gradient(
    product: Product, right: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Solve M x = b for a symmetric positive definite M, starting at 0 (Hestenes, Stiefel 1952).

    Args:
        product: v -> M v.
        right: b (n,).
        iterations: Most products.
        tolerance: Squared norm of the residual to stop at.

    Returns:
        x (n,) and the squared norm of its residual.
    """
    solution = torch.zeros_like(right)
    residual = right.clone()
    direction = right.clone()
    norm = residual @ residual
    for _ in range(iterations):
        if float(norm) <= tolerance:
            break
        image = product(direction)
        step = norm / (direction @ image)
        solution += step * direction
        residual -= step * image
        previous, norm = norm, residual @ residual
        direction = residual + (norm / previous) * direction
    return solution, norm


class Surrogate:
    """The objective mean(ratio A) + ent_coef mean(H), with ratio = pi / pi_old.

    Args:
        head: Action distribution.
        outputs: Distribution parameters (B, P) of the old policy.
        batch: The samples.
        config: Settings.
    """

    def __init__(self, head: ActionHead, outputs: Tensor, batch: Batch, config: Config) -> None:
        self.old = head.make(outputs.detach(), batch.masks)
        self._head = head
        self._masks = batch.masks
        self._actions = batch.actions
        self._advantages = used_advantages(batch, config)
        self._old_log_prob = self.old.log_prob(batch.actions)
        self._ent_coef = config.ent_coef
        self.weights = batch.weights

    def __call__(self, outputs: Tensor) -> Tensor:
        """Its value for the outputs (B, P) of a policy."""
        dist = self._head.make(outputs, self._masks)
        ratio = (dist.log_prob(self._actions) - self._old_log_prob).exp()
        gain = mean(ratio * self._advantages, self.weights)
        return gain + self._ent_coef * mean(dist.entropy(), self.weights)


def _joined(share: Share, rows: int, product: Product, vector: Tensor) -> Tensor:
    """The product with the matrix of all ranks' samples; this rank's is of so many of its own."""
    return share.mean(product(vector), rows)


class TRPOLearner:
    """One natural-gradient step per batch, checked by a line search, and a separate critic.

    The step is x sqrt(2 max_kl / x^T M x) with x = M^-1 g by conjugate gradient, M the damped
    Fisher matrix and g the gradient of the surrogate mean(ratio A) + ent_coef mean(H). It is
    shortened until the surrogate improves and the mean KL is within ``max_kl``; if that never
    happens the parameters stay as they were, bit for bit. All of it is in evaluation mode, as a
    ratio or a KL of two dropout masks says nothing; the critic is fitted in training mode.

    Args:
        network: Policy and value function, separate.
        head: Action distribution.
        config: Settings.
        generator: Order of the critic's samples, on the network's device.
        autocast: Context factory for forward passes.
        auxiliary: None; a step along the policy's own KL has no place for other losses.
        ranks: Who has the other shares of every batch, which say so themselves; unused.

    Raises:
        ConfigError: The network is shared, or there are auxiliary losses.
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
        if network.shared:
            raise ConfigError(
                "trpo needs a critic of its own: "
                + ("network=(Actor, Critic)" if network.own else "network.shared must be false")
            )
        if auxiliary:
            raise ConfigError("trpo takes no auxiliary losses: use acktr or a2c")
        self.network = network
        self.actor = network.actor
        self.head = head
        self.config = config
        self.generator = generator
        self.autocast = autocast
        self.learning_rate: LearningRate | None = None
        self.critic = FirstOrderCritic(network.critic, config.trpo.critic, generator, autocast)
        self._parameters = trained(network.actor)
        self._names = list(self._parameters)
        self._clock = Stopwatch()

    @property
    def seconds(self) -> dict[str, float]:
        """Time so far by part: policy, critic."""
        return dict(self._clock.seconds)

    def update(self, batch: Batch, progress: float) -> dict[str, float]:
        """Learn from one batch.

        Args:
            batch: The samples.
            progress: Fraction of training done; TRPO has no schedule.

        Returns:
            Metrics by TensorBoard tag; ``train/line_search_steps`` counts shortenings.

        Raises:
            ConfigError: The masks do not fit the actions, or ``fisher_fraction`` leaves one of
            several ranks without samples.
        """
        started = time.perf_counter()
        require_allowed(batch, self.head)
        with self._clock.part("policy"):
            if self.network.modal:  # running statistics of normalisations
                with mode(self.network, training=True), torch.no_grad(), self.autocast():
                    self.actor(batch.observations)
            tensors = self._policy_step(batch)
        with self._clock.part("critic"), mode(self.network, training=True):
            tensors |= value_metrics(self.critic.fit(batch), batch)
        metrics = to_floats(tensors)
        metrics["time/update"] = time.perf_counter() - started
        return metrics

    def _policy_step(self, batch: Batch) -> dict[str, Tensor]:
        """Step of the actor along M^-1 g; the products of M may take every k-th sample only.

        What several ranks measure is averaged before anything is decided by it, so that all of them
        take the same step after as many products and trials.
        """
        settings, share = self.config.trpo, batch.share
        with self.autocast():
            outputs = self.actor(batch.observations)
        surrogate = Surrogate(self.head, outputs, batch, self.config)
        start = surrogate(outputs)
        slopes = torch.autograd.grad(
            start, list(self._parameters.values()), retain_graph=True, materialize_grads=True
        )
        gradient = flattened(dict(zip(self._names, slopes, strict=True)), self._names)
        entropy = average(surrogate.old.entropy(), batch.weights)
        value, entropy = over_ranks(batch, {"": start.detach(), "entropy": entropy}).values()
        dist, weights = surrogate.old, batch.weights
        if share is None:
            rows = sample_rows(len(batch), settings.fisher_fraction, 0)
        else:
            gradient = share.mean(gradient, len(batch))
            rows = share.sample("fisher_fraction", settings.fisher_fraction, 0)
        if rows is not None:
            with self.autocast():
                outputs = self.actor(tree.rows(batch.observations, rows))
            dist = self.head.make(outputs.detach(), part_of(batch.masks, rows))
            weights = part_of(weights, rows)
        product = own = fisher_product(outputs, dist, self.actor, settings.cg_damping, weights)
        if share is not None:
            product = partial(_joined, share, len(outputs), own)
        solution, residual = conjugate_gradient(
            product, gradient, settings.cg_iterations, settings.cg_tolerance
        )
        curvature = solution @ product(solution)
        step = solution * torch.sqrt(2 * settings.max_kl / curvature.clamp(min=1e-20))
        kl, reached, shortened, accepted = self._line_search(step, surrogate, value, batch)
        return {
            "train/approx_kl": kl,
            "train/policy_loss": -value,
            "train/surrogate_gain": reached - value,
            "train/entropy_loss": -entropy,
            "train/cg_residual": residual,
            "train/line_search_steps": torch.tensor(float(shortened)),
            "train/line_search_accepted": torch.tensor(float(accepted)),
        }

    @torch.no_grad()
    def _line_search(
        self, step: Tensor, surrogate: Surrogate, start: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, int, bool]:
        """Mean KL, surrogate, number of shortenings and whether a step was taken."""
        settings = self.config.trpo
        before = flattened(self._parameters, self._names)
        fraction = 1.0
        for attempt in range(settings.backtrack_steps):
            self._assign(before + fraction * step)
            with self.autocast():
                outputs = self.actor(batch.observations)
            kl = average(surrogate.old.kl(outputs), batch.weights)
            kl, reached = over_ranks(batch, {"kl": kl, "": surrogate(outputs)}).values()
            if bool((kl <= settings.max_kl) & (reached > start)):  # NaN fails both
                return kl, reached, attempt, True
            fraction *= settings.backtrack_factor
        self._assign(before)
        return torch.zeros_like(start), start, settings.backtrack_steps, False

    def _assign(self, vector: Tensor) -> None:
        """Copy a flat vector into the parameters, which keep their memory."""
        for name, part in unflattened(vector, self._names, self.actor).items():
            self._parameters[name].copy_(part)

    def state_dict(self) -> dict[str, Any]:
        """The critic's optimizer and the generator (the network saves itself)."""
        return {"critic": self.critic.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; raises ValueError when it is another network's."""
        self.critic.load_state_dict(state["critic"])
        restore_generator(self.generator, state["generator"])
