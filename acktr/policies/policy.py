"""A trained policy that only acts: network, action head and frozen normaliser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import torch
from numpy.typing import NDArray
from torch import Tensor

from acktr.compute import threads_for, to_tensor
from acktr.config import Config
from acktr.envs import Masks
from acktr.policies.contract import ActorCritic, NetworkSource
from acktr.policies.distributions import action_head, to_environment
from acktr.policies.inputs import prepared
from acktr.policies.networks import build_network
from acktr.policies.normalize import Normalizer, observation_normalizer


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
        normalizer: Normalizer | None,
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
        network: NetworkSource | None = None,
    ) -> Policy:
        """The policy in a training checkpoint, whose state is ``Trainer.state_dict()``.

        Raises:
            ValueError: The state does not fit the spaces, or a network of one's own is not given.
        """
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
            raise ValueError("checkpoint does not fit the environment's spaces") from None
        saved = state["collector"]["observation_normalizer"]
        normalizer = None if saved is None else observation_normalizer(observation_space, config)
        if normalizer is not None:
            normalizer.load_state_dict(saved)
        return cls(network, observation_space, action_space, normalizer, seed)

    def act(
        self,
        observations: Any,
        deterministic: bool = False,
        masks: Masks | None = None,
    ) -> NDArray[Any]:
        """Actions, as the environment takes them.

        Args:
            observations: A batch of raw observations (N, ...); those of a Dict or Tuple space are a
                dict or tuple of such arrays.
            deterministic: The most likely actions instead of samples.
            masks: Action masks (N, P), true where an action is allowed.
        """
        allowed = None if masks is None else to_tensor(masks, self.device)
        dist = self.head.make(self.outputs(observations)[0], allowed)
        actions = dist.mode() if deterministic else dist.sample(dist.noise(self.generator))
        return to_environment(actions.cpu().numpy(), self.action_space)

    @torch.no_grad()
    def outputs(self, observations: Any) -> tuple[Tensor, Tensor]:
        """Distribution parameters (N, P) and values (N,) of raw observations (N, ...)."""
        tensor = prepared(self.observation_space, observations, self.normalizer, self.device)
        with threads_for(self.observation_space):
            parameters, values, *_ = self.network(tensor)
        return parameters, values
