"""A trained policy that only acts: network, action head and frozen normaliser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acktr.compute import threads_for, to_tensor
from acktr.config import Config
from acktr.envs import Channels, Masks, space_difference, space_facts
from acktr.policies.build import build_network
from acktr.policies.contract import ActorCritic, NetworkSource, Outputs
from acktr.policies.distributions import action_head, to_environment
from acktr.policies.inputs import prepared
from acktr.policies.normalize import Normalizer, observation_normalizer
from acktr.tree import Sequences, Tree, length

Memorised = tuple[NDArray[Any], ...]
"""The state of a network with a memory as arrays (N, ...)."""


class Policy:
    """Acts with a network; never changes it or the normaliser.

    Args:
        network: Policy and value function.
        observation_space: Of one environment.
        action_space: Of one environment.
        normalizer: Observation statistics, applied frozen.
        seed: Of the action noise.
        channels: Where pictures have their channels.
    """

    def __init__(
        self,
        network: ActorCritic,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        normalizer: Normalizer | None,
        seed: int = 0,
        channels: Channels = "auto",
    ) -> None:
        self.network = network
        self.head = action_head(action_space)
        self.observation_space = observation_space
        self.action_space = action_space
        self.normalizer = normalizer
        self.channels: Channels = channels
        self.device = next(network.parameters()).device
        self.generator = torch.Generator(self.device).manual_seed(seed)

    @classmethod
    def from_state(
        cls,
        config: Config,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        state: Mapping[str, Any],
        device: torch.device,
        seed: int = 0,
        network: NetworkSource | None = None,
    ) -> Policy:
        """The policy in a training checkpoint, whose state is ``Trainer.state_dict()``.

        Raises:
            ValueError: The state does not fit the spaces, or a network of one's own is not given.
        """
        there = space_facts(observation_space, action_space)
        if (other := space_difference(state.get("spaces"), there)) is not None:
            raise ValueError(other)
        network = build_network(
            observation_space,
            action_head(action_space),
            config.network,
            network,
            action_space=action_space,
            device=device,
        )
        try:
            network.load_state_dict(state["network"])
        except (RuntimeError, KeyError, TypeError):
            what = (
                "network, or to the environment's spaces" if network.own else "environment's spaces"
            )
            raise ValueError(f"checkpoint does not fit the {what}") from None
        saved = state["collector"]["observation_normalizer"]
        normalizer = None if saved is None else observation_normalizer(observation_space, config)
        if normalizer is not None:
            normalizer.load_state_dict(saved)
        channels = config.network.channels
        return cls(network, observation_space, action_space, normalizer, seed, channels)

    @property
    def recurrent(self) -> bool:
        """Whether the network has a state, which :meth:`advance` takes and gives."""
        return self.network.recurrent

    def act(
        self,
        observations: Any,
        deterministic: bool = False,
        masks: Masks | None = None,
    ) -> NDArray[Any]:
        """Actions, as the environment takes them; a network with a memory begins anew.

        Args:
            observations: A batch of raw observations (N, ...); those of a Dict or Tuple space are a
                dict or tuple of such arrays.
            deterministic: The most likely actions instead of samples.
            masks: Action masks (N, P), true where an action is allowed.
        """
        return self.advance(observations, None, None, deterministic, masks)[0]

    @torch.no_grad()
    def advance(
        self,
        observations: Any,
        state: Memorised | None,
        starts: NDArray[np.bool_] | None,
        deterministic: bool = False,
        masks: Masks | None = None,
    ) -> tuple[NDArray[Any], Memorised | None]:
        """Actions, and the state of the network after them.

        Args:
            observations: As for :meth:`act`.
            state: What this method gave at the step before, arrays (N, ...); None at the first.
                Networks without a memory pass it through.
            starts: Observations (N,) that are the first of an episode; None: none of them is.
            deterministic: As for :meth:`act`.
            masks: As for :meth:`act`.

        Raises:
            ValueError: The state is not one of this network for as many observations.
        """
        allowed = None if masks is None else to_tensor(masks, self.device)
        (parameters, *_), after = self._forward(observations, state, starts)
        dist = self.head.make(parameters, allowed)
        actions = dist.mode() if deterministic else dist.sample(dist.noise(self.generator))
        return to_environment(actions.cpu().numpy(), self.action_space), after

    @torch.no_grad()
    def outputs(self, observations: Any) -> tuple[Tensor, Tensor]:
        """Distribution parameters (N, P) and values (N,) of raw observations (N, ...).

        A network with a memory begins anew.
        """
        (parameters, values, *_), _ = self._forward(observations, None, None)
        return parameters, values

    def _forward(
        self, observations: Any, state: Memorised | None, starts: NDArray[np.bool_] | None
    ) -> tuple[Outputs, Memorised | None]:
        """The network's outputs of raw observations (N, ...), and its state after them."""
        tensor = prepared(self.observation_space, observations, self.normalizer, self.device)
        with threads_for(self.observation_space, self.channels):
            if not self.network.recurrent:
                outputs: Outputs = self.network(tensor)
                return outputs, state
            outputs, after = self.network.unroll(self._step(tensor, state, starts))
        return outputs, tuple(part.cpu().numpy() for part in after)

    def _step(
        self, observations: Tree, state: Memorised | None, starts: NDArray[np.bool_] | None
    ) -> Sequences:
        """One step of a network with a memory."""
        num = length(observations)
        before = self.network.initial_state(num)
        if state is not None:
            shapes = [tuple(np.shape(part)) for part in state]
            if shapes != [tuple(part.shape) for part in before]:
                raise ValueError(
                    f"the state must have the shapes {[tuple(part.shape) for part in before]} for"
                    f" {num} observations, got {shapes}"
                )
            given = zip(state, before, strict=True)
            before = tuple(torch.as_tensor(part).to(like) for part, like in given)
        first = np.zeros(num, np.bool_) if starts is None else np.asarray(starts, np.bool_)
        if first.shape != (num,):
            raise ValueError(f"episode starts must have the shape ({num},), got {first.shape}")
        return Sequences.step(observations, to_tensor(first, self.device), before)
