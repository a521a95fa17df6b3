"""A network's parameters taken out and put in by name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from acktr.config import ConfigError
from acktr.policies.contract import ActorCritic


def copied_parameters(network: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters and buffers, by name."""
    return {name: value.detach().clone() for name, value in _tensors(network).items()}


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """A network's state as far as it is tensors: get_extra_state() may give anything."""
    state: dict[str, Any] = network.state_dict()
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _unsaveable(network: nn.Module) -> str | None:
    """One line on a state that no checkpoint can hold; None if there is none."""
    for name, value in network.state_dict().items():
        if value is not None and not isinstance(value, Tensor):
            return (
                f"the network's state_dict() has {name!r} of {type(value).__name__}, which no"
                " checkpoint holds: register_buffer(), or a get_extra_state() that gives a tensor"
            )
    return None


def require_saveable(network: nn.Module) -> None:
    """Refuse a network with a state that no checkpoint can hold.

    Raises:
        ConfigError: One line.
    """
    if (what := _unsaveable(network)) is not None:
        raise ConfigError(what)


def tell_unsaveable(network: nn.Module) -> None:
    """Warn of such a network when it is made: not every one is to be saved."""
    if (what := _unsaveable(network)) is not None:
        warnings.warn(f"it cannot be saved: {what}", UserWarning, stacklevel=3)


def saved_parameters(network: nn.Module) -> dict[str, Tensor | None]:
    """What checkpoints hold of a network: copies, and None where get_extra_state() gives that.

    Raises:
        ConfigError: It has a state that they cannot hold.
    """
    require_saveable(network)
    return {**network.state_dict(), **copied_parameters(network)}


def replace_parameters(
    network: nn.Module, given: Mapping[str, Tensor | NDArray[Any]], exact_match: bool
) -> None:
    """Give a network these parameters, all of them or nothing.

    Args:
        network: Whose.
        given: Tensors or arrays by name.
        exact_match: Whether every parameter must be there; else the others stay.

    Raises:
        ValueError: A name is unknown or missing, a shape differs, or a number is NaN or Inf.
    """
    own = _tensors(network)
    tensors = {name: torch.as_tensor(value) for name, value in given.items()}
    missing = set(own) - set(tensors) if exact_match else set()
    for name in sorted(missing | (set(tensors) - set(own))):
        raise ValueError(f"parameter {name!r} is {'missing' if name in own else 'unknown'}")
    for name, value in tensors.items():
        found, wanted = tuple(value.shape), tuple(own[name].shape)
        if found != wanted:
            raise ValueError(f"parameter {name!r} has shape {found}; {wanted} is needed")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"parameter {name!r} has NaN or Inf in it")
    network.load_state_dict({**network.state_dict(), **tensors})


def require_fitting(network: nn.Module, saved: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError unless a checkpoint's tensors have a network's names and shapes."""
    own = _tensors(network)
    there = {name: value for name, value in saved.items() if value is not None}
    wrong = [
        name
        for name in sorted(set(own) | set(there))
        if name not in own or name not in there or own[name].shape != there[name].shape
    ]
    if wrong:
        shapes = [
            str(tuple(each[wrong[0]].shape)) if wrong[0] in each else "missing"
            for each in (there, own)
        ]
        raise ValueError(
            f"checkpoint does not fit the network: {', '.join(wrong[:4])}"
            f" ({wrong[0]} is {shapes[0]} in it and {shapes[1]} here)"
        )


@torch.no_grad()
def free_deviation(network: ActorCritic) -> float | None:
    """Mean standard deviation of actions that a built-in network has as a parameter, else None."""
    if network.own:  # where the name may mean anything
        return None
    for name, parameter in network.named_parameters():
        if name.rpartition(".")[2] == "log_std":
            return float(parameter.exp().mean())
    return None
