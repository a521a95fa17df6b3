"""The network of a run: the built-in ones by their settings, or one of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch

from acktr.config import ConfigError, NetworkConfig
from acktr.envs import Channels, Picture, parts, pictures
from acktr.policies.contract import ActorCritic, NetworkSource, SeparateActorCritic
from acktr.policies.distributions import ActionHead
from acktr.policies.networks import Actor, Critic, SharedActorCritic
from acktr.policies.own import own_network
from acktr.policies.parameters import tell_unsaveable
from acktr.policies.probe import check_network, check_sequences, examples
from acktr.policies.recurrent import memory_network


class ChannelsWarning(UserWarning):
    """A shape does not tell which axis of a picture has the channels, or that it is one."""


def _tell_channels(name: str, guess: Picture) -> None:
    what = f"the observation part {name!r}" if name else "the observation"
    channels, height, width = guess.shape
    other = "first" if guess.axis == "last" else "last"
    warnings.warn(
        f"{what} is taken for {channels} channels of {height} x {width} with the channels"
        f" {guess.axis}; if they are {other}, set network.channels to {other!r}",
        ChannelsWarning,
        stacklevel=4,
    )


def _tell_shapes(space: gymnasium.Space[Any], channels: Channels, built_in: bool) -> None:
    """Warn of channels that may be elsewhere, and of bytes with four axes in built-in networks."""
    for name, each in pictures(space, channels).items():
        if not each.sure:
            _tell_channels(name, each)
    looked_for = built_in and channels != "none"
    for name, part in parts(space).items() if looked_for else ():
        if part.dtype == np.uint8 and len(part.shape or ()) == 4:
            warnings.warn(
                f"the observation{f' part {name!r}' if name else ''} {part.shape} is taken for a"
                " vector, as a picture has three axes: join stacked frames in the channels by a"
                " wrapper, (H, W, k*C); or set network.channels to 'none' if it is no picture",
                ChannelsWarning,
                stacklevel=4,
            )


def build_network(
    space: gymnasium.Space[Any],
    head: ActionHead,
    config: NetworkConfig,
    network: NetworkSource | None = None,
    *,
    action_space: gymnasium.Space[Any] | None = None,
    auxiliary: Sequence[str] = (),
    device: torch.device | None = None,
) -> ActorCritic:
    """The network that the configuration asks for, or one of one's own.

    Args:
        space: Observation space of one environment.
        head: Action distribution.
        config: Settings of the built-in networks.
        network: One of one's own.
        action_space: Of one environment, which networks of one's own are made with.
        auxiliary: Names of auxiliary outputs, which networks of one's own alone have.
        device: Where to; the network is called there on a few observations (None: it is not).

    Raises:
        ConfigError: The network does not keep the contract; or it is one of one's own, by the
            settings, and is not given.
    """
    _tell_shapes(space, config.channels, built_in=network is None)
    built: ActorCritic
    if network is not None:
        assert action_space is not None
        built = own_network(network, space, action_space, head, auxiliary, config.channels)
        tell_unsaveable(built)
    elif config.custom is not None:
        raise ConfigError(
            f"the network is {config.custom}: give it by network= (on the command line:"
            f" --network {config.custom})"
        )
    elif auxiliary:
        raise ConfigError(
            f"auxiliary losses ({', '.join(auxiliary)}) need a network that returns their outputs:"
            " give one by network="
        )
    elif config.memory != "none":
        built = memory_network(space, head, config)
    elif config.shared:
        built = SharedActorCritic(space, head, config)
    else:
        built = SeparateActorCritic(Actor(space, head, config), Critic(space, config))
    if device is None:
        return built
    built = built.to(device)
    if not built.recurrent:
        return check_network(built, examples(space, device))
    return check_sequences(built, examples(space, device)) if built.own else built
