"""Forward passes without the calls between modules, which cost small batches more than products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.functional import linear
from torch.nn.modules import module as calls

from acktr.policies.networks import Actor


def straight(module: nn.Module) -> Callable[[Any], Any]:
    """What calls of a module compute, by the same operations in the same order.

    Modules with hooks are called as ever.

    Args:
        module: It keeps its parts, its parameters and its hooks for as long as this is used;
            parameters may change in place.
    """
    if _hooked(module):
        return module
    if type(module) is nn.Sequential:
        return _chained([straight(part) for part in module])
    if type(module) is Actor:
        return _chained([straight(module.trunk), straight(module.head)])
    if type(module) is nn.Linear:
        weight, bias = module.weight, module.bias
        return lambda rows: linear(rows, weight, bias)
    forward: Callable[[Any], Any] = module.forward
    return forward


def _chained(parts: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def chain(given: Any) -> Any:
        for part in parts:
            given = part(given)
        return given

    return chain


def _hooked(module: nn.Module) -> bool:
    """Whether something listens to its calls."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return any((*own, calls._global_forward_hooks, calls._global_forward_pre_hooks))
