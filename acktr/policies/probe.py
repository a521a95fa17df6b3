"""A look at a network before it is used: what it returns for a few observations."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector.utils import batch_space
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from acktr.config import ConfigError
from acktr.envs import flat, one_line
from acktr.kfac import fill_bound
from acktr.policies.contract import ActorCritic, Outputs, as_outputs, described
from acktr.tree import Tree

_EXAMPLES = 3
_WIDEST = 1e3
"""Largest size of a number in an example; bounds may be those of the type."""


def examples(space: gymnasium.Space[Any], device: torch.device) -> Tree:
    """A few observations of a space, as the environment gives them; always the same ones."""
    batch = batch_space(space, _EXAMPLES)
    batch.seed(0)

    def tensor(array: Any) -> Tensor:
        numbers = np.asarray(array)
        if numbers.dtype.kind == "f":
            numbers = numbers.clip(-_WIDEST, _WIDEST)
        return torch.from_numpy(numbers).to(device)

    shown = flat(space, batch.sample())
    if isinstance(shown, dict):
        return {name: tensor(array) for name, array in shown.items()}
    return tensor(shown)


def check_network(network: ActorCritic, observations: Any) -> ActorCritic:
    """Call a network on a few observations; returns it in evaluation mode.

    The outputs must have their shapes and be finite, depend on the observations, and each row on
    its own observation alone. That is looked at with moved weights, since heads may begin at zero.

    Args:
        network: It sets ``modal``.
        observations: Two rows or more, different ones.

    Raises:
        ConfigError: One line that says what is wrong and what would be right.
    """
    leaves, layout = tree_flatten(observations)
    network.eval()
    cuda = [leaf.device for leaf in leaves[:1] if leaf.is_cuda]
    with torch.random.fork_rng(devices=cuda), torch.no_grad():
        outputs = _finite(_run(network, observations, {}))
        draw = torch.Generator().manual_seed(0)
        moved = {
            name: p + 0.1 * torch.randn(p.shape, generator=draw).to(p)
            for name, p in network.named_parameters()
            if p.is_floating_point()
        }
        whole = _run(network, observations, moved)
        again = _run(network, observations, moved)
        if all(map(_near, whole, again)) and all(bool(o.isfinite().all()) for o in whole):
            for row in range(len(leaves[0])):
                one = tree_unflatten([leaf[row : row + 1] for leaf in leaves], layout)
                alone = _finite(_run(network, one, moved))
                if not all(
                    _near(o[row : row + 1], a, o) for o, a in zip(whole, alone, strict=True)
                ):
                    raise ConfigError(
                        f"the network's output for observation {row} depends on the other"
                        " observations of the batch: forward() must take each row by itself"
                    )
            _check_dependence(network, leaves, layout, whole)
        _check_gradients(network, observations)
        network.modal = not all(map(_near, outputs, _trained(network, observations)))
    return network


def _run(network: ActorCritic, observations: Any, weights: dict[str, Tensor]) -> Outputs:
    """Outputs with some weights or buffers replaced."""
    try:
        return as_outputs(functional_call(network, weights, (observations,)))
    except ConfigError:
        raise
    except Exception as error:  # whatever a network of one's own raises
        raise ConfigError(
            f"the network cannot take observations {described(observations)}:"
            f" {type(error).__name__}: {one_line(error)}"
        ) from error


def _finite(outputs: Outputs) -> Outputs:
    """The outputs; raises ConfigError if they hold NaN or Inf."""
    if not all(bool(output.isfinite().all()) for output in outputs):
        raise ConfigError(
            "the network's outputs are not finite (masks belong to the environment: a network"
            " gives logits of all actions)"
        )
    return outputs


def _trained(network: ActorCritic, observations: Any) -> Outputs:
    """Outputs in training mode, whose running statistics are left alone."""
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network.train()
    try:
        return _run(network, observations, buffers)
    finally:
        network.eval()


def _check_gradients(network: ActorCritic, observations: Any) -> None:
    """Raise ConfigError if the policy or the value cannot learn."""
    with torch.enable_grad():
        outputs = _run(network, observations, {})
    for name, output in zip(("policy", "value"), outputs, strict=False):
        if not output.requires_grad:
            raise ConfigError(
                f"the network's {name} has no gradient: forward() must neither detach it nor run"
                " under torch.no_grad(), and some of its parameters must not be frozen"
            )


def _check_dependence(
    network: ActorCritic, leaves: list[Tensor], layout: Any, outputs: Outputs
) -> None:
    """Raise ConfigError if neither policy nor value depends on the observations."""
    differ = any(bool((leaf[1:] != leaf[:1]).any()) for leaf in leaves)
    if not differ or not all(_near(o, o[:1].expand_as(o)) for o in outputs[:2]):
        return
    floats = [leaf.is_floating_point() for leaf in leaves]
    wanted = [
        leaf.clone().requires_grad_() if is_float else leaf
        for leaf, is_float in zip(leaves, floats, strict=True)
    ]
    inputs = [leaf for leaf, is_float in zip(wanted, floats, strict=True) if is_float]
    if inputs:  # the same numbers may also come from activations that are saturated
        with torch.enable_grad():
            policy, value, *_ = as_outputs(network(tree_unflatten(wanted, layout)))
            total = policy.sum() + value.sum()
        if total.requires_grad:
            slopes = torch.autograd.grad(total, inputs, allow_unused=True)
            if any(slope is not None for slope in slopes):
                return
    raise ConfigError(
        "the network's policy and value are the same for different observations: forward() does"
        " not use them"
    )


def _near(first: Tensor, second: Tensor, scale: Tensor | None = None) -> bool:
    """Whether two outputs are equal up to what a batch of another size may round.

    The -1e9 that a network itself gives actions that are not allowed is compared apart: next to it
    no other number would count.
    """
    whole = first if scale is None else scale
    bound, allowed = fill_bound(whole), 10 * torch.finfo(first.dtype).eps ** 0.5
    filled = first < bound
    return all(
        bool(((first - second).abs() * part).max() <= allowed * (whole.abs() * seen).max())
        for part, seen in ((filled, whole < bound), (~filled, whole >= bound))
    )
