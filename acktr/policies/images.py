"""Pictures as convolutions take them: converted once, into memory that is used again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acktr.envs import Picture


def compute_type(device: torch.device) -> torch.dtype:
    """The type of a convolution's input: that of autocast where it is on."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.get_default_dtype()


def convert(images: Tensor, picture: Picture, out: Tensor | None = None) -> Tensor:
    """Pictures as scaled numbers (B, C, H, W) with channels last in memory.

    Numbers are converted before channels move: two passes over contiguous memory are faster than
    one that does both.

    Args:
        images: (B, ...) as the environment gives them.
        picture: Where their channels are, and their scale.
        out: Where to; by default new memory of the type that :func:`compute_type` gives.
    """
    dtype = compute_type(images.device) if out is None else out.dtype
    scaled = images.to(dtype)
    if picture.low != 0:
        scaled = scaled - picture.low
    if picture.scale != 1:
        # Never in place in the environment's own numbers.
        scaled = scaled * picture.scale if scaled is images else scaled.mul_(picture.scale)
    if picture.axis == "last":
        scaled = scaled.permute(0, 3, 1, 2)
    elif picture.axis == "absent":
        scaled = scaled.unsqueeze(1)
    if out is None:
        return scaled.contiguous(memory_format=torch.channels_last)
    return out.copy_(scaled)


def converted(images: Tensor, picture: Picture) -> Tensor:
    """Pictures (B, ...) as :func:`convert` makes them; floats for integers are that already."""
    if images.is_floating_point() and not picture.floats:
        return images
    return convert(images, picture)


class FrameStore:
    """Memory for the converted pictures of one rollout, which every rollout uses again.

    Acting and learning then share one conversion of each picture, and nothing large is mapped and
    unmapped at every update. The device is the network's.
    """

    def __init__(self, picture: Picture, device: torch.device) -> None:
        self._picture = picture
        self._device = device
        self._memory: Tensor | None = None

    def room(self, num_steps: int, num_envs: int, dtype: torch.dtype) -> Tensor:
        """The memory (T, N, C, H, W), channels last; it is new only if size or type changed."""
        shape = (num_steps * num_envs, *self._picture.shape)
        memory = self._memory
        if memory is None or memory.shape != shape or memory.dtype != dtype:
            layout = torch.channels_last
            memory = torch.empty(shape, dtype=dtype, device=self._device, memory_format=layout)
            self._memory = memory
        return memory.view(num_steps, num_envs, *self._picture.shape)

    def put(self, images: NDArray[Any], place: Tensor) -> Tensor:
        """Convert pictures (N, ...) into their place, and give them as the network takes them."""
        raw = torch.from_numpy(images)
        if self._device.type == "cuda":  # torch uses pinned memory again once it has been copied
            raw = raw.pin_memory().to(self._device, non_blocking=True)
        return convert(raw, self._picture, place)


def pack(frames: Tensor, valid: NDArray[np.bool_]) -> tuple[Tensor, NDArray[np.intp]]:
    """Valid rows at the front, by moving the last of them into the gaps: nothing else is copied.

    Args:
        frames: (B, ...), changed in place.
        valid: (B,).

    Returns:
        The valid rows, a view, and their numbers in the order in which they now stand.
    """
    count = int(valid.sum())
    order = np.arange(count)
    gaps = np.flatnonzero(~valid[:count])
    if len(gaps):
        movers = count + np.flatnonzero(valid[count:])
        order[gaps] = movers
        rows = torch.from_numpy(movers).to(frames.device)
        frames[torch.from_numpy(gaps).to(frames.device)] = frames[rows]
    return frames[:count], order
