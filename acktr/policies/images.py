"""Images as convolutions take them: converted once, into memory that is used again."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def channels_last(space: gymnasium.Space[Any]) -> bool:
    """Whether images of the space are (H, W, C) rather than (C, H, W)."""
    assert space.shape is not None
    height, width, last = space.shape
    return last < min(height, width)


def image_shape(space: gymnasium.Space[Any]) -> tuple[int, int, int]:
    """(C, H, W) of a space of images."""
    assert space.shape is not None
    first, second, third = space.shape
    return (third, first, second) if channels_last(space) else (first, second, third)


def compute_type(device: torch.device) -> torch.dtype:
    """The type of a convolution's input: that of autocast where it is on."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.get_default_dtype()


def convert(images: Tensor, last: bool, out: Tensor | None = None) -> Tensor:
    """Images of bytes as numbers in [0, 1], (B, C, H, W) with channels last in memory.

    Bytes are converted before channels move: two passes over contiguous memory are faster than one
    that does both.

    Args:
        images: (B, C, H, W) or (B, H, W, C), uint8.
        last: Whether they are (B, H, W, C).
        out: Where to; by default new memory of the type that :func:`compute_type` gives.
    """
    dtype = compute_type(images.device) if out is None else out.dtype
    scaled = images.to(dtype).mul_(1 / 255)
    if last:
        scaled = scaled.permute(0, 3, 1, 2)
    if out is None:
        return scaled.contiguous(memory_format=torch.channels_last)
    return out.copy_(scaled)


class FrameStore:
    """Memory for the converted images of one rollout, which every rollout uses again.

    Acting and learning then share one conversion of each image, and nothing large is mapped and
    unmapped at every update. The space is that of one environment, and the device the network's.
    """

    def __init__(self, space: gymnasium.Space[Any], device: torch.device) -> None:
        self._last = channels_last(space)
        self._shape = image_shape(space)
        self._device = device
        self._memory: Tensor | None = None

    def room(self, num_steps: int, num_envs: int, dtype: torch.dtype) -> Tensor:
        """The memory (T, N, C, H, W), channels last; it is new only if size or type changed."""
        shape = (num_steps * num_envs, *self._shape)
        memory = self._memory
        if memory is None or memory.shape != shape or memory.dtype != dtype:
            layout = torch.channels_last
            memory = torch.empty(shape, dtype=dtype, device=self._device, memory_format=layout)
            self._memory = memory
        return memory.view(num_steps, num_envs, *self._shape)

    def put(self, images: NDArray[np.uint8], place: Tensor) -> Tensor:
        """Convert images (N, ...) into their place, and give them as the network takes them."""
        raw = torch.from_numpy(images)
        if self._device.type == "cuda":  # torch uses pinned memory again once it has been copied
            raw = raw.pin_memory().to(self._device, non_blocking=True)
        return convert(raw, self._last, place)


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
