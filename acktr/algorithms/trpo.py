"""TRPO: trust-region policy optimisation (Schulman et al. 2015)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from acktr.algorithms.critic import FirstOrderCritic
from acktr.algorithms.learner import standardised, to_floats, value_metrics
from acktr.compute import Clock, restore_generator
from acktr.config import Config
from acktr.kfac import Linearized
from acktr.policies import ActionHead, ActorCritic, Distribution, SeparateActorCritic
from acktr.rollout import Batch

Product = Callable[[Tensor], Tensor]


def fisher_product(
    outputs: Tensor, dist: Distribution, parameters: Mapping[str, nn.Parameter], damping: float
) -> Product:
    """Product v -> (F + damping I) v with the exact Fisher F = 1/B sum_b J_b^T H_b J_b of a batch.

    F is also the Hessian of mean KL(old || new) at the old parameters. All products share the graph
    of one forward pass.

    Args:
        outputs: Distribution parameters (B, P), with their graph.
        dist: The distribution of the same outputs, detached.
        parameters: What v runs over by name, one after another, each flattened.
        damping: Added to the diagonal (Schulman et al. 2015, appendix C.1).
    """
    linear = Linearized([outputs], parameters, [torch.zeros_like(outputs)])

    def product(vector: Tensor) -> Tensor:
        (tangent,) = linear.tangents(_unflattened(vector, parameters))
        tangent = tangent.detach().requires_grad_()
        form = 0.5 * dist.fisher_quadratic(tangent).mean()
        (curved,) = torch.autograd.grad(form, tangent)
        return flattened(linear.pulled([curved]).values()) + damping * vector

    return product


def flattened(tensors: Iterable[Tensor]) -> Tensor:
    """The entries of all tensors as one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _unflattened(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = torch.split(vector, [tensor.numel() for tensor in like.values()])
    pairs = zip(like.items(), parts, strict=True)
    return {name: part.view_as(tensor) for (name, tensor), part in pairs}


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


class TRPOLearner:
    """One natural-gradient step per batch, checked by a line search, and a separate critic.

    The step is x sqrt(2 max_kl / x^T M x) with x = M^-1 g by conjugate gradient, M the damped
    Fisher matrix and g the gradient of the surrogate mean(ratio A) + ent_coef mean(H). It is
    shortened until the surrogate improves and the mean KL is within ``max_kl``; if that never
    happens the parameters stay as they were, bit for bit.

    Args:
        network: Policy and value function, separate.
        head: Action distribution.
        config: Settings.
        generator: Order of the critic's samples, on the network's device.
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
        if not isinstance(network, SeparateActorCritic):
            raise ValueError("trpo needs a critic of its own: network.shared must be false")
        self.actor = network.actor
        self.head = head
        self.config = config
        self.generator = generator
        self.autocast = autocast
        self.critic = FirstOrderCritic(network.critic, config.trpo.critic, generator, autocast)
        self._parameters = dict(network.actor.named_parameters())
        self._clock = Clock()

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
        """
        started = time.perf_counter()
        with self._clock.part("policy"):
            tensors = self._policy_step(batch)
        with self._clock.part("critic"):
            tensors |= value_metrics(self.critic.fit(batch), batch)
        metrics = to_floats(tensors)
        metrics["time/update"] = time.perf_counter() - started
        return metrics

    def _policy_step(self, batch: Batch) -> dict[str, Tensor]:
        settings = self.config.trpo
        with self.autocast():
            outputs = self.actor(batch.observations)
        old = self.head.make(outputs.detach())
        advantages = batch.advantages
        if self.config.normalize_advantage:
            advantages = standardised(advantages)
        log_prob = old.log_prob(batch.actions)
        surrogate = self._surrogate(outputs, batch.actions, advantages, log_prob)
        parameters = list(self._parameters.values())
        gradient = flattened(torch.autograd.grad(surrogate, parameters, retain_graph=True))
        product = self._product(outputs, old, batch)
        found, residual = conjugate_gradient(
            product, gradient, settings.cg_iterations, settings.cg_tolerance
        )
        curvature = found @ product(found)
        direction = found * torch.sqrt(2 * settings.max_kl / curvature.clamp(min=1e-20))
        before = flattened(p.detach() for p in parameters)
        kl, reached, steps, accepted = self._line_search(
            before, direction, batch, old, advantages, log_prob, surrogate.detach()
        )
        flag = torch.tensor(float(accepted))
        return {
            "train/approx_kl": kl,
            "train/policy_loss": -surrogate,
            "train/surrogate_gain": reached - surrogate.detach(),
            "train/entropy_loss": -old.entropy().mean(),
            "train/cg_residual": residual,
            "train/line_search_steps": torch.tensor(float(steps)),
            "train/line_search_accepted": flag,
        }

    def _product(self, outputs: Tensor, old: Distribution, batch: Batch) -> Product:
        """The damped Fisher product, on every k-th sample if so configured."""
        settings = self.config.trpo
        every = round(1 / settings.fisher_fraction)
        if every > 1:
            with self.autocast():
                outputs = self.actor(batch.observations[::every])
            old = self.head.make(outputs.detach())
        return fisher_product(outputs, old, self._parameters, settings.cg_damping)

    def _surrogate(
        self, outputs: Tensor, actions: Tensor, advantages: Tensor, old_log_prob: Tensor
    ) -> Tensor:
        dist = self.head.make(outputs)
        ratio = (dist.log_prob(actions) - old_log_prob).exp()
        return (ratio * advantages).mean() + self.config.ent_coef * dist.entropy().mean()

    @torch.no_grad()
    def _line_search(
        self,
        before: Tensor,
        direction: Tensor,
        batch: Batch,
        old: Distribution,
        advantages: Tensor,
        log_prob: Tensor,
        surrogate: Tensor,
    ) -> tuple[Tensor, Tensor, int, bool]:
        """Mean KL, surrogate, number of shortenings and whether a step was taken."""
        settings = self.config.trpo
        fraction = 1.0
        for attempt in range(settings.backtrack_steps):
            self._assign(before + fraction * direction)
            with self.autocast():
                outputs = self.actor(batch.observations)
            kl = old.kl(outputs).mean()
            reached = self._surrogate(outputs, batch.actions, advantages, log_prob)
            if bool((kl <= settings.max_kl) & (reached > surrogate)):  # NaN fails both
                return kl, reached, attempt, True
            fraction *= settings.backtrack_factor
        self._assign(before)
        return torch.zeros_like(surrogate), surrogate, settings.backtrack_steps, False

    def _assign(self, vector: Tensor) -> None:
        """Copy a flat vector into the parameters, which keep their memory."""
        for name, part in _unflattened(vector, self._parameters).items():
            self._parameters[name].copy_(part)

    def state_dict(self) -> dict[str, Any]:
        """The critic's optimizer and the generator (the network saves itself)."""
        return {"critic": self.critic.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; raises ValueError when it is another network's."""
        self.critic.load_state_dict(state["critic"])
        restore_generator(self.generator, state["generator"])
