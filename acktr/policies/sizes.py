"""How large a network and its curvature would be, found out before any memory is taken."""

from __future__ import annotations

import math
import warnings
from typing import Any

import gymnasium
import torch
from torch import nn

from acktr.config import Config, ConfigError
from acktr.envs import parts
from acktr.policies.build import build_network
from acktr.policies.distributions import ActionHead

_GIB = 1 << 30
_LARGEST_FACTOR = 1 * _GIB
"""Bytes of one Kronecker factor (16,384 inputs in float32); K-FAC keeps three matrices of that size
and decomposes it in about ten minutes."""
_LARGEST_NETWORK = 4 * _GIB
"""Bytes of all weights."""
_LARGEST_ROLLOUT = 64 * _GIB
"""Bytes of the observations of a rollout."""


def require_size(
    space: gymnasium.Space[Any], head: ActionHead, config: Config, num_envs: int
) -> None:
    """Refuse what cannot be meant: observations whose network or rollout would be absurdly large.

    The network is built without memory for its weights (on torch's meta device), so that nothing
    of that size is allocated here.

    Args:
        space: The space of one environment's observations.
        head: Action distribution.
        config: The run.
        num_envs: Number of environments.

    Raises:
        ConfigError: One line that says what is too large, and what to do.
    """
    network: nn.Module = nn.Identity()  # one of one's own is made by its owner
    if config.network.custom is None:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the real one will tell
            network = build_network(space, head, config.network)
    shapes = ", ".join(f"{name or 'observation'} {part}" for name, part in parts(space).items())
    axes = {len(part.shape or ()) for part in parts(space).values()}
    advice = (
        f"(observations: {shapes:.200}); make them smaller by a wrapper (for pictures"
        " gymnasium.wrappers.ResizeObservation)"
    )
    if 4 in axes:
        advice += ", or join stacked frames in the channels, (H, W, k*C)"
    elif axes & {2, 3}:
        advice += ", or set network.channels if they are pictures"
    weights = 4 * sum(parameter.numel() for parameter in network.parameters())
    if weights > _LARGEST_NETWORK:
        raise ConfigError(f"the network's weights would take {_shown(weights)} {advice}")
    inputs, name = max((_inputs(module), name) for name, module in network.named_modules())
    cap = config.acktr.actor.max_factor_size
    factor = 4 * (inputs + 1) ** 2
    if config.algo == "acktr" and cap is None and factor > _LARGEST_FACTOR:
        raise ConfigError(
            f"layer {name} would have {inputs:,} inputs, whose K-FAC factor takes"
            f" {_shown(factor)} {advice}"
        )
    rows = config.num_steps * num_envs
    one = sum(math.prod(part.shape or (1,)) for part in parts(space).values())
    if 4 * rows * one > _LARGEST_ROLLOUT:
        raise ConfigError(
            f"the observations of {rows:,} samples would take {_shown(4 * rows * one)} {advice},"
            " or lower num_envs or num_steps"
        )


def _inputs(module: nn.Module) -> int:
    """Inputs of each of a layer's outputs; 0 for what has no matrix as its factor."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        return module.weight[0].numel()
    return 0


def _shown(size: int) -> str:
    return f"{size / _GIB:,.0f} GiB"
