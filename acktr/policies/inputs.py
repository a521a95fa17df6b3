"""Observations on their way from environments to networks."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from acktr.compute import to_tensor
from acktr.envs import Channels, flat, nested, parts, pictures
from acktr.policies.images import converted
from acktr.policies.normalize import Normalizer
from acktr.tree import Tree


def prepared(
    space: gymnasium.Space[Any],
    observations: Any,
    normalizer: Normalizer | None,
    device: torch.device,
) -> Tree:
    """A batch of observations as the environment gives it, normalised and on a device.

    Args:
        space: The space of one environment.
        observations: Arrays (N, ...) in the structure of the space.
        normalizer: Applied frozen.
        device: Where the network is.
    """
    shown = flat(space, observations)
    typed: Any = {
        name: np.ascontiguousarray(shown[name] if isinstance(shown, dict) else shown, part.dtype)
        for name, part in parts(space).items()
    }
    typed = typed if isinstance(shown, dict) else typed[""]
    if normalizer is not None:
        typed = normalizer(typed)
    if isinstance(typed, dict):
        return {name: to_tensor(array, device) for name, array in typed.items()}
    return to_tensor(typed, device)


class Given:
    """Observations as a module that is not ours takes them.

    A Dict space gives a dict, a Tuple space a tuple, each nested as the space is. Pictures are
    (B, C, H, W), scaled; other Boxes have the type of the module's parameters; everything else is
    as the environment gives it.

    Args:
        space: The space of one environment.
        channels: Where pictures have their channels.
    """

    def __init__(self, space: gymnasium.Space[Any], channels: Channels = "auto") -> None:
        self.pictures = pictures(space, channels)
        self._space = space
        boxes = {n: part for n, part in parts(space).items() if isinstance(part, spaces.Box)}
        # Whether each is a copy always: normalised ones come as float32 whatever the space says,
        # and a module that works in place on the copy of a float64 would change these.
        self._boxes = {name: part.dtype != np.float32 for name, part in boxes.items()}

    def __call__(self, observations: Tree, dtype: torch.dtype) -> Any:
        """Give a batch: tensors (B, ...), by part if the space has parts."""
        values = observations if isinstance(observations, dict) else {"": observations}
        return nested(self._space, {n: self._one(n, each, dtype) for n, each in values.items()})

    def _one(self, name: str, part: Tensor, dtype: torch.dtype) -> Tensor:
        if name in self.pictures:
            return converted(part, self.pictures[name])
        return part.to(dtype, copy=self._boxes[name]) if name in self._boxes else part
