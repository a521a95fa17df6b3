"""A network as rollouts use it: actions in one call, compiled where that is wanted, and values."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from acktr import tree
from acktr.compute import Compiled
from acktr.policies import ActionHead, ActorCritic, as_outputs, straight
from acktr.tree import Observed, Sequences, Tree

Answer = tuple[Tensor, Tensor | None, Tensor]
"""Actions (N, ...), values (N,) where the same forward pass gives them, and whether anything is
NaN or Inf (a scalar)."""


class Acting:
    """Chooses actions, and values states where that costs no forward pass of its own.

    Compiled, it takes the noise of its actions from the same generator in the same order. On CUDA
    torch records the compiled calls as a CUDA graph and replays it.

    Args:
        network: Policy and value function.
        head: Action distribution.
        generator: Source of the action noise, on the network's device.
        autocast: Context factory for the network's forward pass.
        compiled: Whether to compile.
        place: Number of this rank and of all, of which each acts on as many observations: noise is
            drawn for all of them, in the order of the ranks.
    """

    def __init__(
        self,
        network: ActorCritic,
        head: ActionHead,
        generator: torch.Generator,
        autocast: Callable[[], AbstractContextManager[Any]],
        compiled: bool = False,
        place: tuple[int, int] = (0, 1),
    ) -> None:
        self.network = network
        self.generator = generator
        self.autocast = autocast
        self.gives_values = network.shared or network.recurrent
        self._head = head
        self._place = place
        self._actor: Callable[[Tree], Any] | None = None
        self._compiled: Compiled[Answer, Tree, Tensor, Tensor | None] | None = None
        if compiled:
            graph = generator.device.type == "cuda"
            self._compiled = Compiled(self._answer, "the policy", graph=graph, dynamic=False)

    def begin(self) -> None:
        """Before a rollout: separate networks are called without what lies between modules."""
        if self._compiled is None and not self.gives_values:
            self._actor = straight(self.network.actor)

    @torch.no_grad()
    def __call__(self, observations: Tree, masks: Tensor | None = None) -> Answer:
        """Act on observations (N, ...) as the network takes them, by action masks (N, P)."""
        rank, size = self._place
        if self._compiled is None and size == 1:
            return self._answer(observations, None, masks)
        dtype, count = next(self.network.parameters()).dtype, tree.length(observations)
        noise = self._head.noise(size * count, self.generator, dtype)
        noise = noise[rank * count : (rank + 1) * count]
        if self._compiled is None:
            return self._answer(observations, noise, masks)
        actions, values, broken = self._compiled(observations, noise, masks)
        # A graph's next replay overwrites what it returned.
        return actions.clone(), None if values is None else values.clone(), broken

    def _answer(self, observations: Tree, noise: Tensor | None, masks: Tensor | None) -> Answer:
        values: Tensor | None = None
        with self.autocast():
            if self.network.shared:
                parameters, values, *_ = self.network(observations)
            else:
                actor = self._actor or self.network.actor
                parameters = as_outputs(actor(observations))[0]
        dist = self._head.make(parameters, masks)
        actions = dist.sample(dist.noise(self.generator) if noise is None else noise)
        # What the network itself returned is looked at, since masked logits are infinite.
        return actions, values, (parameters - parameters).any()  # x - x is 0 for finite numbers

    @torch.no_grad()
    def unroll(
        self, sequences: Sequences, masks: Tensor | None = None
    ) -> tuple[Answer, tuple[Tensor, ...]]:
        """Act by a recurrent network on one step of sequences; gives its new state too."""
        with self.autocast():
            (parameters, values, *_), state = self.network.unroll(sequences)
        dist = self._head.make(parameters, masks)
        actions = dist.sample(dist.noise(self.generator))
        return (actions, values, (parameters - parameters).any()), state

    def values(self, observations: Observed) -> Tensor:
        """Values (N,) of observations as the network takes them."""
        with self.autocast():
            shared = self.network.shared
            values: Tensor = (
                self.network(observations)[1] if shared else self.network.critic(observations)
            )
        return values
