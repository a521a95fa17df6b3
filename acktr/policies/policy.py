"""A trained policy that only acts: network, action head and frozen normaliser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from acktr.compute import threads_for, to_tensor
from acktr.config import Config
from acktr.envs import is_image
from acktr.policies.distributions import action_head, to_environment
from acktr.policies.networks import ActorCritic, build_network
from acktr.policies.normalize import ObservationNormalizer, normalizable


class Policy:
    """Acts with a network; never changes it or the normaliser.

    Args:
        network: Policy and value function.
        observation_space: Of one environment.
        action_space: Of one environment.
        normalizer: Observation statistics, applied frozen.
        seed: Of the action noise.
    """

    def __init__(
        self,
        network: ActorCritic,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        normalizer: ObservationNormalizer | None,
        seed: int = 0,
    ) -> None:
        self.network = network
        self.head = action_head(action_space)
        self.observation_space = observation_space
        self.action_space = action_space
        self.normalizer = normalizer
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
    ) -> Policy:
        """The policy in a training checkpoint, whose state is ``Trainer.state_dict()``.

        Raises:
            ValueError: The state does not fit the spaces.
        """
        network = build_network(observation_space, action_head(action_space), config.network).to(
            device
        )
        try:
            network.load_state_dict(state["network"])
        except (RuntimeError, KeyError, TypeError):
            raise ValueError("checkpoint does not fit the environment's spaces") from None
        normalizer = None
        saved = state["collector"]["observation_normalizer"]
        if saved is not None and normalizable(observation_space):
            normalizer = ObservationNormalizer(tuple(observation_space.shape or ()))
            normalizer.load_state_dict(saved)
        return cls(network, observation_space, action_space, normalizer, seed)

    @torch.no_grad()
    def act(self, observations: NDArray[Any], deterministic: bool = False) -> NDArray[Any]:
        """Actions, as the environment takes them, of a batch of raw observations (N, ...)."""
        if self.normalizer is not None:
            observations = self.normalizer(observations)
        elif is_image(self.observation_space):
            observations = np.asarray(observations, np.uint8)
        tensor = to_tensor(np.ascontiguousarray(observations), self.device)
        with threads_for(self.observation_space):
            dist = self.head.make(self.network(tensor)[0])
            actions = dist.mode() if deterministic else dist.sample(dist.noise(self.generator))
        return to_environment(actions.cpu().numpy(), self.action_space)
