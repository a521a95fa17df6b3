"""Networks of one's own, made and brought into the form that acting and learning take."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import gymnasium
from torch import nn

from acktr.config import ConfigError
from acktr.envs import Channels, one_line
from acktr.policies.contract import (
    ActorCritic,
    Adapter,
    NetworkSource,
    SeparateActorCritic,
    Source,
    each_source,
    network_name,
)
from acktr.policies.distributions import ActionHead
from acktr.policies.networks import Actor, Critic, SharedActorCritic
from acktr.policies.recurrent import RecurrentAdapter, RecurrentSeparate

_OURS = {
    Actor,
    Adapter,
    Critic,
    RecurrentAdapter,
    RecurrentSeparate,
    SeparateActorCritic,
    SharedActorCritic,
}
"""Classes of built-in networks and of what is around others, which know whose they are."""
_given: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules that agents were made with."""


class MemoryWarning(UserWarning):
    """A network has recurrent layers that remember nothing from step to step."""


def own_network(
    source: NetworkSource,
    space: gymnasium.Space[Any] | None,
    action_space: gymnasium.Space[Any],
    head: ActionHead,
    auxiliary: Sequence[str] = (),
    channels: Channels = "auto",
) -> ActorCritic:
    """A network of one's own in the form that acting and learning take, made if it is not yet.

    Args:
        source: The module, what makes it, or an actor and a critic.
        space: Observation space of one environment; None for modules whose observations stay as
            they are.
        action_space: Of one environment.
        head: Its action distribution.
        auxiliary: Names of the auxiliary outputs, which the actor has of two networks.
        channels: Where pictures have their channels.

    Raises:
        ConfigError: It is none of these, cannot be made, or has no parameters.
    """
    made = [_made(one, space, action_space) for one in each_source(source)]
    if len(made) == 1 and isinstance(made[0], ActorCritic):
        ready = made[0]
        if not _known(ready):
            ready.own = True
            if not ready.recurrent:
                _tell_forgetful(made)
        return ready
    remembering = {hasattr(each, "initial_state") for each in made}
    if True not in remembering:
        _tell_forgetful(made)
    kind = RecurrentAdapter if remembering == {True} else Adapter

    def adapted(module: nn.Module, *outputs: str) -> Any:
        return kind(module, outputs, head, action_space, space, channels)

    if len(made) == 1:
        network: ActorCritic = adapted(made[0], "policy", "value", *auxiliary)
        return network
    actor, critic = made
    if {id(p) for p in actor.parameters()} & {id(p) for p in critic.parameters()}:
        raise ConfigError(
            "the actor and the critic share parameters: give one network that returns both"
        )
    if len(remembering) > 1:
        raise ConfigError("give both the actor and the critic a memory (initial_state), or neither")
    separate = RecurrentSeparate if remembering == {True} else SeparateActorCritic
    network = separate(adapted(actor, "policy", *auxiliary), adapted(critic, "value"))
    network.own, network.auxiliary = True, tuple(auxiliary)
    return network


def tell_given(source: NetworkSource | None) -> None:
    """Warn of a module that another agent was made with, and take note of it."""
    modules = _modules(source)
    if not modules.isdisjoint(_given):
        warnings.warn(
            "the network has been another agent's, whose weights it goes on from: pass its class,"
            " or copy.deepcopy(network) before it has learned",
            UserWarning,
            stacklevel=3,  # the caller of the agent's constructor
        )
    _given.update(modules)


def tell_other(trained: str | None, source: NetworkSource | None) -> None:
    """Warn of a network of another name, in whatever module, than that of a checkpoint."""
    _given.difference_update(_modules(source))  # which get the weights of the checkpoint
    if trained is None or source is None or type(source) in _OURS:
        return  # what an agent has around its modules has no name of them
    given = network_name(source)
    former, present = (
        [each.rpartition(":")[2] for each in name.split(",")] for name in (trained, given)
    )
    if former != present:
        warnings.warn(
            f"the agent was trained with the network {trained:.200}, and {given} is given: if"
            " weights of the same shapes mean something else there, it computes something else",
            UserWarning,
            stacklevel=4,  # the caller of load()
        )


def _known(network: ActorCritic) -> bool:
    """Whether a network is made of classes of this package alone, not of subclasses of them."""
    separate = isinstance(network, SeparateActorCritic)
    parts = (network, network.actor, network.critic) if separate else (network,)
    return {type(part) for part in parts} <= _OURS


def _modules(source: NetworkSource | None) -> set[nn.Module]:
    each = source if isinstance(source, tuple) else (source,)
    return {one for one in each if isinstance(one, nn.Module)}


def _tell_forgetful(made: Sequence[nn.Module]) -> None:
    """Warn of recurrent layers in networks that have no state."""
    for name, layer in (named for each in made for named in each.named_modules()):
        if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
            kind = type(layer).__name__
            warnings.warn(
                f"the network's {kind} {name or 'itself'} begins anew at every step, which is right"
                " only if it reads a sequence within one observation: for a memory from step to"
                " step write initial_state(n) and forward(observations, state, starts), see"
                " acktr.policies.recurrent",
                MemoryWarning,
                stacklevel=3,
            )
            return


def _shown(space: gymnasium.Space[Any]) -> str:
    return f"{' '.join(str(space).split()):.100}"


def _made(
    source: Source, space: gymnasium.Space[Any] | None, action_space: gymnasium.Space[Any]
) -> nn.Module:
    name, module = network_name(source), source
    if not isinstance(source, nn.Module):
        if space is None:
            raise ConfigError(
                f"network must be a torch.nn.Module already made, got {source!r:.100}"
            )
        try:
            module = source(space, action_space)
        except Exception as error:
            raise ConfigError(
                f"network {name}({_shown(space)}, {_shown(action_space)}):"
                f" {type(error).__name__}: {one_line(error)}"
            ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"network {name}(observation_space, action_space) must give a torch.nn.Module, got"
            f" {type(module).__name__}"
        )
    if not any(p.is_floating_point() for p in module.parameters()):
        raise ConfigError(f"network {name} has no parameters to learn")
    return module
