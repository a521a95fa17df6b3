"""Action heads: how a policy network's output becomes actions of a space, and what acts on it.

The distributions themselves, with sampling, log-probability, entropy, KL and Fisher metric, are
those of :mod:`acktr.kfac`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acktr.kfac import Bernoulli, Categorical, DiagonalGaussian, Distribution, MultiCategorical


class Maker(Protocol):
    """Makes the distribution of actions from its parameters."""

    def __call__(self, parameters: Tensor, masks: Tensor | None = None, /) -> Distribution:
        """The distribution of actions (B, ...) with parameters (B, P)."""


@dataclass(frozen=True)
class ActionHead:
    """How a policy network's output becomes actions of a space."""

    outputs: int
    """Width of the network's last layer."""
    gaussian: bool
    """Whether a free log-std parameter of the same width belongs to it."""
    make: Maker
    """From distribution parameters (B, P) to the distribution of actions (B, ...).

    Masks (B, P), of Categorical and MultiCategorical, are true where an action is allowed.
    """

    def noise(self, rows: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Noise of the actions of a batch whose parameters are not known yet.

        Args:
            rows: B.
            generator: Source of the noise, whose device is that of the parameters.
            dtype: Type of the parameters.
        """
        width = 2 * self.outputs if self.gaussian else self.outputs
        parameters = torch.zeros(rows, width, device=generator.device, dtype=dtype)
        return self.make(parameters).noise(generator)


def action_head(space: gymnasium.Space[Any]) -> ActionHead:
    """The head of an action space.

    Raises:
        ValueError: The space is not Discrete, Box, MultiDiscrete (1-D) or MultiBinary.
    """
    if isinstance(space, gymnasium.spaces.Discrete):
        return ActionHead(int(space.n), False, Categorical)
    if isinstance(space, gymnasium.spaces.Box):
        return ActionHead(int(np.prod(space.shape)), True, _unmasked(DiagonalGaussian))
    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        sizes = tuple(int(n) for n in space.nvec.ravel())

        def several(logits: Tensor, masks: Tensor | None = None, /) -> Distribution:
            return MultiCategorical(logits, sizes, masks)

        return ActionHead(sum(sizes), False, several)
    if isinstance(space, gymnasium.spaces.MultiBinary):
        return ActionHead(int(np.prod(space.shape)), False, _unmasked(Bernoulli))
    raise ValueError(f"unsupported action space {space}")


def _unmasked(make: Callable[[Tensor], Distribution]) -> Maker:
    def made(parameters: Tensor, masks: Tensor | None = None, /) -> Distribution:
        if masks is not None:
            raise ValueError("action masks are for Discrete and MultiDiscrete actions only")
        return make(parameters)

    return made


def to_environment(actions: NDArray[Any], space: gymnasium.Space[Any]) -> NDArray[Any]:
    """Actions as a vector environment takes them: reshaped, clipped to Box bounds, shifted.

    Args:
        actions: Samples of the head's distribution, one per row.
        space: The single action space.
    """
    if isinstance(space, gymnasium.spaces.Box):
        shaped = actions.reshape(len(actions), *space.shape)
        clipped: NDArray[Any] = np.minimum(np.maximum(shaped, space.low), space.high)
        return clipped.astype(space.dtype, copy=False)
    if isinstance(space, gymnasium.spaces.Discrete):
        return actions.astype(np.int64) + int(space.start)
    shaped = actions.reshape(len(actions), *(space.shape or ()))
    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        shaped = shaped + space.start
    result: NDArray[Any] = shaped.astype(space.dtype)
    return result
