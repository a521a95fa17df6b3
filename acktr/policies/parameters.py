"""A network's parameters taken out and put in by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from acktr.config import ConfigError
from acktr.policies.distributions import ActionHead


def copied_parameters(network: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters and buffers, by name."""
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def require_saveable(network: nn.Module) -> None:
    """Refuse a network with a state that no checkpoint can hold, before it is trained.

    Raises:
        ConfigError: One line.
    """
    for name, value in network.state_dict().items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"the network's state_dict() has {name!r} of {type(value).__name__}: checkpoints"
                " hold tensors alone, as those of register_buffer() or of a get_extra_state() that"
                " gives one"
            )


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
    own = network.state_dict()
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
    network.load_state_dict({**own, **tensors})


def require_fitting(network: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a checkpoint's tensors have a network's names and shapes."""
    own = network.state_dict()
    wrong = [
        name
        for name in sorted(set(own) | set(saved))
        if name not in own or name not in saved or own[name].shape != saved[name].shape
    ]
    if wrong:
        shapes = [
            str(tuple(each[wrong[0]].shape)) if wrong[0] in each else "missing"
            for each in (saved, own)
        ]
        raise ValueError(
            f"checkpoint does not fit the network: {', '.join(wrong[:4])}"
            f" ({wrong[0]} is {shapes[0]} in it and {shapes[1]} here)"
        )


@torch.no_grad()
def free_deviation(network: nn.Module, head: ActionHead) -> float | None:
    """Mean standard deviation of actions where it does not depend on the state, else None."""
    if not head.gaussian:
        return None
    for name, parameter in network.named_parameters():
        if name.rpartition(".")[2] == "log_std":
            return float(parameter.exp().mean())
    return None
