"""What a policy thinks of actions, for those who look into it."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acktr.compute import to_tensor
from acktr.envs import Masks
from acktr.policies.policy import Policy

Array = NDArray[Any]
Arrays = Array | tuple[Array, ...]


def action_probability(policy: Policy, observations: Any, masks: Masks | None = None) -> Arrays:
    """The distribution of actions for raw observations (N, ...), with action masks (N, P).

    Returns:
        Discrete: probabilities (N, n). MultiDiscrete: such an array for each component.
        MultiBinary: probabilities of 1, (N, *shape). Box: mean and standard deviation (N, *shape)
        before actions are clipped to the bounds.
    """
    parameters, space = policy.outputs(observations)[0].cpu(), policy.action_space
    if masks is not None:
        parameters = parameters.masked_fill(~torch.from_numpy(masks), -torch.inf)
    if isinstance(space, gymnasium.spaces.Discrete):
        return parameters.softmax(-1).numpy()
    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        parts = torch.split(parameters, [int(n) for n in space.nvec.ravel()], dim=-1)
        return tuple(part.softmax(-1).numpy() for part in parts)
    shape = (len(parameters), *(space.shape or ()))
    if isinstance(space, gymnasium.spaces.Box):
        mean, log_std = parameters.chunk(2, dim=-1)
        return mean.reshape(shape).numpy(), log_std.exp().reshape(shape).numpy()
    return parameters.sigmoid().reshape(shape).numpy()


def log_probability(
    policy: Policy, observations: Any, actions: Array, masks: Masks | None = None
) -> Array:
    """Log-probability (N,) of one action per raw observation; of Boxes the log-density.

    Actions are as the environment takes them; densities are those before clipping.

    Raises:
        ValueError: There is another number of actions, or one that is not in the space.
    """
    targets = _targets(np.asarray(actions), policy.action_space)
    parameters, _ = policy.outputs(observations)
    if len(targets) != len(parameters):
        raise ValueError(f"{len(targets)} actions for {len(parameters)} observations")
    allowed = None if masks is None else to_tensor(masks, policy.device)
    dist = policy.head.make(parameters, allowed)
    return dist.log_prob(targets.to(policy.device)).cpu().numpy()


def _targets(actions: Array, space: gymnasium.Space[Any]) -> Tensor:
    """Targets of the head's distribution: the way back of ``to_environment``."""
    shape = tuple(space.shape or ())
    if actions.shape[1:] != shape or actions.ndim != len(shape) + 1:
        raise ValueError(f"actions have shape {actions.shape}; {shape} for each is needed")
    if isinstance(space, gymnasium.spaces.Box):
        return torch.from_numpy(actions.reshape(len(actions), -1).astype(np.float32))
    for action in actions:
        if not space.contains(action):
            raise ValueError(f"the action {action} is not in {space}")
    start: Any = getattr(space, "start", 0)
    return torch.from_numpy((actions - start).astype(np.int64))
